// RMSNorm, with the residual added first if there is one: each element is read once and written once.
//
//   row    |<- 16 bytes ->|<- 16 bytes ->| ...        thread t of the row's threads holds vectors t, t + threads, ...
//   block  rows of up to 1024 bytes: a warp each, four to a block; longer ones: a block each, of 4 or 16 warps
//
// Bytes: 2 K elements a row, 4 K with a residual (2 read, 2 written), and the weight, which stays in cache. 4 flops an
// element: copying is the limit. With one row a block and all of a row's loads in flight before the first sum, what is
// left is the sum's latency, some 2 us a block, which the other blocks of the multiprocessor hide: 92 % of the copy
// rate expected from 1024 rows of 4096 on, less below, where the launch is as long as the copy.
//
// To int8 (int8_groups.cuh), g columns to a scale: K + 8 K / g bytes in place of 2 K. In bf16 with a residual and g =
// 32 that is 7.25 K a row; norm and quantising launch by themselves move 11.25 K, and each launch that is not there is
// 2 us less in a decode step, which has nothing to copy. Instructions, as sm_90's SASS counts them: some 240 a vector
// and lane, 270 with a residual, where 180 and 400 fit in the time that an H200 copies its bytes. With a residual
// memory is the limit still, 80 % of the copy rate expected; without, a model's first norm, 60 to 65 %. A quarter and a
// third less time than two launches at 92 %.
#include "int8_groups.cuh"
#include "rms_norm.h"

namespace fastllm::cuda {
namespace {

constexpr int kRowsOfWarps = 4;  // rows a block where each has one warp

// fp32 squares are summed in fp64: beside an outlier the sum of the others would lose its last bits.
template <typename T>
struct SumOfSquares {
  using type = float;
};
template <>
struct SumOfSquares<float> {
  using type = double;
};

// kWarps: of a row. kVec: elements of one access. kHeld: vectors that a thread keeps; a row of more is read again.
// kInt8: y is rounded to integers, after it has been rounded to T.
template <typename T, int kVec, int kWarps, int kHeld, bool kInt8>
__global__ void __launch_bounds__(kWarps == 1 ? 32 * kRowsOfWarps : 32 * kWarps, 1) rms_norm_kernel(RmsNormArgs a) {
  using Wide = typename SumOfSquares<T>::type;
  constexpr int kThreads = 32 * kWarps;
  constexpr int kRows = kWarps == 1 ? kRowsOfWarps : 1;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
  if (row >= a.rows) return;  // a whole warp: blocks of more than one row have no barrier
  const int thread = threadIdx.x % kThreads;
  const T* x = static_cast<const T*>(a.x) + row_offset(a.x_rows, row);
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + row_offset(a.residual_rows, row) : nullptr;
  const T* weight = static_cast<const T*>(a.weight);
  T* y_row = kInt8 ? nullptr : static_cast<T*>(a.y) + row * a.K;
  T* sum = a.residual ? static_cast<T*>(a.sum) + row * a.K : nullptr;
  const int64_t K = a.K;
  constexpr int64_t kStep = kThreads * kVec;

  // Lanes that share a group of integers go together: where the warp's first has work, all have, on zeros past K.
  const auto has_work = [&](int64_t k) { return (kInt8 ? k - threadIdx.x % 32 * kVec : k) < K; };
  // x + residual, rounded to their dtype as PyTorch's add does.
  const auto load_sum = [&](int64_t k) {
    const Pack<T, kVec> loaded = load_pack<T, kVec>(x + k, k < K);
    if (!residual) return loaded;
    Floats<kVec> h = widened(loaded);
    const Floats<kVec> r = widened(load_pack<T, kVec>(residual + k, k < K));
#pragma unroll
    for (int i = 0; i < kVec; ++i) h.at[i] += r.at[i];
    return narrowed<T>(h);
  };
  Pack<T, kVec> held[kHeld];
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    const int64_t k = v * kStep + thread * kVec;
    if (has_work(k)) held[v] = load_sum(k);
  }
  Wide squares = 0;
  const auto add_squares = [&](const Pack<T, kVec>& held) {
    const Floats<kVec> h = widened(held);
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares += static_cast<Wide>(h.at[i]) * static_cast<Wide>(h.at[i]);
  };
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    if (v * kStep + thread * kVec < K) add_squares(held[v]);
  }
  for (int64_t k = kHeld * kStep + thread * kVec; k < K; k += kStep) add_squares(load_sum(k));
  squares = reduce_block<kWarps>(squares, reinterpret_cast<Wide*>(shared_memory()), Sum());
  // A row's mean in fp64 costs nothing; the four roundings of fp32 would shift the whole row.
  const float inverse = static_cast<float>(1.0 / sqrt(static_cast<double>(squares) / static_cast<double>(K) + a.eps));

