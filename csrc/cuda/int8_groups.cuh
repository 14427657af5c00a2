// Rounding to int8 with a scale for each group of 32, 64 or 128 columns, as quant_matmul's reference does it:
//
//   scale = amax / 127, integer = the nearest to x * (127 / amax), ties to even, all in fp32
//
//   row     |<- 8 bytes ->|<- 8 bytes ->| ...       (rows, K) of int8: kVec of a lane (8; of fp32 4) next to each other
//           |<- a group: 4 to 32 lanes ->|          neighbouring lanes of one warp, so that shuffles reduce it
//   groups  |scale, sum|scale, sum| ...             (rows, ceil(K / group), 2) of fp32; the sum of a group's integers
//
// 127 * 128 fits an fp32: the sum is exact, and a product that needs scale * sum rounds it once.
#pragma once

#include "dtypes.cuh"
#include "int8_output.h"
#include "reduce.cuh"

namespace fastllm::cuda {

constexpr float kTiny = 0x1p-100f;  // TINY of fastllm/quant/rounding.py: 127 / amax must be finite

struct Int8Scale {
  float step, inverse;  // what an integer step is worth, and 127 / amax, or 0 where all integers are 0
};
// Of a group's largest magnitude, which is NaN where one of its elements is.
__device__ __forceinline__ Int8Scale int8_scale(float largest) {
  const bool is_finite = largest < __int_as_float(0x7f800000);
  if (!is_finite || largest < kTiny) return {is_finite ? 0.0f : __int_as_float(0x7fffffff), 0.0f};
  // largest / 127 in three instructions: the product with 1 / 127 corrected once is the rounded quotient of every fp32
  // from kTiny on (all 2^23 fractions were tried).
  constexpr float kInverse = 1.0f / 127.0f;
  const float near = __fmul_rn(largest, kInverse);
  return {fmaf(fmaf(-127.0f, near, largest), kInverse, near), 127.0f / largest};
}

// The nearest integer to x * inverse in the lowest byte: beside 1.5 * 2^23 an fp32 has no fraction left, so that adding
// rounds, and the units are the lowest bits. The product is rounded first, which an fma would not do.
__device__ __forceinline__ unsigned int8_bits(float x, float inverse) {
  return __float_as_uint(__fmul_rn(x, inverse) + 12582912.0f);
}

// Writes y, columns k .. k + kVec - 1 of a row of K; a group's first lane writes its scale and sum. All lanes of the
// warp have to come, with neighbouring k: those past K bring zeros.
template <int kVec>
__device__ __forceinline__ void store_int8_groups(const Int8Output& to, int64_t row, int64_t k, int64_t K,
                                                  const Floats<kVec>& y) {
  static_assert(kVec % 4 == 0, "a dword of integers at a time");
  constexpr int kFewest = 32 / kVec, kMost = 128 / kVec;  // lanes of a group
  const int lanes = (1 << to.group_log2) / kVec;
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) largest = Largest()(largest, fabsf(y.at[i]));
  const Int8Scale scale = int8_scale(reduce_some_lanes<kFewest, kMost>(largest, lanes, Largest()));
  Pack<int8_t, kVec> integers;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kVec; i += 4) {
    unsigned bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bits[j] = int8_bits(y.at[i + j], scale.inverse);
    const unsigned low = __byte_perm(bits[0], bits[1], 0x0040), high = __byte_perm(bits[2], bits[3], 0x0040);
    // An infinity times 0 is no integer.
    const unsigned four = scale.inverse != 0.0f ? __byte_perm(low, high, 0x5410) : 0;
    sum = __dp4a(static_cast<int>(four), 0x01010101, sum);
    memcpy(&integers.at[i], &four, 4);
  }
  sum = reduce_some_lanes<kFewest, kMost>(sum, lanes, Sum());
  if (k >= K) return;
  store_pack<int8_t, kVec>(to.data + row * K + k, integers);
  const int group = static_cast<int>(k >> to.group_log2);
  if (k == static_cast<int64_t>(group) << to.group_log2)
    reinterpret_cast<float2*>(to.groups)[row * to.num_groups + group] = {scale.step, static_cast<float>(sum)};
}

}  // namespace fastllm::cuda
