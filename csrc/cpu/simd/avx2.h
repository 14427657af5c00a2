// Eight lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kWidth = 8;

struct vf {
  __m256 v;
};
struct pair {
  vf first, second;
};

// All ones in the first n lanes.
FASTLLM_INLINE __m256i lane_mask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FASTLLM_INLINE vf widen(bf16, __m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
FASTLLM_INLINE vf widen(f16, __m128i bits) { return {_mm256_cvtph_ps(bits)}; }

FASTLLM_INLINE __m128i narrow(bf16, vf a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  // The carry would turn some NaNs into infinities: keep the top half and set the quiet bit instead.
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
FASTLLM_INLINE __m128i narrow(f16, vf a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

// See simd.h. A NaN whose low half is zero stays one: the carry stops there.
FASTLLM_INLINE __m256i rounded_bits(vf a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
FASTLLM_INLINE vf round_clean(bf16, vf a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(rounded_bits(a), _mm256_set1_epi32(-65536)))};
}
FASTLLM_INLINE vf round_clean(f16, vf a) { return widen(f16{}, narrow(f16{}, a)); }
FASTLLM_INLINE vf round_clean(float, vf a) { return a; }

FASTLLM_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTLLM_INLINE vf load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
FASTLLM_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
FASTLLM_INLINE void store_n(float* p, vf a, int64_t n) { _mm256_maskstore_ps(p, lane_mask(n), a.v); }

FASTLLM_INLINE vf store_rounded(bf16, int8_t* p, pair a, vf sum) {
  const __m256i even = _mm256_cvtps_epi32(a.first.v), odd = _mm256_cvtps_epi32(a.second.v);
  const __m256i low = _mm256_set1_epi32(0xff);
  const __m256i both = _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi32(_mm256_and_si256(odd, low), 8));
  const __m128i bytes = _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  return {_mm256_add_ps(sum.v, _mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)))};
}

template <typename Half>
FASTLLM_INLINE vf load(const Half* p) {
  return widen(Half{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTLLM_INLINE vf load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
FASTLLM_INLINE void store(int8_t* p, vf a) {
  const __m256i q = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
// Four vectors, one after the other.
FASTLLM_INLINE void store4(int8_t* p, vf a, vf b, vf c, vf d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within halves
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
}
// AVX2 has no masked access to 16-bit lanes: partial vectors go through a buffer.
template <typename Half>
FASTLLM_INLINE vf load_n(const Half* p, int64_t n) {
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(Half));
  return widen(Half{}, _mm_load_si128(reinterpret_cast<const __m128i*>(buffer)));
}
template <typename Half>
FASTLLM_INLINE void store(Half* p, vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(Half{}, a));
}
// Even columns, then odd ones: a shift or a mask widens them, a blend packs them.
FASTLLM_INLINE pair load_pair(const bf16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(-65536));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))}, {_mm256_castsi256_ps(odd)}};
}
FASTLLM_INLINE __m256i narrow_pair(pair a) {
  const __m256i even = _mm256_srli_epi32(rounded_bits(a.first), 16), odd = rounded_bits(a.second);
  return _mm256_blend_epi16(even, odd, 0xaa);
}
FASTLLM_INLINE void store_clean(bf16* p, pair a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pair(a)); }
FASTLLM_INLINE void store_past_caches(float* p, pair a) {
  _mm256_stream_ps(p, a.first.v);
  _mm256_stream_ps(p + kWidth, a.second.v);
}
FASTLLM_INLINE void store_past_caches(bf16* p, pair a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(a));
}
FASTLLM_INLINE void store_past_caches(f16* p, pair a) {
  __m128i* to = reinterpret_cast<__m128i*>(p);
  _mm_stream_si128(to, narrow(f16{}, a.first));
  _mm_stream_si128(to + 1, narrow(f16{}, a.second));
}
template <typename Half>
FASTLLM_INLINE void store_n(Half* p, vf a, int64_t n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow(Half{}, a));
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(Half));
}

FASTLLM_INLINE vf load_n(const int8_t* p, int64_t n) {
  int8_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n));
  return load(buffer);
}
FASTLLM_INLINE void store_n(int8_t* p, vf a, int64_t n) {
  int8_t buffer[8];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<size_t>(n));
}

FASTLLM_INLINE vf set1(float x) { return {_mm256_set1_ps(x)}; }
FASTLLM_INLINE vf zero() { return {_mm256_setzero_ps()}; }
FASTLLM_INLINE vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTLLM_INLINE vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTLLM_INLINE vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTLLM_INLINE vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTLLM_INLINE vf fmadd(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTLLM_INLINE vf fnmadd(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
// a * b - c in even lanes, a * b + c in odd ones; (1, 0, 3, 2, ...): a product of complex numbers, with lanes in pairs.
FASTLLM_INLINE vf fmaddsub(vf a, vf b, vf c) { return {_mm256_fmaddsub_ps(a.v, b.v, c.v)}; }
FASTLLM_INLINE vf swap_pairs(vf a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
FASTLLM_INLINE vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTLLM_INLINE vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }

// The bits of magnitudes order like their values.
FASTLLM_INLINE vf max_magnitude(vf a, vf b) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff));
  return {_mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_castps_si256(b.v)))};
}
FASTLLM_INLINE float reduce_max_magnitude(vf a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1))));
}

FASTLLM_INLINE void reduce_max_magnitude4(vf a, vf b, vf c, vf d, float* largest) {
  store_max4(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v), _mm256_castps_si256(c.v), _mm256_castps_si256(d.v),
             largest);
}

FASTLLM_INLINE float reduce_add(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// The four sums, one after the other.
FASTLLM_INLINE void reduce_add4(vf a, vf b, vf c, vf d, float* sums) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
FASTLLM_INLINE void reduce_add16(const vf* a, float* sums, int64_t apart) {
  for (int i = 0; i < 4; ++i) reduce_add4(a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], sums + i * apart);
}
FASTLLM_INLINE float reduce_max(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FASTLLM_INLINE vf round_nearest(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n in [-252, 252]; two steps, so that results may be subnormal or infinite.
FASTLLM_INLINE vf scale_by_power(vf a, vf n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}
// The lowest nine bits of a, as the sign and exponent of a float without mantissa.
FASTLLM_INLINE vf low_bits_to_exponent(vf a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
// 1 / a for a of at least 1 within 2^-22; 0 for infinity, which must not enter the Newton step.
template <typename T>
FASTLLM_INLINE vf reciprocal_coarse(T, vf a) {
  const vf guess = {_mm256_rcp_ps(a.v)};
  return fmadd(guess, fnmadd(min(set1(0x1p127f), a), guess, set1(1.0f)), guess);
}
// 2^n for integral n in [-127, 127], and 0 for -127.
FASTLLM_INLINE vf power_of_two(vf n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
