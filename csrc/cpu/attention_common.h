// What the two attention kernels share: which keys a query sees, and the units of scores.
//
// The weight of a score s in a row of maximum m is 2^((s - m) c). In a plain call s is q . k itself and c holds the
// scale: nothing is rounded before the difference is taken, where rounding would cost most. With a softcap, a mask or
// sinks, s is the scaled score and c is log2(e).
#pragma once

#include "../rows.h"
#include "attention_args.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.402823466e+38f;  // the lowest finite float

FASTLLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLLM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FASTLLM_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

FASTLLM_INLINE int64_t num_keys(const AttentionArgs& a, int64_t b) {
  if (a.kv_lens == nullptr) return a.S;
  const int64_t at = b * a.kv_lens_stride;
  const int64_t n = a.kv_lens_dtype == DType::i32 ? static_cast<const int32_t*>(a.kv_lens)[at]
                                                  : static_cast<const int64_t*>(a.kv_lens)[at];
  return least(most(n, 0), a.S);
}

// Keys [begin, end) that query token t sees before any mask; begin >= end if it sees none. Both grow with t.
struct Range {
  int64_t begin, end;
};
FASTLLM_INLINE Range visible(const AttentionArgs& a, int64_t keys, int64_t t) {
  const int64_t position = keys - a.T + t;  // the queries are the last T tokens of `keys`
  Range r = {0, keys};
  if (a.causal) r.end = least(keys, position + 1);
  if (a.window > 0) {
    r.begin = most(0, position - a.window + 1);
    r.end = least(r.end, position + a.window);
  }
  return r;
}

// Whether scores are scaled before the softmax; by 0 too, where c would turn a masked score into NaN.
FASTLLM_INLINE bool scaled_first(const AttentionArgs& a) {
  return a.softcap > 0 || a.mask != nullptr || a.sinks != nullptr || a.scale == 0.0f;
}
FASTLLM_INLINE float weight_exponent(const AttentionArgs& a) {
  return scaled_first(a) ? kLog2e : __builtin_fabsf(a.scale) * kLog2e;
}
// Where c is |scale| log2(e), the scale's sign goes to q.
FASTLLM_INLINE float q_factor(const AttentionArgs& a) { return scaled_first(a) || a.scale > 0 ? 1.0f : -1.0f; }
// n scores q . k become scaled, and capped; n is a multiple of kWidth.
FASTLLM_INLINE void scale_scores(const AttentionArgs& a, float* scores, int64_t n) {
  if (a.softcap > 0) {
    const vf inner = set1(a.scale / a.softcap), outer = set1(a.softcap);
    for (int64_t i = 0; i < n; i += kWidth) store(scores + i, tanh(load(scores + i) * inner) * outer);
  } else if (scaled_first(a)) {
    const vf scale = set1(a.scale);
    for (int64_t i = 0; i < n; i += kWidth) store(scores + i, load(scores + i) * scale);
  }
}

// mask[b, h, t, s0 .. s0 + n) as numbers to add to scores.
template <typename Mask>
FASTLLM_INLINE void widen_mask(const Mask* mask, int64_t stride, int64_t n, float* bias) {
  int64_t s = 0;
  if (stride == 1) {
    for (; s + kWidth <= n; s += kWidth) store(bias + s, load(mask + s));
    if (s < n) store_n(bias + s, load_n(mask + s, n - s), n - s);
  } else {
    for (; s < n; ++s) store_n(bias + s, load_n(mask + s * stride, 1), 1);
  }
}
FASTLLM_INLINE void mask_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t t, int64_t s0, int64_t n,
                             float* bias) {
  const int64_t stride = a.mask_strides[3];
  const int64_t at = b * a.mask_strides[0] + h * a.mask_strides[1] + t * a.mask_strides[2] + s0 * stride;
  if (a.mask_dtype == DType::boolean) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + at;
    for (int64_t s = 0; s < n; ++s) bias[s] = mask[s * stride] ? 0.0f : -kInfinity;
  } else {
#define FASTLLM_BODY(T) widen_mask(static_cast<const decltype(T)*>(a.mask) + at, stride, n, bias)
    FASTLLM_FOR_FLOAT(a.mask_dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  }
}

// out[0 .. padded) = factor * x[0 .. D), then zeros. padded is D rounded up to whole vectors.
template <typename T>
FASTLLM_INLINE void widen_row(const T* x, int64_t D, float factor, float* out) {
  const vf f = set1(factor);
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) store(out + d, load(x + d) * f);
  if (d < D) store(out + d, load_n(x + d, D - d) * f);
}

// The scales of one key/value head of an int8 cache.
FASTLLM_INLINE const float* scales_of(const float* scale, const int64_t (&strides)[2], int64_t b, int64_t kv_head) {
  return scale + b * strides[0] + kv_head * strides[1];
}
// x[s] *= factor[s] for s < n.
FASTLLM_INLINE void multiply_row(float* x, const float* factor, int64_t n) {
  int64_t s = 0;
  for (; s + kWidth <= n; s += kWidth) store(x + s, load(x + s) * load(factor + s));
  if (s < n) store_n(x + s, load_n(x + s, n - s) * load_n(factor + s, n - s), n - s);
}

// y = x / sum; a row that sees no key has sum 0 and acc 0, and gives zeros.
template <typename T>
FASTLLM_INLINE void store_row(const float* acc, float sum, int64_t D, T* y) {
  const vf divisor = set1(sum == 0.0f ? 1.0f : sum);
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) store(y + d, load(acc + d) / divisor);
  if (d < D) store_n(y + d, load_n(acc + d, D - d) / divisor, D - d);
}

// The same where acc's columns are in the order of pairs, which D is a multiple of.
template <typename T>
FASTLLM_INLINE void store_paired_row(const float* acc, float sum, int64_t D, T* y) {
  const vf divisor = set1(sum == 0.0f ? 1.0f : sum);
  for (int64_t d = 0; d < D; d += 2 * kWidth)
    store_clean(y + d, pair{load(acc + d) / divisor, load(acc + d + kWidth) / divisor});
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
