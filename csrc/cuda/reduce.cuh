// Sums and maxima over the threads of a warp and of several warps.
#pragma once

#include "launch.h"
#include "ptx.cuh"

namespace fastllm::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
// Of magnitudes: a NaN is larger than everything, where fmaxf would drop it.
struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::largest(a, b); }
};

// Over kLanes neighbouring lanes; each of them gets the result.
template <int kLanes, typename T, typename Operation>
__device__ __forceinline__ T reduce_lanes(T x, Operation operation) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = operation(x, __shfl_xor_sync(kWholeWarp, x, distance));
  return x;
}

// The same where only the launch knows how many lanes: a power of two from kFewest to kMost.
template <int kFewest, int kMost, typename T, typename Operation>
__device__ __forceinline__ T reduce_some_lanes(T x, int lanes, Operation operation) {
#pragma unroll
  for (int distance = 1; distance < kMost; distance *= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, x, distance);
    if (distance < kFewest || distance < lanes) x = operation(x, other);
  }
  return x;
}

// Over all threads of a block of kWarps warps, in a fixed order. s_parts holds kWarps elements; a block that reduces
// twice has to meet in between.
template <int kWarps, typename T, typename Operation>
__device__ __forceinline__ T reduce_block(T x, T* s_parts, Operation operation) {
  x = reduce_lanes<32>(x, operation);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % 32 == 0) s_parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = s_parts[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x = operation(x, s_parts[warp]);
  }
  return x;
}

}  // namespace fastllm::cuda
