// y = x / sqrt(mean(x^2) + eps) * (weight + offset), for each row; with a residual, x + residual is normed and returned
// too.
//
// y may be rounded to int8 on the way (quantize.h): a piece of it at a time stands in L1, rounded to dtype first.
//
// Bytes a row: read K (and K of the residual), write K (and K of the sum). A row's squares are summed while the row
// before it is normed: the one's arithmetic covers the other's way from memory, and the second pass finds it in L1
// (rows up to 8k floats).
#include "rms_norm.h"

#include "parallel.h"
#include "quantize.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kSegment = 256 < 64 * kWidth ? 64 * kWidth : 256;  // columns, whole groups, which have 128 at most

// A row whose squares are being summed.
template <typename T>
struct Row {
  const T* x;
  const T* residual;  // or null
  T* sum;             // of both
  double squares;     // of whole segments, so that the error does not grow with K
  const T* normed() const { return residual ? sum : x; }
};

template <typename T>
FASTLLM_INLINE Row<T> row_at(const RmsNormArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row_offset(a.x_rows, row);
  if (!a.residual) return {x, nullptr, nullptr, 0.0};
  const T* residual = static_cast<const T*>(a.residual) + row_offset(a.residual_rows, row);
  return {x, residual, static_cast<T*>(a.sum) + row * a.K, 0.0};
}

// kLlama: there is a weight and no offset, the normed value is rounded before, and eps hides squares below 2^-126.
// Known to the compiler, none of it is asked for each vector.

// The squares of a pair at column k, and of what the residual makes of it, rounded as PyTorch's own add rounds.
template <bool kLlama, bool kResidual, typename T>
FASTLLM_INLINE vf take_in(const Row<T>& row, int64_t k, vf squares) {
  if constexpr (kResidual) {
    const pair x = load_pair(row.x + k), r = load_pair(row.residual + k);
    store_clean(row.sum + k, pair{x.first + r.first, x.second + r.second});
  }
  const T* h = (kResidual ? row.sum : row.x) + k;
  return kLlama ? add_normal_squares(squares, h) : add_squares(squares, h);
}
// Of the n lanes at most of a vector.
template <typename T>
FASTLLM_INLINE vf take_in_n(const Row<T>& row, int64_t k, int64_t n, vf squares) {
  if (row.residual) store_n(row.sum + k, load_n(row.x + k, n) + load_n(row.residual + k, n), n);
  const vf h = load_n(row.normed() + k, n);
  return fmadd(h, h, squares);
}

template <bool kLlama, typename T>
FASTLLM_INLINE void norm_pair(const RmsNormArgs& a, const T* x, const T* weight, vf scale, T* y) {
  pair normed;  // its NaNs stem from T's, or from the processor
  if (kLlama || a.round_before_weight) {
    const pair h = load_pair(x);
    normed = round_ordered(T{}, pair{h.first * scale, h.second * scale});
  } else {
    const pair h = load_ordered(x);
    normed = {h.first * scale, h.second * scale};
  }
  if (kLlama || weight) {
    pair w = load_ordered(weight);
    if constexpr (!kLlama) w = {w.first + set1(a.offset), w.second + set1(a.offset)};
    normed = {normed.first * w.first, normed.second * w.second};
  }
  store_ordered(y, normed);
}
template <typename T>
FASTLLM_INLINE void norm_n(const RmsNormArgs& a, const T* x, const T* weight, int64_t n, vf scale, T* y) {
  vf normed = load_n(x, n) * scale;
  if (a.round_before_weight) normed = round_clean(T{}, normed);
  if (weight) normed = normed * (load_n(weight, n) + set1(a.offset));
  store_n(y, normed, n);
}

// n columns from `from` on: of x, whose squares are summed, to y (kNorm); of the next row, into its sum (kNext). A
// sum's bits do not depend on what goes on beside it.
template <bool kLlama, bool kResidual, bool kNorm, bool kNext, typename T>
FASTLLM_INLINE void segment(const RmsNormArgs& a, const T* x, vf scale, T* y, Row<T>* next, int64_t from, int64_t n) {
  constexpr int64_t kPair = 2 * kWidth;
  const T* weight = a.weight ? static_cast<const T*>(a.weight) + from : nullptr;
  vf first = zero(), second = zero();
  int64_t k = 0;
  for (; k + 2 * kPair <= n; k += 2 * kPair) {
    if constexpr (kNext) first = take_in<kLlama, kResidual>(*next, from + k, first);
    if constexpr (kNorm) norm_pair<kLlama>(a, x + from + k, weight ? weight + k : weight, scale, y + k);
    if constexpr (kNext) second = take_in<kLlama, kResidual>(*next, from + k + kPair, second);
    if constexpr (kNorm)
      norm_pair<kLlama>(a, x + from + k + kPair, weight ? weight + k + kPair : weight, scale, y + k + kPair);
  }
  for (; k < n; k += kWidth) {
    const int64_t left = n - k < kWidth ? n - k : kWidth;
    if constexpr (kNext) first = take_in_n(*next, from + k, left, first);
    if constexpr (kNorm) norm_n(a, x + from + k, weight ? weight + k : nullptr, left, scale, y + k);
  }
  if constexpr (kNext) next->squares += static_cast<double>(reduce_add(first + second));
}

template <typename T, bool kLlama, bool kResidual>
void rms_norm_rows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const int64_t K = a.K;
  const auto columns = [K](int64_t from) { return K - from < kSegment ? K - from : kSegment; };
  Row<T> next = row_at<T>(a, begin);
  for (int64_t k = 0; k < K; k += kSegment) {
    segment<kLlama, kResidual, false, true>(a, next.x, zero(), next.sum, &next, k, columns(k));
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* x = next.normed();
    const double mean = next.squares / static_cast<double>(K);
    const vf scale = set1(static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(a.eps))));
    if (row + 1 < end) next = row_at<T>(a, row + 1);
    for (int64_t k = 0; k < K; k += kSegment) {
      const int64_t n = columns(k);
      T rounded[kSegment];
      T* y = a.groups ? rounded : static_cast<T*>(a.y) + row * K + k;
      if (row + 1 < end) {
        segment<kLlama, kResidual, true, true>(a, x, scale, y, &next, k, n);
      } else {
        segment<kLlama, kResidual, true, false>(a, x, scale, y, &next, k, n);
      }
      if (a.groups) {
        float* groups = a.groups + 2 * (row * ((K + a.group_size - 1) / a.group_size) + k / a.group_size);
        quantize_groups(rounded, n, a.group_size, static_cast<int8_t*>(a.y) + row * K + k, groups);
      }
    }
  }
}

template <typename T>
void rms_norm_of(const RmsNormArgs& a, int64_t begin, int64_t end) {
  if (a.weight && a.round_before_weight && a.offset == 0.0f && a.eps >= 0x1p-100f) {
    a.residual ? rms_norm_rows<T, true, true>(a, begin, end) : rms_norm_rows<T, true, false>(a, begin, end);
  } else {
    a.residual ? rms_norm_rows<T, false, true>(a, begin, end) : rms_norm_rows<T, false, false>(a, begin, end);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& a) {
  const int64_t rows_a_chunk = 1 + 16384 / (a.K + 1);  // a chunk is worth waking a thread for: about 5 us
  parallel_for(a.rows, rows_a_chunk, a.threads, [&](int64_t begin, int64_t end) {
#define FASTLLM_BODY(T) rms_norm_of<decltype(T)>(a, begin, end)
    FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
