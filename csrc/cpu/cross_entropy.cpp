// loss = log(sum over v of e^z[v]) - z[target], z = softcap tanh(logit / softcap), for each row; the row's logits come
// a stretch of the vocabulary at a time, from the matrix product that has just put them into cache.
//
// Bytes a logit: 4 read from cache, none written. Flops: about 20, an exponential. A row is taken in segments of
// kSegment logits: their maximum first, then the sum of e^(z - top) while they are in L1, and only if the maximum has
// grown is the sum so far scaled down (online softmax: Milakov and Gimelshein 2018). Segments are counted from the
// start of the vocabulary, so that a row's bits depend neither on the stretches nor on the other rows.
#include "cross_entropy.h"

#include "parallel.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kSegment = 1024;     // 4 KB: a seventh of L1
constexpr int64_t kStep = 4 * kWidth;  // four chains hide an addition's latency
constexpr int64_t kRun = 32 * kWidth;  // logits whose exponentials are summed in float; runs are added up in double
constexpr float kInfinity = __builtin_inff();
constexpr float kHighest = 3.402823466e+38f;  // the highest finite float

static_assert(kSegment % kStep == 0 && kSegment % kRun == 0);

FASTLLM_INLINE vf capped(vf z, float softcap, vf inverse) {
  return softcap > 0 ? tanh(z * inverse) * set1(softcap) : z;
}

// The segment as whole steps of finished logits: where they lie, or in buffer, with -inf, whose exponential is 0, after
// the last.
FASTLLM_INLINE const float* finished(const float* logits, int64_t n, float softcap, float* buffer) {
  if (n % kStep == 0 && softcap == 0) return logits;
  const vf inverse = set1(1.0f / softcap);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(buffer + i, capped(load(logits + i), softcap, inverse));
  if (i < n) store(buffer + i, capped(load_n(logits + i, n - i), softcap, inverse));
  for (i = n; i % kStep != 0; ++i) buffer[i] = -kInfinity;
  return buffer;
}

// A NaN may be lost here: sum_of_exponentials finds it.
FASTLLM_INLINE float highest(const float* z, int64_t n) {
  vf m0 = set1(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
  for (int64_t i = 0; i < n; i += kStep) {
    m0 = max(m0, load(z + i));
    m1 = max(m1, load(z + i + kWidth));
    m2 = max(m2, load(z + i + 2 * kWidth));
    m3 = max(m3, load(z + i + 3 * kWidth));
  }
  return reduce_max(max(max(m0, m1), max(m2, m3)));
}

FASTLLM_INLINE double sum_of_exponentials(const float* z, int64_t n, float top) {
  const vf shift = set1(top);
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + kRun < n ? i + kRun : n;
    vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    for (; i < end; i += kStep) {
      s0 = s0 + exp(load(z + i) - shift);
      s1 = s1 + exp(load(z + i + kWidth) - shift);
      s2 = s2 + exp(load(z + i + 2 * kWidth) - shift);
      s3 = s3 + exp(load(z + i + 3 * kWidth) - shift);
    }
    total += static_cast<double>(reduce_add((s0 + s1) + (s2 + s3)));
  }
  return total;
}

// top stays among finite numbers, so that z - top is never inf - inf: a logit of +inf makes the sum infinite, a row of
// -inf leaves it 0, and the logarithm says the rest.
FASTLLM_INLINE void take_segment(const float* z, int64_t n, CrossEntropyState& s) {
  float top = highest(z, n);
  if (top > kHighest) top = kHighest;
  if (static_cast<double>(top) > s.top) {
    s.sum *= __builtin_exp(s.top - static_cast<double>(top));
    s.top = static_cast<double>(top);
  }
  s.sum += sum_of_exponentials(z, n, static_cast<float>(s.top));
}

void take_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  alignas(64) float buffer[kSegment];
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = a.logits + row * a.columns;
    CrossEntropyState s = a.state[row];
    if (a.first == 0) s = {-static_cast<double>(kHighest), 0.0, static_cast<double>(__builtin_nanf(""))};
    for (int64_t i = 0; i < a.columns; i += kSegment) {
      const int64_t n = a.columns - i < kSegment ? a.columns - i : kSegment;
      const float* z = finished(logits + i, n, a.softcap, buffer);
      take_segment(z, (n + kStep - 1) / kStep * kStep, s);
      const int64_t target = a.target[row] - a.first - i;
      if (target >= 0 && target < n) s.picked = static_cast<double>(z[target]);
    }
    a.state[row] = s;
    if (a.loss != nullptr) {
      const double loss = (s.top - s.picked) + __builtin_log(s.sum);
      a.loss[row] = a.target[row] == a.ignore_index ? 0.0f : static_cast<float>(loss);
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& a) {
  const int64_t rows_a_chunk = 1 + 8192 / (a.columns + 1);  // a chunk is worth waking a thread for: about 5 us
  parallel_for(a.rows, rows_a_chunk, a.threads, [&](int64_t begin, int64_t end) { take_rows(a, begin, end); });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
