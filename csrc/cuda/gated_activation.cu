// act(gate) * up: a thread takes vectors of 16 bytes of one row.
//
// Bytes: 2 I elements read and I written a row; about 12 flops for 6 bytes in bf16, with one exponential and one
// division an element. Copying is the limit: the division's eight instructions and the exponential make some 20 an
// element, a third of what a multiprocessor of an H200 can issue in the time that its share of 4.3 TB/s takes.
// Expected: 92 % of the copy rate.
//
// To int8 (int8_groups.cuh), g columns to a scale: I + 8 I / g bytes in place of 2 I. In bf16 with g = 32 that is 5.25
// I a row; gate and quantising launch by themselves move 9.25 I, and the launch that is not there is 2 us less in a
// decode step. Instructions are the limit: sm_90's SASS has some 45 an element, where 36 fit in the time that an H200
// copies its bytes: 65 to 70 % of the copy rate expected, a fifth less time than two launches at 92 %.
#include "gated_activation.h"
#include "int8_groups.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // a thread's, so that four loads are in flight

template <bool kGeluTanh>
__device__ __forceinline__ float activated(float x) {
  // x/2 (1 + tanh z) = x sigmoid(2 z): both are x / (1 + e^-t), and e^-t may be infinite without harm.
  const float t = kGeluTanh ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
  return x / (1.0f + expf(-t));
}

// kInt8: y is rounded to integers, after it has been rounded to T.
template <typename T, int kVec, bool kGeluTanh, bool kInt8>
__global__ void __launch_bounds__(kThreads) gated_activation_kernel(GatedActivationArgs a) {
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(a.gate) + row_offset(a.gate_rows, row);
  const T* up = static_cast<const T*>(a.up) + row_offset(a.up_rows, row);
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * kVectors * kThreads + threadIdx.x) * kVec;
  // Lanes that share a group of integers go together: where the warp's first has work, all have, on zeros past I.
  const auto has_work = [&](int64_t i) { return (kInt8 ? i - threadIdx.x % 32 * kVec : i) < a.I; };
  Pack<T, kVec> g[kVectors], u[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = first + v * kThreads * kVec;
    if (has_work(i)) {
      g[v] = load_pack<T, kVec>(gate + i, i < a.I);
      u[v] = load_pack<T, kVec>(up + i, i < a.I);
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = first + v * kThreads * kVec;
    if (!has_work(i)) continue;
    Floats<kVec> h = widened(g[v]);
    const Floats<kVec> wide_up = widened(u[v]);
#pragma unroll
    for (int e = 0; e < kVec; ++e) h.at[e] = activated<kGeluTanh>(h.at[e]) * wide_up.at[e];
    const Pack<T, kVec> rounded = narrowed<T>(h);
    if constexpr (kInt8) {
      store_int8_groups<kVec>(a.int8, row, i, a.I, widened(rounded));
    } else {
      store_pack<T, kVec>(static_cast<T*>(a.y) + row * a.I + i, rounded);
    }
  }
}

template <typename T, int kVec, bool kInt8>
void launch_as(const GatedActivationArgs& a, Place place) {
  const Shape shape{dim3(static_cast<unsigned>(a.rows), ceil_div(a.I, kThreads * kVectors * kVec)), kThreads};
  launch("gated_activation",
         a.gelu_tanh ? gated_activation_kernel<T, kVec, true, kInt8> : gated_activation_kernel<T, kVec, false, kInt8>,
         shape, a, place);
}

template <typename T>
bool in_vectors(const GatedActivationArgs& a) {
  return a.I % kPerVector<T> == 0 && is_aligned(a.gate, 16) && is_aligned(a.up, 16) && is_aligned(a.y, 16) &&
         rows_are_aligned(a.gate_rows, kPerVector<T>) && rows_are_aligned(a.up_rows, kPerVector<T>);
}

}  // namespace

void gated_activation(const GatedActivationArgs& a, Place place) {
  if (a.rows == 0 || a.I == 0) return;
  const auto body = [&](auto t) {
    using T = decltype(t);
    if (a.int8.data) {
      FASTLLM_CHECK(in_vectors<T>(a), "gated_activation: it rounds rows that lie in whole pieces of 16 bytes");
      launch_as<T, kPerVector<T>, true>(a, place);
    } else if (in_vectors<T>(a)) {
      launch_as<T, kPerVector<T>, false>(a, place);
    } else {
      launch_as<T, 1, false>(a, place);
    }
  };
  FASTLLM_FOR_FLOAT(a.dtype, body)
}

}  // namespace fastllm::cuda
