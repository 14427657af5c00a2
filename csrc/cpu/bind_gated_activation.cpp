#include "bindings.h"
#include "gated_activation.h"

namespace fastllm::cpu {

namespace {

GatedActivationArgs args_of(const TensorView& gate, const std::optional<TensorView>& up, const TensorView& y,
                            bool gelu_tanh, int threads) {
  GatedActivationArgs a{};
  a.I = y.size(-1);
  FASTLLM_CHECK(gate.stride(-1) == 1 || gate.size(-1) == 1, "gated_activation: gate has stride ", gate.stride(-1),
                " in its last dim, expected 1");
  FASTLLM_CHECK(y.contiguous_from(0), "gated_activation: y must be contiguous");
  a.dtype = gate.dtype;
  a.gate = gate.data;
  a.gate_rows = Rows::of(gate);
  const int64_t row_bytes = a.I * (gate.dtype == DType::f32 ? 4 : 2);
  if (up) {
    a.up = up->data;
    a.up_rows = Rows::of(*up);
  } else {  // [gate | up] in one buffer
    a.up = static_cast<const char*>(gate.data) + row_bytes;
    a.up_rows = a.gate_rows;
  }
  a.y = y.data;
  a.rows = a.I ? y.numel() / a.I : 0;
  a.activation = gelu_tanh ? Activation::gelu_tanh : Activation::silu;
  a.past_caches = past_caches(y.data, row_bytes, 3 * a.rows * row_bytes);
  a.threads = threads;
  return a;
}

}  // namespace

void bind_gated_activation(py::module_& m) {
  m.def(
      "gated_activation",
      [](const TensorView& gate, const std::optional<TensorView>& up, const TensorView& y, bool gelu_tanh,
         int threads) {
        const GatedActivationArgs a = args_of(gate, up, y, gelu_tanh, threads);
        launch("gated_activation", [a] { gated_activation_kernel(a); });
      },
      "(gate, up, y, gelu_tanh, threads): fills y; without up, gate's rows are [gate | up]");
  m.def(
      "gated_activation_int8",
      [](const TensorView& gate, const std::optional<TensorView>& up, const TensorView& y, const TensorView& groups,
         bool gelu_tanh, int64_t group_size, int threads) {
        GatedActivationArgs a = args_of(gate, up, y, gelu_tanh, threads);
        a.groups = int8_groups("gated_activation", y, groups, group_size);
        a.group_size = group_size;
        launch("gated_activation", [a] { gated_activation_kernel(a); });
      },
      "(gate, up, y, groups, gelu_tanh, group_size, threads): y is int8");
  declare_rungs(m, "gated_activation", gated_activation_kernel);
}

}  // namespace fastllm::cpu
