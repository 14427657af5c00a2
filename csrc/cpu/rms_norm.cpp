// y = x / sqrt(mean(x^2) + eps) * (weight + offset), for each row; with a residual, x + residual is normed and returned
// too.
//
// y may be rounded to int8 on the way (quantize.h): a piece of it at a time stands in L1, rounded to dtype first.
//
// Bytes a row: read K (and K of the residual), write K (and K of the sum). The second pass reads what the first has
// just put into L1 (rows up to 8k floats), so memory sees one pass.
#include "rms_norm.h"

#include "parallel.h"
#include "quantize.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// h[k] = round(x[k] + residual[k]), as PyTorch's own add rounds; null residual: h is x.
template <typename T>
FASTLLM_INLINE void add_row(const T* x, const T* residual, T* h, int64_t K) {
  int64_t k = 0;
  for (; k + 2 * kWidth <= K; k += 2 * kWidth) {
    const pair a = load_pair(x + k), r = load_pair(residual + k);
    store_clean(h + k, pair{a.first + r.first, a.second + r.second});
  }
  for (; k < K; k += kWidth) {
    const int64_t n = K - k < kWidth ? K - k : kWidth;
    store_n(h + k, load_n(x + k, n) + load_n(residual + k, n), n);
  }
}

// Sum of squares in two levels: runs of kRun elements on four chains of floats, runs added up in double, so that the
// error does not grow with K.
template <typename T>
FASTLLM_INLINE double sum_of_squares(const T* x, int64_t K) {
  constexpr int64_t kRun = 256 < 32 * kWidth ? 32 * kWidth : 256;
  double total = 0;
  int64_t k = 0;
  while (k + 4 * kWidth <= K) {
    const int64_t end = k + kRun <= K ? k + kRun : K;
    vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    for (; k + 4 * kWidth <= end; k += 4 * kWidth) {
      const pair a = load_pair(x + k), b = load_pair(x + k + 2 * kWidth);
      s0 = fmadd(a.first, a.first, s0);
      s1 = fmadd(a.second, a.second, s1);
      s2 = fmadd(b.first, b.first, s2);
      s3 = fmadd(b.second, b.second, s3);
    }
    total += static_cast<double>(reduce_add((s0 + s1) + (s2 + s3)));
  }
  vf rest = zero();
  for (; k < K; k += kWidth) {
    const vf a = load_n(x + k, K - k < kWidth ? K - k : kWidth);
    rest = fmadd(a, a, rest);
  }
  return total + static_cast<double>(reduce_add(rest));
}

// y[0 .. n) of a row that has been summed.
template <typename T>
FASTLLM_INLINE void norm_columns(const RmsNormArgs& a, const T* x, const T* weight, vf scale, T* y, int64_t n) {
  const vf offset = set1(a.offset), one = set1(1.0f);
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
    pair w{one, one};
    if (weight) {
      w = load_pair(weight + k);
      w = {w.first + offset, w.second + offset};
    }
    const pair h = load_pair(x + k);
    pair normed = {h.first * scale, h.second * scale};  // its NaNs stem from T's, or from the processor
    if (a.round_before_weight) normed = round_clean(T{}, normed);
    store_clean(y + k, pair{normed.first * w.first, normed.second * w.second});
  }
  for (; k < n; k += kWidth) {
    const int64_t left = n - k < kWidth ? n - k : kWidth;
    const vf w = weight ? load_n(weight + k, left) + offset : one;
    vf normed = load_n(x + k, left) * scale;
    if (a.round_before_weight) normed = round_clean(T{}, normed);
    store_n(y + k, normed * w, left);
  }
}

// A row, ready for norm_columns.
template <typename T>
struct Summed {
  const T* x;
  vf scale;
};

template <typename T>
FASTLLM_INLINE Summed<T> sum_row(const RmsNormArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row_offset(a.x_rows, row);
  if (a.residual) {
    T* sum = static_cast<T*>(a.sum) + row * a.K;
    add_row(x, static_cast<const T*>(a.residual) + row_offset(a.residual_rows, row), sum, a.K);
    x = sum;
  }
  const double mean = sum_of_squares(x, a.K) / static_cast<double>(a.K);
  return {x, set1(static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(a.eps))))};
}

template <typename T>
void rms_norm_rows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t K = a.K;
  // The end of a sum, its root and quotient are a long chain; in 16 bits the row before covers it. In fp32 two rows at
  // a time crowd L1.
  constexpr bool kAhead = sizeof(T) == 2;
  Summed<T> next = sum_row<T>(a, begin);
  for (int64_t row = begin; row < end; ++row) {
    if (!kAhead && row > begin) next = sum_row<T>(a, row);
    const Summed<T> of = next;
    if (kAhead && row + 1 < end) next = sum_row<T>(a, row + 1);
    if (!a.groups) {
      norm_columns(a, of.x, weight, of.scale, static_cast<T*>(a.y) + row * K, K);
      continue;
    }
    constexpr int64_t kPiece = 1024;  // whole groups
    T y[kPiece];
    float* groups = a.groups + row * 2 * ((K + a.group_size - 1) / a.group_size);
    for (int64_t k = 0; k < K; k += kPiece) {
      const int64_t n = K - k < kPiece ? K - k : kPiece;
      norm_columns(a, of.x + k, weight ? weight + k : nullptr, of.scale, y, n);
      quantize_groups(y, n, a.group_size, static_cast<int8_t*>(a.y) + row * K + k, groups + 2 * (k / a.group_size));
    }
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& a) {
  const int64_t rows_a_chunk = 1 + 16384 / (a.K + 1);  // a chunk is worth waking a thread for: about 5 us
  parallel_for(a.rows, rows_a_chunk, a.threads, [&](int64_t begin, int64_t end) {
#define FASTLLM_BODY(T) rms_norm_rows<decltype(T)>(a, begin, end)
    FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
