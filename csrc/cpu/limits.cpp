// Loops that reach a machine's limits, one a limit.
//
// read: eight chains of adds over a thread's own row. copy: the same row stored elsewhere (its bytes count twice: read
// and written); stream: past the caches. The arithmetic loops are the innermost tile of a matrix product: 4 vectors of
// one operand times 3 of the other, 12 chains of sums in registers, 7 loads from L1 a step. Both operands move with the
// step, so that no product can be hoisted out of the loop, and the sums are written to memory, so that no loop can be
// dropped.
#include "limits.h"

#include "parallel.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

float read_row(const float* p, int64_t n) {
  vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero(), s4 = zero(), s5 = zero(), s6 = zero(), s7 = zero();
  for (int64_t i = 0; i < n; i += 8 * kWidth) {
    s0 = s0 + load(p + i);
    s1 = s1 + load(p + i + kWidth);
    s2 = s2 + load(p + i + 2 * kWidth);
    s3 = s3 + load(p + i + 3 * kWidth);
    s4 = s4 + load(p + i + 4 * kWidth);
    s5 = s5 + load(p + i + 5 * kWidth);
    s6 = s6 + load(p + i + 6 * kWidth);
    s7 = s7 + load(p + i + 7 * kWidth);
  }
  return reduce_add(((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)));
}

template <bool kPastCaches>
void copy_row(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 4 * kWidth) {
    const pair a = load_pair(from + i), b = load_pair(from + i + 2 * kWidth);
    kPastCaches ? store_past_caches(to + i, a) : store_clean(to + i, a);
    kPastCaches ? store_past_caches(to + i + 2 * kWidth, b) : store_clean(to + i + 2 * kWidth, b);
  }
  if (kPastCaches) end_past_caches();
}

// What the arithmetic loop multiplies. kOperations: multiplications and additions of one dot(). kRows: of its tile.
struct Fp32 {
  using Operand = vf;
  using Sum = vf;
  static constexpr int64_t kOperations = 2 * kWidth;
  static constexpr int kRows = 4;
  FASTLLM_INLINE Sum zeros() { return zero(); }
  FASTLLM_INLINE Operand at(const float* p) { return load(p); }
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) { return fmadd(x, y, sum); }
  FASTLLM_INLINE Sum add(Sum a, Sum b) { return a + b; }
  FASTLLM_INLINE float total(Sum a) { return reduce_add(a); }
};

// Unsigned times signed bytes, four neighbours added into each 32-bit lane.
#if FASTLLM_ISA_LEVEL >= 2
struct Int8 {
  using Operand = __m512i;
  using Sum = __m512i;
  static constexpr int64_t kOperations = 2 * 64;
  static constexpr int kRows = 4;
  FASTLLM_INLINE Sum zeros() { return _mm512_setzero_si512(); }
  FASTLLM_INLINE Operand at(const float* p) { return _mm512_loadu_si512(p); }
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) {
#if FASTLLM_ISA_LEVEL >= 3
    sum = _mm512_dpbusd_epi32(sum, x, y);
#if defined(__AVX512F__)  // not where it is emulated
    asm("" : "+v"(sum));  // else GCC moves sums from register to register, which costs a third
#endif
    return sum;
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(x, y), _mm512_set1_epi16(1)));
#endif
  }
  FASTLLM_INLINE Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  FASTLLM_INLINE float total(Sum a) { return reduce_add(vf{_mm512_cvtepi32_ps(a)}); }
};
#elif FASTLLM_ISA_LEVEL == 1
struct Int8 {
  using Operand = __m256i;
  using Sum = __m256i;
  static constexpr int64_t kOperations = 2 * 32;
  static constexpr int kRows = 4;
  FASTLLM_INLINE Sum zeros() { return _mm256_setzero_si256(); }
  FASTLLM_INLINE Operand at(const float* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)));
  }
  FASTLLM_INLINE Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  FASTLLM_INLINE float total(Sum a) { return reduce_add(vf{_mm256_cvtepi32_ps(a)}); }
};
#else
struct Int8 {
  using Operand = uint32_t;  // one byte, widened
  using Sum = uint32_t;      // unsigned, because it wraps
  static constexpr int64_t kOperations = 2;
  static constexpr int kRows = 4;
  FASTLLM_INLINE Sum zeros() { return 0; }
  FASTLLM_INLINE Operand at(const float* p) { return *reinterpret_cast<const unsigned char*>(p); }
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) { return sum + x * y; }
  FASTLLM_INLINE Sum add(Sum a, Sum b) { return a + b; }
  FASTLLM_INLINE float total(Sum a) { return static_cast<float>(a); }
};
#endif

