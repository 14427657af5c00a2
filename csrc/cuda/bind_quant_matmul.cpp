#include "bindings.h"
#include "quant_matmul.h"

namespace fastllm::cuda {

namespace {

QuantMatmulArgs args_of(const TensorView& x, const std::optional<TensorView>& x_groups, const TensorView& data,
                        const TensorView& scale, const TensorView& y, int64_t n, int64_t k, int bits,
                        int64_t group_size, int zero, bool int8_activations) {
  QuantMatmulArgs a{};
  a.x = x.data;
  a.x_groups = x_groups ? x_groups->as<const float>() : nullptr;
  a.data = data.as<const uint8_t>();
  a.scale = scale.data;
  a.y = y.data;
  a.dtype = y.dtype;
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

// Integers that somebody else made are read where they lie, 16 bytes at a time.
void check_integers(const TensorView& x, const TensorView& x_groups, int64_t k, int64_t group_size) {
  const Rows rows = Rows::of(x);
  FASTLLM_CHECK(x.dtype == DType::i8 && k % 16 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
                    rows.ndim <= 1 && rows.strides[0] % 16 == 0,
                "quant_matmul_int8: x must be int8, its rows at one stride and in whole pieces of 16 bytes");
  const int64_t columns = group_size == 32 || group_size == 64 ? group_size : 128;
  FASTLLM_CHECK(x_groups.dtype == DType::f32 && x_groups.contiguous_from(0) &&
                    x_groups.numel() == x.numel() / k * ((k + columns - 1) / columns) * 2,
                "quant_matmul_int8: x_groups must be contiguous fp32, a pair for each token and ", columns, " columns");
}

}  // namespace

void bind_quant_matmul(py::module_& m) {
  m.def(
      "quant_matmul_workspace",
      [](const TensorView& x, const std::optional<TensorView>& x_groups, const TensorView& data,
         const TensorView& scale, const TensorView& y, int64_t n, int64_t k, int bits, int64_t group_size, int zero,
         bool int8_activations) {
        return quant_matmul_workspace(
            args_of(x, x_groups, data, scale, y, n, k, bits, group_size, zero, int8_activations), x.device_index);
      },
      "(x, x_groups, data, scale, y, n, k, bits, group_size, zero, int8_activations): floats of memory that the call "
      "needs");
  m.def(
      "quant_matmul",
      [](const TensorView& x, const std::optional<TensorView>& x_groups, const TensorView& data,
         const TensorView& scale, const std::optional<TensorView>& minimum, const std::optional<TensorView>& bias,
         const TensorView& y, const std::optional<TensorView>& workspace, int64_t n, int64_t k, int bits,
         int64_t group_size, int zero, bool int8_activations) {
        FASTLLM_CHECK(y.contiguous_from(0) && y.size(-1) == n && y.numel() / n == x.numel() / k,
                      "quant_matmul: y must be contiguous, a row of ", n, " for each row of x");
        FASTLLM_CHECK(data.contiguous_from(0) && data.ndim == 3 && data.size(0) == (n + 15) / 16,
                      "quant_matmul: data must be contiguous, ", (n + 15) / 16, " blocks of the layout x16");
        if (x_groups) check_integers(x, *x_groups, k, group_size);
        QuantMatmulArgs a =
            args_of(x, x_groups, data, scale, y, n, k, bits, group_size, zero, int8_activations || x_groups);
        a.minimum = minimum ? minimum->data : nullptr;
        a.bias = bias ? bias->data : nullptr;
        const int64_t needed = quant_matmul_workspace(a, x.device_index);
        FASTLLM_CHECK(needed == 0 || (workspace && workspace->dtype == DType::f32 && workspace->numel() >= needed),
                      "quant_matmul: the workspace must hold ", needed, " floats");
        a.workspace = workspace ? workspace->as<float>() : nullptr;
        quant_matmul(a, place_of(x));
      },
      "(x, x_groups, data, scale, minimum, bias, y, workspace, n, k, bits, group_size, zero, int8_activations): fills "
      "y; x_groups where x is integers already");
}

}  // namespace fastllm::cuda
