// One vector type, `vf`, of kWidth floats, for the rung that this file is being compiled for (FASTLLM_ISA names it).
//
// Kernels are written once over these names and compiled once a rung:
//   load / store (float, bf16, f16 or int8_t in memory, float in registers), load_n / store_n (the first n lanes; the
//   rest reads as 0), set1, zero, + - * /, fmadd(a, b, c) = a * b + c, fnmadd(a, b, c) = c - a * b, max, min,
//   reduce_add, reduce_add4 and reduce_add16 (so many vectors at once, the latter's fours apart), reduce_max,
//   max_magnitude(a, b) = max(|a|, b) for b from it or 0, with infinities and NaN on top, reduce_max_magnitude, store4
//   (four vectors, to int8_t), low_bits_to_exponent, power_of_two, reciprocal_coarse, exp, exp2, sigmoid, tanh;
//   fmaddsub and swap_pairs where there are pairs of lanes (not scalar), so reduce_max_magnitude4, max_magnitudes4 and
//   divide4, rest_of_below and scale_by_power_below on AVX-512.
// Stores round to nearest even; what goes to int8_t must be finite and is at most 127. max(a, b) and min(a, b) return b
// where either is NaN, as the x86 instructions do.
//
// A pair is 2 kWidth neighbours in two vectors, in the order that suits their dtype: load_pair and store_clean agree on
// it, so it is for what treats all columns alike.
//
// An ordered pair has its columns in the order that is cheapest to store: load_ordered and store_ordered agree on it,
// and round_ordered makes one of a pair.
//
// round_clean(T{}, a) is a vector or pair rounded to T and kept as floats, store_clean(p, pair) stores a pair: cheaper
// than narrowing and widening, and than store, for values whose NaNs have zeros in their low halves, as those made of
// bf16 or f16 have and the processor's own.
//
// store_past_caches(p, pair) is store_clean to whole cache lines that nothing reads soon; end_past_caches() after the
// last one, before another thread may look.
//
// Include it inside nothing; it opens fastllm::cpu::<rung> and an unnamed namespace itself, so that every function has
// internal linkage. Kernel files must not call inline functions or templates of the standard library: those have
// external linkage, and the linker may keep the AVX-512 copy for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../types.h"

#if defined(__GNUC__)
#define FASTLLM_INLINE static inline __attribute__((always_inline))
#else
#define FASTLLM_INLINE static inline
#endif

#if !defined(FASTLLM_ISA)
#error "FASTLLM_ISA names the rung: scalar, avx2, avx512, avx512_vnni or avx512_bf16"
#endif

#if FASTLLM_ISA_LEVEL >= 1
#include <immintrin.h>

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// The largest 32-bit integer of each, one after the other.
FASTLLM_INLINE void store_max4(__m256i a, __m256i b, __m256i c, __m256i d, float* largest) {
  const __m256i ab = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_max_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  const __m256i abcd = _mm256_max_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m128i of_each = _mm_max_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(largest), of_each);
}
// by / a[i] and a[i] / by. False where an a[i] is below `least` or not finite.
FASTLLM_INLINE bool divide4(float by, const float* a, float least, float* inverse, float* quotient) {
  const __m128 of = _mm_loadu_ps(a), b = _mm_set1_ps(by);
  _mm_storeu_ps(inverse, _mm_div_ps(b, of));
  _mm_storeu_ps(quotient, _mm_div_ps(of, b));
  const __m128 inside =
      _mm_and_ps(_mm_cmpge_ps(of, _mm_set1_ps(least)), _mm_cmplt_ps(of, _mm_set1_ps(__builtin_inff())));
  return _mm_movemask_ps(inside) == 15;
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
#endif

// 0 scalar, 1 avx2, 2 avx512, 3 avx512_vnni, 4 avx512_bf16: the same order as enum class Isa.
#if FASTLLM_ISA_LEVEL >= 2
#include "avx512.h"
#elif FASTLLM_ISA_LEVEL == 1
#include "avx2.h"
#else
#include "scalar.h"
#endif

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <typename T>
FASTLLM_INLINE pair load_pair(const T* p) {
  return {load(p), load(p + kWidth)};
}
template <typename T>
FASTLLM_INLINE void store_clean(T* p, pair a) {
  store(p, a.first);
  store(p + kWidth, a.second);
}
#if FASTLLM_ISA_LEVEL >= 1
FASTLLM_INLINE void end_past_caches() { _mm_sfence(); }
#else
template <typename T>
FASTLLM_INLINE void store_past_caches(T* p, pair a) {
  store_clean(p, a);
}
FASTLLM_INLINE void end_past_caches() {}
#endif

#if FASTLLM_ISA_LEVEL >= 1
// The largest magnitudes of four groups of n numbers, one after the other, n a multiple of 2 kWidth.
template <typename T>
FASTLLM_INLINE void max_magnitudes4(const T* p, int64_t n, float* largest) {
  vf of[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    vf first = zero(), second = zero();
    for (int64_t i = g * n; i < (g + 1) * n; i += 2 * kWidth) {
      const pair two = load_pair(p + i);
      first = max_magnitude(two.first, first);
      second = max_magnitude(two.second, second);
    }
    of[g] = max_magnitude(first, second);
  }
  reduce_max_magnitude4(of[0], of[1], of[2], of[3], largest);
}
#endif
// store_rounded puts a pair of load_pair(T) into int8, in the order of the columns; their sum joins `sum`, an int_sum.
#if FASTLLM_ISA_LEVEL < 3
using int_sum = vf;
FASTLLM_INLINE int_sum zero_sum() { return zero(); }
template <typename T>
FASTLLM_INLINE int_sum store_rounded(T, int8_t* p, pair a, int_sum sum) {
  const vf first = round_nearest(a.first), second = round_nearest(a.second);
  store(p, first);
  store(p + kWidth, second);
  return sum + (first + second);
}
#endif
template <typename T>
FASTLLM_INLINE pair round_clean(T, pair a) {
  return {round_clean(T{}, a.first), round_clean(T{}, a.second)};
}
template <typename T>
FASTLLM_INLINE pair load_ordered(const T* p) {
  return load_pair(p);
}
template <typename T>
FASTLLM_INLINE pair round_ordered(T, pair a) {
  return round_clean(T{}, a);
}
template <typename T>
FASTLLM_INLINE void store_ordered(T* p, pair a) {
  store_clean(p, a);
}
// sum + the squares of 2 kWidth numbers.
template <typename T>
FASTLLM_INLINE vf add_squares(vf sum, const T* p) {
  const pair a = load_pair(p);
  return fmadd(a.second, a.second, fmadd(a.first, a.first, sum));
}
// The same, but that squares below 2^-126 may count as 0.
template <typename T>
FASTLLM_INLINE vf add_normal_squares(vf sum, const T* p) {
  return add_squares(sum, p);
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA

#include "math.h"
