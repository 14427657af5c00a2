// Lines of packed weights in registers. A 64-byte line fills kBlockVectors registers, 32 bits a row: four 8-bit weights
// or eight 4-bit ones of consecutive k. Include after simd/simd.h; the same rules hold (internal linkage only).
#pragma once

#include "quant_matmul.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kBlockVectors = static_cast<int>(kBlockRows) / kWidth;

// vi: kWidth lanes of 32 bits.
#if FASTLLM_ISA_LEVEL >= 2

struct vi {
  __m512i v;
};
FASTLLM_INLINE vi load_int(const void* p) { return {_mm512_loadu_si512(p)}; }
FASTLLM_INLINE void store_int(void* p, vi a) { _mm512_storeu_si512(p, a.v); }
FASTLLM_INLINE vi set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
FASTLLM_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
FASTLLM_INLINE vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int kShift>
FASTLLM_INLINE vi shift_right(vi a) {
  return {_mm512_srli_epi32(a.v, kShift)};
}
FASTLLM_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }

#elif FASTLLM_ISA_LEVEL == 1

struct vi {
  __m256i v;
};
FASTLLM_INLINE vi load_int(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
FASTLLM_INLINE void store_int(void* p, vi a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
FASTLLM_INLINE vi set1_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
FASTLLM_INLINE vi operator+(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
FASTLLM_INLINE vi operator&(vi a, vi b) { return {_mm256_and_si256(a.v, b.v)}; }
template <int kShift>
FASTLLM_INLINE vi shift_right(vi a) {
  return {_mm256_srli_epi32(a.v, kShift)};
}
FASTLLM_INLINE vf to_float(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }

#else

struct vi {
  uint32_t v;
};
FASTLLM_INLINE vi load_int(const void* p) {
  vi a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
FASTLLM_INLINE void store_int(void* p, vi a) { std::memcpy(p, &a.v, sizeof a.v); }
FASTLLM_INLINE vi set1_int(int32_t x) { return {static_cast<uint32_t>(x)}; }
FASTLLM_INLINE vi operator+(vi a, vi b) { return {a.v + b.v}; }
FASTLLM_INLINE vi operator&(vi a, vi b) { return {a.v & b.v}; }
template <int kShift>
FASTLLM_INLINE vi shift_right(vi a) {
  return {a.v >> kShift};
}
FASTLLM_INLINE vf to_float(vi a) { return {static_cast<float>(static_cast<int32_t>(a.v))}; }

#endif

// Columns of a line without shifting each: a mask leaves q * 2^p in the low 16 bits of a dword or of its upper half,
// and the caller multiplies by 2^-p where that is free. So columns come in the order of `rank`: the lower half's first.
template <int kBits>
constexpr int first_bit(int column) {  // of the column's weight in a dword; 4 bits: low nibbles are columns 0 to 3
  return kBits == 8 ? 8 * column : 8 * (column % 4) + column / 4 * 4;
}
template <int kBits>
constexpr bool in_upper_half(int column) {
  return first_bit<kBits>(column) >= 16;
}
template <int kBits>
constexpr int power(int column) {
  return first_bit<kBits>(column) % 16;
}
template <int kBits>
constexpr int rank(int column) {
  return kBits == 8 ? column : column % 4 / 2 * 4 + column / 4 * 2 + column % 2;  // 0 1 4 5 2 3 6 7
}
// q * 2^power of one column; `half` is the line, or for columns in the upper half the line shifted right by 16.
template <int kBits, int kColumn>
FASTLLM_INLINE vf scaled_column(vi half) {
  return to_float(half & set1_int(((1 << kBits) - 1) << power<kBits>(kColumn)));
}

// Sixteen scales or minimums of a group, whatever their dtype, as floats.
FASTLLM_INLINE void widen_16(const void* base, DType dtype, int64_t index, float* out) {
  for (int v = 0; v < kBlockVectors; ++v) {
    const int64_t at = index * kBlockRows + v * kWidth;
    vf a;
    switch (dtype) {
      case DType::f16:
        a = load(static_cast<const f16*>(base) + at);
        break;
      case DType::bf16:
        a = load(static_cast<const bf16*>(base) + at);
        break;
      default:
        a = load(static_cast<const float*>(base) + at);
        break;
    }
    store(out + v * kWidth, a);
  }
}

// The same sixteen rows' offsets for integers counted from `center`, given their scales:
// (q - zero) * scale + minimum = (q - center) * scale + offset.
FASTLLM_INLINE void widen_offset(const QuantMatmulArgs& a, int64_t index, int center, const float* scale, float* out) {
  if (a.minimum) widen_16(a.minimum, a.scale_dtype, index, out);
  const vf steps = set1(static_cast<float>(center - a.zero));
  for (int v = 0; v < kBlockVectors; ++v) {
    const vf minimum = a.minimum ? load(out + v * kWidth) : zero();
    store(out + v * kWidth, fmadd(steps, load(scale + v * kWidth), minimum));
  }
}

// The next smaller size of tile that there is a kernel for: 12 6 4 2 1, 8 4 2 1, or 3 2 1.
constexpr int smaller_tile(int tokens) { return tokens == 6 ? 4 : tokens == 3 ? 2 : tokens / 2; }

// What will be wanted after a segment's tiles; each of them asks for its share, for all at once would be more than the
// processor can have under way.
struct Ahead {
  const uint8_t* weights;  // of the next segment, block_stride bytes apart
  int64_t lines, block_stride;
  const char* y;  // where the first token's sums will go, the others' y_stride bytes apart; or null
  int64_t y_stride;
};

template <int kTokens, int kBlocks>
FASTLLM_INLINE void ask_ahead(Ahead& a, int64_t tiles_left) {
  const int64_t share = (a.lines + tiles_left - 1) / tiles_left;
  for (int64_t i = 0; i < share; ++i, a.weights += kLineBytes) {
    for (int b = 0; b < kBlocks; ++b) __builtin_prefetch(a.weights + b * a.block_stride, 0, 2);
  }
  a.lines -= share;
  for (int t = 0; a.y && t < kTokens; ++t, a.y += a.y_stride) {
    for (int b = 0; b < kBlocks; ++b) __builtin_prefetch(a.y + b * kLineBytes, 1);
  }
}

// y[row, n ...] = sums + bias, rounded once, for one row and the block of 16 columns that starts at n.
template <typename T>
FASTLLM_INLINE void store_columns(T* y, const T* bias, const float* sums, int64_t columns) {
  for (int v = 0; v < kBlockVectors; ++v) {
    const int64_t left = columns - v * kWidth;
    if (left <= 0) return;
    vf a = load(sums + v * kWidth);
    if (left >= kWidth) {
      if (bias) a = a + load(bias + v * kWidth);
      store(y + v * kWidth, a);
    } else {
      if (bias) a = a + load_n(bias + v * kWidth, left);
      store_n(y + v * kWidth, a, left);
    }
  }
}

// The same for `rows` rows from `first` on; their sums stand sums_stride apart.
void store_rows(const QuantMatmulArgs& a, int64_t first, int64_t rows, int64_t block, const float* sums,
                int64_t sums_stride) {
  const int64_t n = block * kBlockRows, columns = a.N - n < kBlockRows ? a.N - n : kBlockRows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first + r) * a.N + n;
#define FASTLLM_BODY(T)                                                                                              \
  store_columns(static_cast<decltype(T)*>(a.y) + at, a.bias ? static_cast<const decltype(T)*>(a.bias) + n : nullptr, \
                sums + r * sums_stride, columns)
    FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  }
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