// Bytes by 4-bit integers: as int8 where a dot product is one instruction, else pairs summed in 16 bits. What widens
// those sums every 32 columns is left out: a peak.
struct Int4 : Int8 {
#if FASTLLM_ISA_LEVEL == 1
  static constexpr int kRows = 3;
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) {
    // In place: left to itself, GCC moves sums from register to register and to the stack.
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(x, y)));
    return sum;
  }
#elif FASTLLM_ISA_LEVEL == 2
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(x, y)); }
#endif
};

#if FASTLLM_ISA_LEVEL >= 4
struct Bf16 {
  using Operand = __m512bh;
  using Sum = __m512;
  static constexpr int64_t kOperations = 2 * 32;
  static constexpr int kRows = 4;
  FASTLLM_INLINE Sum zeros() { return _mm512_setzero_ps(); }
  FASTLLM_INLINE Operand at(const float* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FASTLLM_INLINE Sum dot(Operand x, Operand y, Sum sum) { return _mm512_dpbf16_ps(sum, x, y); }
  FASTLLM_INLINE Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  FASTLLM_INLINE float total(Sum a) { return reduce_add(vf{a}); }
};
#endif

// s[i][j] += x[i] * y[j], 4 x 3, spelled out so that all twelve sums stay in registers with every compiler; 3 x 3 for
// Int4 on AVX2, which is the faster one there. Returns the operations done.
template <typename T>
int64_t tile_steps(const float* tiles, int64_t steps, float* out) {
  typename T::Sum s00 = T::zeros(), s01 = s00, s02 = s00, s10 = s00, s11 = s00, s12 = s00;
  typename T::Sum s20 = s00, s21 = s00, s22 = s00, s30 = s00, s31 = s00, s32 = s00;
  for (int64_t step = 0; step < steps; ++step) {
    const float* x = tiles + (step & 7) * kWidth;
    const float* y = tiles + kTileFloats / 2 + (step & 7) * kWidth;
    const typename T::Operand y0 = T::at(y), y1 = T::at(y + kWidth), y2 = T::at(y + 2 * kWidth);
    typename T::Operand v = T::at(x);
    s00 = T::dot(v, y0, s00), s01 = T::dot(v, y1, s01), s02 = T::dot(v, y2, s02);
    v = T::at(x + kWidth);
    s10 = T::dot(v, y0, s10), s11 = T::dot(v, y1, s11), s12 = T::dot(v, y2, s12);
    v = T::at(x + 2 * kWidth);
    s20 = T::dot(v, y0, s20), s21 = T::dot(v, y1, s21), s22 = T::dot(v, y2, s22);
    if constexpr (T::kRows == 4) {
      v = T::at(x + 3 * kWidth);
      s30 = T::dot(v, y0, s30), s31 = T::dot(v, y1, s31), s32 = T::dot(v, y2, s32);
    }
  }
  const typename T::Sum first = T::add(T::add(s00, s01), T::add(s02, s10));
  const typename T::Sum second = T::add(T::add(s11, s12), T::add(s20, s21));
  const typename T::Sum third = T::add(T::add(s22, s30), T::add(s31, s32));
  *out = T::total(T::add(first, T::add(second, third)));
  return steps * 3 * T::kRows * T::kOperations;
}

// One thread's share: streams its own row, or runs the arithmetic loop on the shared tiles.
int64_t run_one(const LimitsArgs& a, int64_t thread) {
  const float* from = a.from + thread * a.floats;
  float* sum = a.sums + thread;
  switch (a.limit) {
    case Limit::read:
      for (int64_t i = 0; i < a.repeats; ++i) *sum += read_row(from, a.floats);
      return a.repeats * a.floats * 4;
    case Limit::copy:
      for (int64_t i = 0; i < a.repeats; ++i) copy_row<false>(from, a.to + thread * a.floats, a.floats);
      return a.repeats * a.floats * 8;
    case Limit::stream:
      for (int64_t i = 0; i < a.repeats; ++i) copy_row<true>(from, a.to + thread * a.floats, a.floats);
      return a.repeats * a.floats * 8;
    case Limit::fp32:
      return tile_steps<Fp32>(a.tiles, a.repeats, sum);
    case Limit::int8:
      return tile_steps<Int8>(a.tiles, a.repeats, sum);
    case Limit::int4:
      return tile_steps<Int4>(a.tiles, a.repeats, sum);
    case Limit::bf16:
#if FASTLLM_ISA_LEVEL >= 4
      return tile_steps<Bf16>(a.tiles, a.repeats, sum);
#else
      return 0;
#endif
  }
  return 0;
}

}  // namespace

void limits(const LimitsArgs& a) {
  parallel_for(a.threads, 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) a.work[thread] = run_one(a, thread);
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
