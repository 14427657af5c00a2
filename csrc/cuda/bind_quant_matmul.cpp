#include "bindings.h"
#include "quant_matmul.h"

namespace fastllm::cuda {

namespace {

QuantMatmulArgs args_of(const TensorView& x, const TensorView& data, const TensorView& scale, const TensorView& y,
                        int64_t n, int64_t k, int bits, int64_t group_size, int zero, bool int8_activations) {
  QuantMatmulArgs a{};
  a.x = x.data;
  a.data = data.as<const uint8_t>();
  a.scale = scale.data;
  a.y = y.data;
  a.dtype = x.dtype;
  a.scale_dtype = scale.dtype;
  a.M = x.numel() / k;
  a.N = n;
  a.K = k;
  a.lines = data.size(1);
  a.groups = scale.size(1);
  a.x_rows = Rows::of(x);
  a.bits = bits;
  a.group_size = static_cast<int>(group_size);
  a.zero = zero;
  a.int8_activations = int8_activations;
  return a;
}

}  // namespace

void bind_quant_matmul(py::module_& m) {
  m.def(
      "quant_matmul_workspace",
      [](const TensorView& x, const TensorView& data, const TensorView& scale, const TensorView& y, int64_t n,
         int64_t k, int bits, int64_t group_size, int zero, bool int8_activations) {
        return quant_matmul_workspace(args_of(x, data, scale, y, n, k, bits, group_size, zero, int8_activations),
                                      x.device_index);
      },
      "(x, data, scale, y, n, k, bits, group_size, zero, int8_activations): floats of memory that the call needs");
  m.def(
      "quant_matmul",
      [](const TensorView& x, const TensorView& data, const TensorView& scale, const std::optional<TensorView>& minimum,
         const std::optional<TensorView>& bias, const TensorView& y, const std::optional<TensorView>& workspace,
         int64_t n, int64_t k, int bits, int64_t group_size, int zero, bool int8_activations) {
        FASTLLM_CHECK(y.contiguous_from(0) && y.size(-1) == n && y.numel() / n == x.numel() / k,
                      "quant_matmul: y must be contiguous, a row of ", n, " for each row of x");
        FASTLLM_CHECK(data.contiguous_from(0) && data.ndim == 3 && data.size(0) == (n + 15) / 16,
                      "quant_matmul: data must be contiguous, ", (n + 15) / 16, " blocks of the layout x16");
        QuantMatmulArgs a = args_of(x, data, scale, y, n, k, bits, group_size, zero, int8_activations);
        a.minimum = minimum ? minimum->data : nullptr;
        a.bias = bias ? bias->data : nullptr;
        const int64_t needed = quant_matmul_workspace(a, x.device_index);
        FASTLLM_CHECK(needed == 0 || (workspace && workspace->dtype == DType::f32 && workspace->numel() >= needed),
                      "quant_matmul: the workspace must hold ", needed, " floats");
        a.workspace = workspace ? workspace->as<float>() : nullptr;
        quant_matmul(a, place_of(x));
      },
      "(x, data, scale, minimum, bias, y, workspace, n, k, bits, group_size, zero, int8_activations): fills y");
}

}  // namespace fastllm::cuda
