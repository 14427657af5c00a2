// Sixteen lanes: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kWidth = 16;

struct vf {
  __m512 v;
};
struct pair {
  vf first, second;
};

FASTLLM_INLINE __mmask16 lane_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

FASTLLM_INLINE vf widen(bf16, __m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FASTLLM_INLINE vf widen(f16, __m256i bits) { return {_mm512_cvtph_ps(bits)}; }

#if FASTLLM_ISA_LEVEL >= 4
// The processor's own conversion: to nearest even, NaNs stay NaNs, and numbers below 2^-126 become 0.
FASTLLM_INLINE __m256i narrow(bf16, vf a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
#else
FASTLLM_INLINE __m256i narrow(bf16, vf a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  // The carry would turn some NaNs into infinities: keep the top half and set the quiet bit instead.
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}
#endif
FASTLLM_INLINE __m256i narrow(f16, vf a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

// A NaN whose low half is zero stays one: the carry stops there.
FASTLLM_INLINE __m512i rounded_bits(vf a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

FASTLLM_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTLLM_INLINE vf load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
FASTLLM_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
FASTLLM_INLINE void store_n(float* p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }

template <typename Half>
FASTLLM_INLINE vf load(const Half* p) {
  return widen(Half{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <typename Half>
FASTLLM_INLINE vf load_n(const Half* p, int64_t n) {
  return widen(Half{}, _mm256_maskz_loadu_epi16(lane_mask(n), p));
}
template <typename Half>
FASTLLM_INLINE void store(Half* p, vf a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(Half{}, a));
}
// Even columns, then odd ones: a shift or a mask widens them.
FASTLLM_INLINE pair widen_pair(__m512i both) {
  const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(-65536));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))}, {_mm512_castsi512_ps(odd)}};
}
FASTLLM_INLINE __m512i narrow_pair(pair a) {
#if FASTLLM_ISA_LEVEL >= 4
  alignas(64) static constexpr uint16_t kInTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i evens_odds = (__m512i)_mm512_cvtne2ps_pbh(a.second.v, a.first.v);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), evens_odds);
#else
  const __m512i even = _mm512_srli_epi32(rounded_bits(a.first), 16);
  return _mm512_or_si512(even, _mm512_and_si512(rounded_bits(a.second), _mm512_set1_epi32(-65536)));
