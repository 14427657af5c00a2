// y[i, k] = (q[ids[i], k] - zero) * scale + minimum: rows of a quantised table, read where the matrix kernels keep
// them.
//
// Bytes a token: K bits / 8 of one row in 16, in lines of 64 bytes of which it uses 4, and K written. A decode step
// reads one row; no rung gains over the scalar one there, so there is no other.
#include "embedding.h"

#include "parallel.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kBlockRows = 16, kLineBytes = 64;

FASTLLM_INLINE float number_at(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// y[0 .. n) of a group, n at most a line's columns; a line has four bytes of the row.
template <int kBits, typename T>
FASTLLM_INLINE void line_columns(const uint8_t* line, int zero, float scale, float minimum, T* y, int64_t n) {
  constexpr int kColumns = kBits == 4 ? 8 : 4;
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) {
    if (j >= n) return;
    const int q = kBits == 8 ? line[j] : j < 4 ? line[j] & 15 : line[j - 4] >> 4;
    from_float(static_cast<float>(q - zero) * scale + minimum, y[j]);
  }
}

template <int kBits, typename T>
void embedding_rows(const EmbeddingArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kBits == 4 ? 8 : 4;                                  // in a line
  const int64_t groups = a.K / a.group_size, lines = (a.K + 7) / 8 * 8 / kColumns;  // of a block; K is padded to 8
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = a.ids[i] / kBlockRows, row = a.ids[i] % kBlockRows;
    const uint8_t* line = a.data + block * lines * kLineBytes + row * 4;
    T* y = static_cast<T*>(a.y) + i * a.K;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (block * groups + g) * kBlockRows + row;
      const float scale = number_at(a.scale, a.scale_dtype, at);
      const float minimum = a.minimum ? number_at(a.minimum, a.scale_dtype, at) : 0.0f;
      // A group begins with a line: there is one alone, or its size is a multiple of 32.
      int64_t k = g * a.group_size;
      const int64_t stop = k + a.group_size;
      for (; k + kColumns <= stop; k += kColumns) {
        line_columns<kBits>(line + k / kColumns * kLineBytes, a.zero, scale, minimum, y + k, kColumns);
      }
      if (k < stop) line_columns<kBits>(line + k / kColumns * kLineBytes, a.zero, scale, minimum, y + k, stop - k);
    }
  }
}

}  // namespace

void embedding(const EmbeddingArgs& a) {
  const int64_t tokens_a_chunk = 1 + 8192 / a.K;
  parallel_for(a.count, tokens_a_chunk, a.threads, [&](int64_t begin, int64_t end) {
#define FASTLLM_BODY(T) \
  a.bits == 8 ? embedding_rows<8, decltype(T)>(a, begin, end) : embedding_rows<4, decltype(T)>(a, begin, end)
    FASTLLM_FOR_FLOAT(a.y_dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
