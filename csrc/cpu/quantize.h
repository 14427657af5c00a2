// Activations, and keys and values, rounded to int8: the one place where the CPU does it, so that the integers of a
// norm or a gate are to the bit those that quant_matmul finds itself. Include after simd/simd.h; the same rules hold
// (internal linkage only).
//
//   amax = max|x| of the group; scale = amax / 127; q = round_half_even(x * (127 / amax)), all in fp32
//
// A group whose amax is below 2^-100 counts as zero (127 / amax must be finite); one that holds an infinity or a NaN
// gets the scale NaN, so that whoever multiplies by it notices.
#pragma once

#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

struct Int8Group {
  float scale;  // real value per integer step
  float sum;    // of the integers, exact up to 2^24 / 127 of them
};

// x[0 .. n) -> q[0 .. n).
template <typename T>
FASTLLM_INLINE Int8Group quantize_group(const T* x, int64_t n, int8_t* q) {
  constexpr int64_t kStep = 4 * kWidth;
  vf largest = zero();
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const vf first = max_magnitude(load(x + i), max_magnitude(load(x + i + kWidth), zero()));
    const vf second = max_magnitude(load(x + i + 2 * kWidth), max_magnitude(load(x + i + 3 * kWidth), zero()));
    largest = max_magnitude(first, max_magnitude(second, largest));
  }
  for (; i < n; i += kWidth) largest = max_magnitude(load_n(x + i, n - i < kWidth ? n - i : kWidth), largest);
  const float amax = reduce_max_magnitude(largest);
  const bool finite = amax - amax == 0.0f;
  if (!finite || amax < 0x1p-100f) {
    for (i = 0; i < n; ++i) q[i] = 0;
    return {finite ? 0.0f : __builtin_nanf(""), 0.0f};
  }
  const vf inverse = set1(127.0f / amax);
  vf sum = zero();
  for (i = 0; i + kStep <= n; i += kStep) {
    vf r[4];
    for (int j = 0; j < 4; ++j) r[j] = round_nearest(load(x + i + j * kWidth) * inverse);
    store4(q + i, r[0], r[1], r[2], r[3]);
    sum = sum + ((r[0] + r[1]) + (r[2] + r[3]));
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    const vf r = round_nearest(load_n(x + i, left) * inverse);
    store_n(q + i, r, left);
    sum = sum + r;
  }
  return {amax / 127.0f, reduce_add(sum)};
}

#if FASTLLM_ISA_LEVEL >= 1
// Four groups of n numbers, one after the other, n a multiple of 2 kWidth: the reductions and divisions of all four
// together. False, and nothing done, where one of them is zero or not finite.
template <typename T>
FASTLLM_INLINE bool quantize_four(const T* x, int64_t n, int8_t* q, float* groups) {
  float amax[4], inverse[4], scales[4], sums[4];
  max_magnitudes4(x, n, amax);
  if (!divide4(127.0f, amax, 0x1p-100f, inverse, scales)) return false;
  int_sum sum[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const vf scale = set1(inverse[g]);
    sum[g] = zero_sum();
    for (int64_t i = 0; i < n; i += 2 * kWidth) {
      const pair two = load_pair(x + g * n + i);
      sum[g] = store_rounded(T{}, q + g * n + i, {two.first * scale, two.second * scale}, sum[g]);
    }
  }
  reduce_add4(sum[0], sum[1], sum[2], sum[3], sums);
  for (int g = 0; g < 4; ++g) {
    groups[2 * g] = scales[g];
    groups[2 * g + 1] = sums[g];
  }
  return true;
}
#endif

// The groups of x[0 .. n) one after the other; the last may be short. groups: (scale, sum) of each.
template <typename T>
FASTLLM_INLINE void quantize_groups(const T* x, int64_t n, int64_t group_size, int8_t* q, float* groups) {
  int64_t i = 0;
#if FASTLLM_ISA_LEVEL >= 1
  const int64_t four = group_size % (2 * kWidth) == 0 ? 4 * group_size : n + 1;
  for (; i + four <= n && quantize_four(x + i, group_size, q + i, groups); i += four) groups += 8;
#endif
  for (; i < n; i += group_size) {
    const Int8Group group = quantize_group(x + i, n - i < group_size ? n - i : group_size, q + i);
    *groups++ = group.scale;
    *groups++ = group.sum;
  }
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