#endif
}
FASTLLM_INLINE pair load_pair(const bf16* p) { return widen_pair(_mm512_loadu_si512(p)); }
FASTLLM_INLINE void store_clean(bf16* p, pair a) { _mm512_storeu_si512(p, narrow_pair(a)); }
FASTLLM_INLINE void store_past_caches(float* p, pair a) {
  _mm512_stream_ps(p, a.first.v);
  _mm512_stream_ps(p + kWidth, a.second.v);
}
FASTLLM_INLINE void store_past_caches(bf16* p, pair a) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(a));
}
FASTLLM_INLINE void store_past_caches(f16* p, pair a) {
  __m256i* to = reinterpret_cast<__m256i*>(p);
  _mm256_stream_si256(to, narrow(f16{}, a.first));
  _mm256_stream_si256(to + 1, narrow(f16{}, a.second));
}
#if FASTLLM_ISA_LEVEL >= 4
// sum + the sixteen pairs of bf16 times the one pair at `two`.
FASTLLM_INLINE vf dot_pair(vf sum, __m512i pairs, const void* two) {
  int32_t both;
  std::memcpy(&both, two, sizeof both);
  __m512 to = _mm512_dpbf16_ps(sum.v, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(both));
#if defined(__AVX512F__)  // not where it is emulated
  asm("" : "+v"(to));     // GCC would move sums about
#endif
  return {to};
}
// 32 numbers, and sum + 32 such products, two in each lane.
struct words {
  __m512i v;
};
FASTLLM_INLINE words load_words(const bf16* p) { return {_mm512_loadu_si512(p)}; }
FASTLLM_INLINE vf dot_words(vf sum, words a, words b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
FASTLLM_INLINE pair round_clean(bf16, pair a) { return widen_pair(narrow_pair(a)); }
FASTLLM_INLINE vf round_clean(bf16, vf a) { return widen(bf16{}, narrow(bf16{}, a)); }

// Sixteen words of 32, those of each index, above zeros: one instruction widens them.
FASTLLM_INLINE vf widen_chosen(__m512i words, const uint16_t* of_each) {
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(of_each), words))};
}
// Columns 0 to 15, then 16 to 31: what the conversion stores without a permutation.
FASTLLM_INLINE pair load_ordered(const bf16* p) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                      0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  alignas(64) static constexpr uint16_t kSecond[32] = {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23,
                                                       0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31};
  const __m512i both = _mm512_loadu_si512(p);
  return {widen_chosen(both, kFirst), widen_chosen(both, kSecond)};
}
// Of a pair, whose columns are even and odd ones.
FASTLLM_INLINE pair round_ordered(bf16, pair a) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 0, 0, 16, 0, 1, 0, 17, 0, 2, 0, 18, 0, 3, 0, 19,
                                                      0, 4, 0, 20, 0, 5, 0, 21, 0, 6, 0, 22, 0, 7, 0, 23};
  alignas(64) static constexpr uint16_t kSecond[32] = {0, 8,  0, 24, 0, 9,  0, 25, 0, 10, 0, 26, 0, 11, 0, 27,
                                                       0, 12, 0, 28, 0, 13, 0, 29, 0, 14, 0, 30, 0, 15, 0, 31};
  const __m512i evens_odds = (__m512i)_mm512_cvtne2ps_pbh(a.second.v, a.first.v);
  return {widen_chosen(evens_odds, kFirst), widen_chosen(evens_odds, kSecond)};
}
FASTLLM_INLINE void store_ordered(bf16* p, pair a) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(a.second.v, a.first.v));
}
// Those of neighbours added first.
FASTLLM_INLINE vf add_normal_squares(vf sum, const bf16* p) {
  const __m512bh both = (__m512bh)_mm512_loadu_si512(p);
  return {_mm512_dpbf16_ps(sum.v, both, both)};
}
#else
FASTLLM_INLINE vf round_clean(bf16, vf a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(rounded_bits(a), _mm512_set1_epi32(-65536)))};
}
#endif
FASTLLM_INLINE vf round_clean(f16, vf a) { return widen(f16{}, narrow(f16{}, a)); }
FASTLLM_INLINE vf round_clean(float, vf a) { return a; }
template <typename Half>
FASTLLM_INLINE void store_n(Half* p, vf a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), narrow(Half{}, a));
}

