#include <cstdlib>
#include <new>

#include "bindings.h"
#include "quant_matmul_float.h"
#include "quant_matmul_int8.h"

namespace fastllm::cpu {

namespace {

// 64-byte aligned memory, freed whatever happens. PyTorch would allocate for about a microsecond; this is a tenth of
// it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes + 1, 64))))) {
    if (memory_ == nullptr) throw std::bad_alloc();  // pybind11 turns this into MemoryError
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* get() const { return memory_; }

 private:
  char* memory_;
};

// The registered ops take plain tensors from anyone: nothing may be read or written outside of them.
QuantMatmulArgs args_of(const TensorView& x, const TensorView& data, const TensorView& scale,
                        const std::optional<TensorView>& minimum, const std::optional<TensorView>& bias,
                        const TensorView& y, int64_t N, int64_t K, int bits, int64_t group_size, int zero,
                        int threads) {
  const int64_t blocks = (N + kBlockRows - 1) / kBlockRows;
  FASTLLM_CHECK(K > 0 && N > 0 && (bits == 4 || bits == 8) && group_size > 0 && K % group_size == 0 &&
                    (group_size == 32 || group_size == 64 || group_size == 128 || group_size == K),
                "quant_matmul: no such format: N ", N, ", K ", K, ", bits ", bits, ", group_size ", group_size);
  FASTLLM_CHECK(data.dtype == DType::u8 && data.contiguous_from(0) &&
                    data.numel() == blocks * padded_k(K) * kBlockRows * bits / 8,
                "quant_matmul: data must be contiguous uint8 in layout x16 of (", N, ", ", K, ")");
  const auto is_scale = [&](const TensorView& t) {
    return t.contiguous_from(0) && t.numel() == blocks * (K / group_size) * kBlockRows && t.dtype == scale.dtype;
  };
  FASTLLM_CHECK(scale.dtype == DType::f32 || scale.dtype == DType::bf16 || scale.dtype == DType::f16,
                "quant_matmul: scale is ", name(scale.dtype), ", expected float32, bfloat16 or float16");
  FASTLLM_CHECK(is_scale(scale) && (!minimum || is_scale(*minimum)),
                "quant_matmul: scale and minimum must be contiguous, of one dtype, in layout x16 of (", N, ", ", K,
                ") with groups of ", group_size);
  FASTLLM_CHECK(x.ndim >= 1 && x.size(-1) == K, "quant_matmul: the last dim of x must be ", K);
  FASTLLM_CHECK(x.stride(-1) == 1 || K == 1, "quant_matmul: x has stride ", x.stride(-1),
                " in its last dim, expected 1");
  QuantMatmulArgs a{};
  a.M = x.numel() / K;
  FASTLLM_CHECK(y.dtype == DType::f32 || y.dtype == DType::bf16 || y.dtype == DType::f16, "quant_matmul: y is ",
                name(y.dtype), ", expected float32, bfloat16 or float16");
  FASTLLM_CHECK(y.numel() == a.M * N && y.contiguous_from(0), "quant_matmul: y must be contiguous, of shape (..., ", N,
                ")");
  FASTLLM_CHECK(!bias || (bias->dtype == y.dtype && bias->numel() == N && bias->contiguous_from(0)),
                "quant_matmul: bias must be (", N, ",) of y's dtype and stride 1");
  a.x = x.data;
  a.data = data.as<const uint8_t>();
  a.scale = scale.data;
  a.minimum = minimum ? minimum->data : nullptr;
  a.bias = bias ? bias->data : nullptr;
  a.y = y.data;
  a.dtype = y.dtype;
  a.scale_dtype = scale.dtype;
  a.x_rows = Rows::of(x);
  a.N = N;
  a.K = K;
  a.group_size = group_size;
  a.bits = bits;
  a.zero = zero;
  a.threads = threads;
  a.bf16_dots = fast_bf16_dots();
  return a;
}

}  // namespace

void bind_quant_matmul(py::module_& m) {
  m.def(
      "quant_matmul",
      [](const TensorView& x, const TensorView& data, const TensorView& scale, const std::optional<TensorView>& minimum,
         const std::optional<TensorView>& bias, const TensorView& y, int64_t N, int64_t K, int bits, int64_t group_size,
         int zero, bool int8_activations, int threads) {
        const QuantMatmulArgs args = args_of(x, data, scale, minimum, bias, y, N, K, bits, group_size, zero, threads);
        FASTLLM_CHECK(x.dtype == y.dtype, "quant_matmul: x is ", name(x.dtype), ", expected ", name(y.dtype),
                      " to match y");
        launch(int8_activations ? "quant_matmul int8" : "quant_matmul float", [a = args, int8_activations]() mutable {
          Scratch scratch(int8_activations ? quant_matmul_int8_scratch(a.M, a.K)
                                           : quant_matmul_float_scratch(a.M, a.K));
          a.scratch = scratch.get();
          int8_activations ? quant_matmul_int8_kernel(a) : quant_matmul_float_kernel(a);
        });
      },
      "(x, data, scale, minimum, bias, y, N, K, bits, group_size, zero, int8_activations, threads): fills y");
  m.def(
      "quant_matmul_int8",
      [](const TensorView& x, const TensorView& x_groups, const TensorView& data, const TensorView& scale,
         const std::optional<TensorView>& minimum, const std::optional<TensorView>& bias, const TensorView& y,
         int64_t N, int64_t K, int bits, int64_t group_size, int zero, int threads) {
        QuantMatmulArgs args = args_of(x, data, scale, minimum, bias, y, N, K, bits, group_size, zero, threads);
        const int64_t act_group = activation_group(group_size), num_groups = (K + act_group - 1) / act_group;
        FASTLLM_CHECK(x.dtype == DType::i8 && x_groups.dtype == DType::f32 && x_groups.contiguous_from(0) &&
                          x_groups.numel() == args.M * num_groups * 2,
                      "quant_matmul: x must be int8, and x_groups contiguous float32 (..., ", num_groups, ", 2)");
        args.x_groups = x_groups.as<const float>();
        launch("quant_matmul int8", [a = args]() mutable {
          Scratch scratch(quant_matmul_int8_scratch(a.M, a.K));
          a.scratch = scratch.get();
          quant_matmul_int8_kernel(a);
        });
      },
      "(x, x_groups, data, scale, minimum, bias, y, N, K, bits, group_size, zero, threads): fills y from given "
      "integers");
  declare_rungs(m, "quant_matmul float", quant_matmul_float_kernel);
  declare_rungs(m, "quant_matmul int8", quant_matmul_int8_kernel);
}

}  // namespace fastllm::cpu