  const auto finish = [&](int64_t k, const Pack<T, kVec>& held) {
    Floats<kVec> y = widened(held);
#pragma unroll
    for (int i = 0; i < kVec; ++i) y.at[i] *= inverse;
    if (weight) {
      if (a.round_before_weight) y = widened(narrowed<T>(y));
      const Floats<kVec> w = widened(load_pack<T, kVec>(weight + k, k < K));
#pragma unroll
      for (int i = 0; i < kVec; ++i) y.at[i] *= w.at[i] + a.offset;
    }
    const Pack<T, kVec> rounded = narrowed<T>(y);
    if constexpr (kInt8) {
      store_int8_groups<kVec>(a.int8, row, k, K, widened(rounded));
    } else {
      store_pack<T, kVec>(y_row + k, rounded);
    }
    if (sum && k < K) store_pack<T, kVec>(sum + k, held);
  };
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    const int64_t k = v * kStep + thread * kVec;
    // As fp32, which it was for the sum, a row would take twice the registers.
    make_opaque(held[v]);
    if (has_work(k)) finish(k, held[v]);
  }
  for (int64_t k = kHeld * kStep + thread * kVec; has_work(k); k += kStep) finish(k, load_sum(k));
}

template <typename T, int kVec, int kWarps, int kHeld, bool kInt8>
void launch_as(const RmsNormArgs& a, Place place) {
  constexpr int kRows = kWarps == 1 ? kRowsOfWarps : 1;
  const Shape shape{dim3(ceil_div(a.rows, kRows)), 32 * kWarps * kRows, kWarps > 1 ? kWarps * sizeof(double) : 0};
  launch("rms_norm", rms_norm_kernel<T, kVec, kWarps, kHeld, kInt8>, shape, a, place);
}

template <typename T, int kVec, bool kInt8>
void launch_vectors(const RmsNormArgs& a, Place place) {
  // A thread's vectors are all in flight at once. 16 of them are 64 registers, half of what a thread of 512 may have:
  // 64 k elements of 2 bytes are one pass; what does not fit is read again, from the second cache.
  const int64_t vectors = (a.K + kVec - 1) / kVec;
  if (vectors <= 32 * 2) return launch_as<T, kVec, 1, 2, kInt8>(a, place);
  if (vectors <= 128 * 4) return launch_as<T, kVec, 4, 4, kInt8>(a, place);
  if (vectors <= 512 * 4) return launch_as<T, kVec, 16, 4, kInt8>(a, place);
  return launch_as<T, kVec, 16, kInt8 ? 8 : 16, kInt8>(a, place);
}

template <typename T>
bool in_vectors(const RmsNormArgs& a) {
  if (a.K % kPerVector<T> != 0 || !is_aligned(a.x, 16) || !is_aligned(a.weight, 16) || !is_aligned(a.residual, 16))
    return false;
  if (!is_aligned(a.y, 16) || !is_aligned(a.sum, 16)) return false;
  return rows_are_aligned(a.x_rows, kPerVector<T>) && rows_are_aligned(a.residual_rows, kPerVector<T>);
}

}  // namespace

void rms_norm(const RmsNormArgs& a, Place place) {
  if (a.rows == 0 || a.K == 0) return;
  const auto body = [&](auto t) {
    using T = decltype(t);
    if (a.int8.data) {
      FASTLLM_CHECK(in_vectors<T>(a), "rms_norm: it rounds rows that lie in whole pieces of 16 bytes");
      launch_vectors<T, kPerVector<T>, true>(a, place);
    } else if (in_vectors<T>(a)) {
      launch_vectors<T, kPerVector<T>, false>(a, place);
    } else {
      launch_vectors<T, 1, false>(a, place);
    }
  };
  FASTLLM_FOR_FLOAT(a.dtype, body)
}

}  // namespace fastllm::cuda