FASTLLM_INLINE vf load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
FASTLLM_INLINE vf load_n(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lane_mask(n), p)))};
}
FASTLLM_INLINE void store(int8_t* p, vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
FASTLLM_INLINE void store_n(int8_t* p, vf a, int64_t n) {
  _mm_mask_storeu_epi8(p, lane_mask(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// The largest of n words without their signs, n a multiple of 32: magnitudes order like their bits. Still in lanes.
template <typename Half>
FASTLLM_INLINE __m256i largest_words(const Half* p, int64_t n) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(p + i), _mm512_set1_epi16(0x7fff));
    largest = _mm512_max_epu16(largest, bits);
  }
  return _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
}
// Of four groups, in the four lowest words.
template <typename Half>
FASTLLM_INLINE __m128i largest_words4(const Half* p, int64_t n) {
  const __m256i a = largest_words(p, n), b = largest_words(p + n, n);
  const __m256i c = largest_words(p + 2 * n, n), d = largest_words(p + 3 * n, n);
  const __m256i ab = _mm256_max_epu16(_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
  const __m256i cd = _mm256_max_epu16(_mm256_unpacklo_epi16(c, d), _mm256_unpackhi_epi16(c, d));
  const __m256i abcd = _mm256_max_epu16(_mm256_unpacklo_epi32(ab, cd), _mm256_unpackhi_epi32(ab, cd));
  const __m128i twice = _mm_max_epu16(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
  return _mm_max_epu16(twice, _mm_unpackhi_epi64(twice, twice));
}
FASTLLM_INLINE void max_magnitudes4(const bf16* p, int64_t n, float* largest) {
  const __m128i bits = _mm_slli_epi32(_mm_cvtepu16_epi32(largest_words4(p, n)), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(largest), bits);
}
FASTLLM_INLINE void max_magnitudes4(const f16* p, int64_t n, float* largest) {
  _mm_storeu_ps(largest, _mm_cvtph_ps(largest_words4(p, n)));
}

// Even and odd columns, as bytes in the order of the columns.
FASTLLM_INLINE __m256i merged_bytes(__m512i even, __m512i odd) {
  const __m512i low = _mm512_and_si512(even, _mm512_set1_epi32(0xff));
  return _mm512_cvtepi32_epi16(_mm512_or_si512(low, _mm512_slli_epi32(odd, 8)));
}
#if FASTLLM_ISA_LEVEL >= 3
// Integers' sums are dot products with ones.
struct int_sum {
  __m256i v;
};
FASTLLM_INLINE int_sum zero_sum() { return {_mm256_setzero_si256()}; }
FASTLLM_INLINE void reduce_add4(int_sum a, int_sum b, int_sum c, int_sum d, float* sums) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a.v, b.v), _mm256_unpackhi_epi32(a.v, b.v));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c.v, d.v), _mm256_unpackhi_epi32(c.v, d.v));
  const __m256i abcd = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m128i of_each = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
  _mm_storeu_ps(sums, _mm_cvtepi32_ps(of_each));
}
FASTLLM_INLINE int_sum store_bytes(int8_t* p, __m256i bytes, int_sum sum) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
  return {_mm256_dpbusd_epi32(sum.v, _mm256_set1_epi8(1), bytes)};
}
FASTLLM_INLINE int_sum store_rounded(bf16, int8_t* p, pair a, int_sum sum) {
  return store_bytes(p, merged_bytes(_mm512_cvtps_epi32(a.first.v), _mm512_cvtps_epi32(a.second.v)), sum);
}
template <typename T>
FASTLLM_INLINE int_sum store_rounded(T, int8_t* p, pair a, int_sum sum) {
  const __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.first.v));
  const __m128i second = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.second.v));
  return store_bytes(p, _mm256_set_m128i(second, first), sum);
}
#else
FASTLLM_INLINE vf store_rounded(bf16, int8_t* p, pair a, vf sum) {
  const __m512i even = _mm512_cvtps_epi32(a.first.v), odd = _mm512_cvtps_epi32(a.second.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), merged_bytes(even, odd));
  return {_mm512_add_ps(sum.v, _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)))};
}
#endif

// Four vectors, one after the other.
FASTLLM_INLINE void store4(int8_t* p, vf a, vf b, vf c, vf d) {
  store(p, a);
  store(p + kWidth, b);
  store(p + 2 * kWidth, c);
  store(p + 3 * kWidth, d);
}

FASTLLM_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
FASTLLM_INLINE vf zero() { return {_mm512_setzero_ps()}; }
FASTLLM_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTLLM_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTLLM_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTLLM_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTLLM_INLINE vf fmadd(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTLLM_INLINE vf fnmadd(vf a, vf b, vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// a * b - c in even lanes, a * b + c in odd ones; (1, 0, 3, 2, ...): a product of complex numbers, with lanes in pairs.
FASTLLM_INLINE vf fmaddsub(vf a, vf b, vf c) { return {_mm512_fmaddsub_ps(a.v, b.v, c.v)}; }
FASTLLM_INLINE vf swap_pairs(vf a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
FASTLLM_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTLLM_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }

// The bits of magnitudes order like their values.
FASTLLM_INLINE vf max_magnitude(vf a, vf b) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_castps_si512(b.v)))};
}
FASTLLM_INLINE float reduce_max_magnitude(vf a) {
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a.v));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}

