// The AVX-512 intrinsics on a machine that has only AVX2, for tests: this directory stands first on the include path of
// the emulated build's AVX-512 rungs (FASTLLM_EMULATE=1 in setup.py). SIMDe computes each intrinsic lane by lane or in
// 256-bit halves, with the semantics of Intel's manual. The compiler's own functions are seen too, but cannot be
// compiled without AVX-512: an intrinsic that neither SIMDe nor this file covers is a compile error, never a wrong
// result. The remedy is to add it below.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

// ---------------------------------------------------------------- what SIMDe 0.7.4 lacks

namespace emulated {
namespace {

// The lanes of any vector, and a vector of any lanes.
template <typename Lane, typename Vector>
struct Lanes {
  static constexpr int count = static_cast<int>(sizeof(Vector) / sizeof(Lane));
  Lane lane[count] = {};
  Lanes() = default;
  explicit Lanes(Vector v) { std::memcpy(lane, &v, sizeof v); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
};

// Element i of the result is element i of `a`, converted as C++ converts integers (widened or truncated).
template <typename To, typename Result, typename From, typename Vector>
inline Result converted(Vector a) {
  const Lanes<From, Vector> from(a);
  Lanes<To, Result> to;
  for (int i = 0; i < to.count && i < from.count; ++i) to.lane[i] = static_cast<To>(from.lane[i]);
  return to.vector();
}

// Memory is touched only where the mask has a bit, as the instructions do it.
template <typename Lane, typename Vector>
inline Vector masked_load(uint64_t mask, const void* p) {
  Lanes<Lane, Vector> to;
  for (int i = 0; i < to.count; ++i) {
    if (mask >> i & 1) std::memcpy(&to.lane[i], static_cast<const Lane*>(p) + i, sizeof(Lane));
  }
  return to.vector();
}
template <typename Lane, typename Vector>
inline void masked_store(void* p, uint64_t mask, Vector a) {
  const Lanes<Lane, Vector> from(a);
  for (int i = 0; i < from.count; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<Lane*>(p) + i, &from.lane[i], sizeof(Lane));
  }
}

inline __m256 low(__m512 a) { return Lanes<__m256, __m512>(a).lane[0]; }
inline __m256 high(__m512 a) { return Lanes<__m256, __m512>(a).lane[1]; }
template <typename Vector, typename Half>
inline Vector joined(Half low_half, Half high_half) {
  Lanes<Half, Vector> both;
  both.lane[0] = low_half;
  both.lane[1] = high_half;
  return both.vector();
}

// The instruction's own order: halves first, then quarters, ...
template <typename Lane, typename Vector, typename Combine>
inline Lane reduced(Vector a, Combine combine) {
  Lanes<Lane, Vector> all(a);
  for (int n = all.count / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) all.lane[i] = combine(all.lane[i], all.lane[i + n]);
  }
  return all.lane[0];
}

inline __m512 cvtph_ps(__m256i a) {
  return joined<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int kRounding>
inline __m256i cvtps_ph(__m512 a) {
  return joined<__m256i>(_mm256_cvtps_ph(low(a), kRounding & 7), _mm256_cvtps_ph(high(a), kRounding & 7));
}

// a * 2^floor(b) with one rounding. SIMDe has one, which flushes subnormals and overflows early.
inline __m512 scalef_ps(__m512 a, __m512 b) {
  Lanes<float, __m512> x(a);
  const Lanes<float, __m512> n(b);
  for (int i = 0; i < x.count; ++i) {
    const double power = n.lane[i] < -400 ? -400.0 : n.lane[i] > 400 ? 400.0 : static_cast<double>(n.lane[i]);
    x.lane[i] = n.lane[i] == n.lane[i]
                    ? static_cast<float>(static_cast<double>(x.lane[i]) * __builtin_exp2(__builtin_floor(power)))
                    : n.lane[i];
  }
  return x.vector();
}

// Even lanes subtract c, odd lanes add it.
inline __m512 fmaddsub_ps(__m512 a, __m512 b, __m512 c) {
  return joined<__m512>(_mm256_fmaddsub_ps(low(a), low(b), low(c)), _mm256_fmaddsub_ps(high(a), high(b), high(c)));
}

// Four lanes of a, two of b's quarters after two of a's, as the bits of control say.
template <int kControl>
inline __m512 shuffle_f32x4(__m512 a, __m512 b) {
  const Lanes<__m128, __m512> from_a(a), from_b(b);
  Lanes<__m128, __m512> to;
  for (int i = 0; i < 4; ++i) to.lane[i] = (i < 2 ? from_a : from_b).lane[kControl >> (2 * i) & 3];
  return to.vector();
}

// Each float in bits, through a function of them.
template <typename Of>
inline __m512 by_bits(__m512 a, Of of) {
  Lanes<uint32_t, __m512> lanes(a);
  for (int i = 0; i < lanes.count; ++i) lanes.lane[i] = of(lanes.lane[i]);
  return lanes.vector();
}

// a - round_half_even(a); infinities give 0.
inline __m512 reduce_ps(__m512 a) {
  Lanes<float, __m512> x(a);
  for (int i = 0; i < x.count; ++i) {
    x.lane[i] = __builtin_isinf(x.lane[i]) ? 0.0f : x.lane[i] - __builtin_floorf(x.lane[i]);
  }
  return x.vector();
}

// As far off as the instruction may be: cut after 14 bits.
inline __m512 rcp14_ps(__m512 a) {
  Lanes<float, __m512> x(a);
  for (int i = 0; i < x.count; ++i) x.lane[i] = 1.0f / x.lane[i];
  return by_bits(x.vector(), [](uint32_t bits) { return bits & ~0x1ffu; });
}

// To nearest even, subnormal numbers to 0, NaNs quiet.
inline uint32_t bf16_of(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return bits >> 16 | 0x40;
  if (magnitude < 0x00800000) return bits >> 16 & 0x8000;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline __m256i cvtneps_pbh(__m512 a) {
  const Lanes<uint32_t, __m512> from(by_bits(a, bf16_of));
  Lanes<uint16_t, __m256i> to;
  for (int i = 0; i < to.count; ++i) to.lane[i] = static_cast<uint16_t>(from.lane[i]);
  return to.vector();
}

}  // namespace
}  // namespace emulated

#define _mm512_cvtepu8_epi32(a) ::emulated::converted<int32_t, __m512i, uint8_t>(a)
#define _mm512_cvtepi8_epi32(a) ::emulated::converted<int32_t, __m512i, int8_t>(a)
#define _mm512_cvtepu16_epi32(a) ::emulated::converted<int32_t, __m512i, uint16_t>(a)
#define _mm512_cvtepi32_epi16(a) ::emulated::converted<int16_t, __m256i, int32_t>(a)
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(a) ::emulated::converted<int8_t, __m128i, int32_t>(a)
#define _mm512_cvtepi32_ps(a)                                                                    \
  ::emulated::joined<__m512>(_mm256_cvtepi32_ps(::emulated::Lanes<__m256i, __m512i>(a).lane[0]), \
                             _mm256_cvtepi32_ps(::emulated::Lanes<__m256i, __m512i>(a).lane[1]))
#define _mm512_cvtps_epi32(a) \
  ::emulated::joined<__m512i>(_mm256_cvtps_epi32(::emulated::low(a)), _mm256_cvtps_epi32(::emulated::high(a)))
#define _mm512_cvtph_ps(a) ::emulated::cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) ::emulated::cvtps_ph<rounding>(a)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps(a, b) ::emulated::scalef_ps(a, b)
#undef _mm512_madd_epi16  // SIMDe's alias has the masked variant's arguments
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_fmaddsub_ps(a, b, c) ::emulated::fmaddsub_ps(a, b, c)
#define _mm512_permute_ps(a, control)                                        \
  ::emulated::joined<__m512>(_mm256_permute_ps(::emulated::low(a), control), \
                             _mm256_permute_ps(::emulated::high(a), control))
#define _mm512_extractf32x8_ps(a, half) ::emulated::Lanes<__m256, __m512>(a).lane[half]

#define _mm512_srai_epi32(a, count)                                                                     \
  ::emulated::joined<__m512i>(_mm256_srai_epi32(::emulated::Lanes<__m256i, __m512i>(a).lane[0], count), \
                              _mm256_srai_epi32(::emulated::Lanes<__m256i, __m512i>(a).lane[1], count))
#define _mm512_extracti32x8_epi32(a, half) ::emulated::Lanes<__m256i, __m512i>(a).lane[half]
#define _mm512_extractf32x4_ps(a, quarter) ::emulated::Lanes<__m128, __m512>(a).lane[quarter]
#define _mm512_shuffle_f32x4(a, b, control) ::emulated::shuffle_f32x4<control>(a, b)
#define _mm512_reduce_ps(a, control) ::emulated::reduce_ps(a)  // down is what is asked for
#define _mm512_rcp14_ps(a) ::emulated::rcp14_ps(a)
#define _mm512_cvtneps_pbh(a) ::emulated::cvtneps_pbh(a)
#define _mm512_cvtne2ps_pbh(a, b) ::emulated::joined<__m512i>(::emulated::cvtneps_pbh(b), ::emulated::cvtneps_pbh(a))

#define _mm512_reduce_add_ps(a) ::emulated::reduced<float>(a, [](float x, float y) { return x + y; })
#define _mm512_reduce_max_ps(a) ::emulated::reduced<float>(a, [](float x, float y) { return x > y ? x : y; })
#define _mm512_reduce_max_epi32(a) ::emulated::reduced<int32_t>(a, [](int32_t x, int32_t y) { return x > y ? x : y; })
#define _mm512_reduce_add_epi32(a) ::emulated::reduced<int32_t>(a, [](int32_t x, int32_t y) { return x + y; })

#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, p) ::emulated::masked_load<float, __m512>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) ::emulated::masked_load<int16_t, __m256i>(mask, p)
#define _mm_maskz_loadu_epi8(mask, p) ::emulated::masked_load<int8_t, __m128i>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, a) ::emulated::masked_store<float>(p, mask, a)
#define _mm256_mask_storeu_epi16(p, mask, a) ::emulated::masked_store<int16_t>(p, mask, a)
#undef _mm_mask_storeu_epi8
#define _mm_mask_storeu_epi8(p, mask, a) ::emulated::masked_store<int8_t>(p, mask, a)

// Storing past the caches asks for alignment, which is kept; where it goes does not show.
#define _mm512_stream_ps(p, a) _mm512_store_ps(p, a)
#define _mm512_stream_si512(p, a) _mm512_store_si512(p, a)
