#include "bindings.h"
#include "embedding.h"

namespace fastllm::cpu {

void bind_embedding(py::module_& m) {
  m.def(
      "embedding",
      [](const TensorView& ids, const TensorView& data, const TensorView& scale,
         const std::optional<TensorView>& minimum, const TensorView& y, int64_t N, int64_t K, int bits,
         int64_t group_size, int zero, int threads) {
        FASTLLM_CHECK(N > 0 && K > 0 && (bits == 4 || bits == 8) && group_size > 0 && K % group_size == 0,
                      "embedding: no such format: N ", N, ", K ", K, ", bits ", bits, ", group_size ", group_size);
        const int64_t blocks = (N + 15) / 16;
        FASTLLM_CHECK(data.dtype == DType::u8 && data.contiguous_from(0) &&
                          data.numel() == blocks * ((K + 7) / 8 * 8) * 16 * bits / 8,
                      "embedding: data must be contiguous uint8 in layout x16 of (", N, ", ", K, ")");
        const auto is_scale = [&](const TensorView& t) {
          return t.contiguous_from(0) && t.dtype == scale.dtype && t.numel() == blocks * (K / group_size) * 16;
        };
        FASTLLM_CHECK(scale.dtype == DType::f32 || scale.dtype == DType::bf16 || scale.dtype == DType::f16,
                      "embedding: scale is ", name(scale.dtype), ", expected float32, bfloat16 or float16");
        FASTLLM_CHECK(is_scale(scale) && (!minimum || is_scale(*minimum)),
                      "embedding: scale and minimum must be contiguous, of one dtype, in layout x16");
        FASTLLM_CHECK(ids.dtype == DType::i64 && ids.contiguous_from(0), "embedding: ids must be contiguous int64");
        FASTLLM_CHECK(y.contiguous_from(0) && y.numel() == ids.numel() * K, "embedding: y must be contiguous (..., K)");
        EmbeddingArgs a{};
        a.ids = ids.as<const int64_t>();
        a.count = ids.numel();
        for (int64_t i = 0; i < a.count; ++i) {
          FASTLLM_CHECK(a.ids[i] >= 0 && a.ids[i] < N, "embedding: ids holds ", a.ids[i], ", expected 0 to ", N - 1,
                        ", the rows of w");
        }
        a.data = data.as<const uint8_t>();
        a.scale = scale.data;
        a.minimum = minimum ? minimum->data : nullptr;
        a.y = y.data;
        a.scale_dtype = scale.dtype;
        a.y_dtype = y.dtype;
        a.K = K;
        a.group_size = group_size;
        a.bits = bits;
        a.zero = zero;
        a.threads = threads;
        launch("embedding", [a] { embedding_kernel(a); });
      },
      "(ids, data, scale, minimum, y, N, K, bits, group_size, zero, threads): fills y");
  declare_rungs(m, "embedding", embedding_kernel);
}

}  // namespace fastllm::cpu