FASTLLM_INLINE __m256i halves_max(vf a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  return _mm256_max_epi32(_mm512_castsi512_si256(bits), _mm512_extracti32x8_epi32(bits, 1));
}
FASTLLM_INLINE void reduce_max_magnitude4(vf a, vf b, vf c, vf d, float* largest) {
  store_max4(halves_max(a), halves_max(b), halves_max(c), halves_max(d), largest);
}

FASTLLM_INLINE float reduce_add(vf a) { return _mm512_reduce_add_ps(a.v); }
// The four sums, one after the other. This and the next one add halves, then neighbours, then pairs, then quarters: a
// sum's bits do not depend on how many are made together.
FASTLLM_INLINE void reduce_add4(vf a, vf b, vf c, vf d, float* sums) {
  const __m256 a8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m256 b8 = _mm256_add_ps(_mm512_castps512_ps256(b.v), _mm512_extractf32x8_ps(b.v, 1));
  const __m256 c8 = _mm256_add_ps(_mm512_castps512_ps256(c.v), _mm512_extractf32x8_ps(c.v, 1));
  const __m256 d8 = _mm256_add_ps(_mm512_castps512_ps256(d.v), _mm512_extractf32x8_ps(d.v, 1));
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a8, b8), _mm256_hadd_ps(c8, d8));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
// Neighbours within quarters: a's two sums, then b's.
FASTLLM_INLINE __m512 neighbours_sum(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
// Sixteen sums for half of the shuffles of four times four.
FASTLLM_INLINE void reduce_add16(const vf* a, float* sums, int64_t apart) {
  __m512 halves[8], neighbours[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // of vectors i, i, i + 8, i + 8
    halves[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(a[i].v, a[i + 8].v, 0x44), _mm512_shuffle_f32x4(a[i].v, a[i + 8].v, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) neighbours[i] = neighbours_sum(halves[2 * i], halves[2 * i + 1]);
  const __m512 low = neighbours_sum(neighbours[0], neighbours[1]);
  const __m512 high = neighbours_sum(neighbours[2], neighbours[3]);
  const __m512 of_all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  _mm_storeu_ps(sums, _mm512_castps512_ps128(of_all));
  _mm_storeu_ps(sums + 2 * apart, _mm512_extractf32x4_ps(of_all, 1));
  _mm_storeu_ps(sums + apart, _mm512_extractf32x4_ps(of_all, 2));
  _mm_storeu_ps(sums + 3 * apart, _mm512_extractf32x4_ps(of_all, 3));
}
FASTLLM_INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps(a.v); }

FASTLLM_INLINE vf round_nearest(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n; subnormal and infinite results come out right.
FASTLLM_INLINE vf scale_by_power(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// The lowest nine bits of a, as the sign and exponent of a float without mantissa.
FASTLLM_INLINE vf low_bits_to_exponent(vf a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
// a less the whole number below it, and 0 for infinities.
FASTLLM_INLINE vf rest_of_below(vf a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// a * 2^n of the whole number n below b, which may be infinite.
FASTLLM_INLINE vf scale_by_power_below(vf a, vf b) { return {_mm512_scalef_ps(a.v, b.v)}; }
// 1 / a for a of at least 1, within 2^-14 for bf16 and 2^-22 for f16; 0 for infinity, which must not enter the Newton
// step.
FASTLLM_INLINE vf reciprocal_coarse(bf16, vf a) { return {_mm512_rcp14_ps(a.v)}; }
FASTLLM_INLINE vf reciprocal_coarse(f16, vf a) {
  const vf guess = {_mm512_rcp14_ps(a.v)};
  return fmadd(guess, fnmadd(min(set1(0x1p127f), a), guess, set1(1.0f)), guess);
}
// 2^n for integral n in [-127, 127], and 0 for -127.
FASTLLM_INLINE vf power_of_two(vf n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
