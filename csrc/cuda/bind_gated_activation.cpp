#include "bindings.h"
#include "gated_activation.h"

namespace fastllm::cuda {

namespace {

GatedActivationArgs args_of(const TensorView& gate, const TensorView& up, bool gelu_tanh) {
  FASTLLM_CHECK(gate.numel() == up.numel(), "gated_activation: up must be as large as gate");
  GatedActivationArgs a{};
  a.gate = gate.data;
  a.up = up.data;
  a.dtype = gate.dtype;
  a.I = gate.size(-1);
  a.rows = a.I ? gate.numel() / a.I : 0;
  a.gate_rows = Rows::of(gate);
  a.up_rows = Rows::of(up);
  a.gelu_tanh = gelu_tanh;
  return a;
}

}  // namespace

void bind_gated_activation(py::module_& m) {
  m.def(
      "gated_activation",
      [](const TensorView& gate, const TensorView& up, const TensorView& y, bool gelu_tanh) {
        FASTLLM_CHECK(y.contiguous_from(0) && y.numel() == gate.numel(),
                      "gated_activation: y must be contiguous and as large as gate and up");
        GatedActivationArgs a = args_of(gate, up, gelu_tanh);
        a.y = y.data;
        gated_activation(a, place_of(gate));
      },
      "(gate, up, y, gelu_tanh): fills y");
  m.def(
      "gated_activation_int8",
      [](const TensorView& gate, const TensorView& up, const TensorView& data, const TensorView& groups, bool gelu_tanh,
         int64_t group_size) {
        GatedActivationArgs a = args_of(gate, up, gelu_tanh);
        a.int8 = int8_output("gated_activation_int8", data, groups, a.rows, a.I, group_size);
        gated_activation(a, place_of(gate));
      },
      "(gate, up, data, groups, gelu_tanh, group_size): fills data and groups");
}

}  // namespace fastllm::cuda
