#include "bindings.h"
#include "gated_activation.h"

namespace fastllm::cuda {

void bind_gated_activation(py::module_& m) {
  m.def(
      "gated_activation",
      [](const TensorView& gate, const TensorView& up, const TensorView& y, bool gelu_tanh) {
        FASTLLM_CHECK(y.contiguous_from(0) && y.numel() == gate.numel() && y.numel() == up.numel(),
                      "gated_activation: y must be contiguous and as large as gate and up");
        GatedActivationArgs a{};
        a.gate = gate.data;
        a.up = up.data;
        a.y = y.data;
        a.dtype = gate.dtype;
        a.I = y.size(-1);
        a.rows = a.I ? y.numel() / a.I : 0;
        a.gate_rows = Rows::of(gate);
        a.up_rows = Rows::of(up);
        a.gelu_tanh = gelu_tanh;
        gated_activation(a, place_of(gate));
      },
      "(gate, up, y, gelu_tanh): fills y");
}

}  // namespace fastllm::cuda
