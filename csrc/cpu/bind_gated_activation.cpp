#include "bindings.h"
#include "gated_activation.h"

namespace fastllm::cpu {

void bind_gated_activation(py::module_& m) {
  m.def(
      "gated_activation",
      [](const TensorView& gate, const std::optional<TensorView>& up, const TensorView& y, bool gelu_tanh,
         int threads) {
        GatedActivationArgs a{};
        a.I = y.size(-1);
        FASTLLM_CHECK(gate.stride(-1) == 1 || gate.size(-1) == 1, "gated_activation: gate has stride ", gate.stride(-1),
                      " in its last dim, expected 1");
        FASTLLM_CHECK(y.contiguous_from(0), "gated_activation: y must be contiguous");
        a.dtype = gate.dtype;
        a.gate = gate.data;
        a.gate_rows = Rows::of(gate);
        if (up) {
          a.up = up->data;
          a.up_rows = Rows::of(*up);
        } else {  // [gate | up] in one buffer
          const int64_t size = gate.dtype == DType::f32 ? 4 : 2;
          a.up = static_cast<const char*>(gate.data) + a.I * size;
          a.up_rows = a.gate_rows;
        }
        a.y = y.data;
        a.rows = a.I ? y.numel() / a.I : 0;
        a.activation = gelu_tanh ? Activation::gelu_tanh : Activation::silu;
        a.threads = threads;
        launch("gated_activation", [a] { gated_activation_kernel(a); });
      },
      "(gate, up, y, gelu_tanh, threads): fills y; without up, gate's rows are [gate | up]");
  declare_rungs(m, "gated_activation", gated_activation_kernel);
}

}  // namespace fastllm::cpu
