// What one warp does with one tile of keys: scores, which of them count, their softmax, weights times values.
//
//            8 keys                    A warp has kM tiles of 16 rows (query tokens and heads), which all meet the same
//         c=0  1  2  3                 keys. With g = lane / 4 and c = lane % 4 a lane holds, of 8 columns that an mma
//       +--+--+--+--+                  gives, columns 2 c and 2 c + 1 of rows g and g + 8:
//   g=0 |01|01|01|01|  row g           rS[m][j][e], rS[m][j][2 + e]: the scores of key 8 j + 2 c + e
//    ...|  |  |  |  |                  rO[m][j][e], rO[m][j][2 + e]: the sums of element 8 j + 2 c + e
//   g=0 |23|23|23|23|  row g + 8       rP[m][i]: an mma's operand a, the weights of keys 16 i .. 16 i + 15
//       +--+--+--+--+
//
// K and V lie in shared memory as they do in global memory, a row of D elements a key, but for the order of a row's
// 16-byte chunks, see swizzled(). So that int8 needs no third copy, it becomes q's dtype between ldmatrix and mma: a
// register of four bytes becomes two of pairs, of bytes 0 and 2 and of bytes 1 and 3. Of K a lane has elements 4 c to
// 4 c + 3 of 16, so its q is of 4 c and 4 c + 2, and of 4 c + 1 and 4 c + 3. Of V, transposed in pairs of bytes, it has
// elements 2 g and 2 g + 1 of two keys, which go to two products: rO[m][j][e] and rO[m][j + 1][e], for an even j, are
// then elements 8 j + 4 c + 2 e and 8 j + 4 c + 2 e + 1.
#pragma once

#include <type_traits>

#include "attention.h"
#include "dtypes.cuh"
#include "reduce.cuh"

namespace fastllm::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// ---------------------------------------------------------------- who sees what

// Keys [begin, end).
struct KeyRange {
  int begin, end;
};

// Keys that a query at one of the positions low .. high sees.
__device__ __forceinline__ KeyRange visible_keys(const AttentionArgs& a, int keys, int low, int high) {
  KeyRange range{0, keys};
  if (a.causal) range.end = min(range.end, high + 1);
  if (a.window > 0) {
    range.begin = max(range.begin, low - a.window + 1);
    range.end = min(range.end, high + a.window);
  }
  range.end = max(range.end, 0);
  return range;
}

__device__ __forceinline__ int64_t load_index(const void* from, DType dtype, int64_t at) {
  return dtype == DType::i64 ? static_cast<const int64_t*>(from)[at] : static_cast<const int32_t*>(from)[at];
}

// The keys of a sequence that are there.
__device__ __forceinline__ int count_keys(const AttentionArgs& a, int b) {
  if (a.kv_lens == nullptr) return a.S;
  const int64_t length = load_index(a.kv_lens, a.lens_dtype, b * a.lens_stride);
  return static_cast<int>(length < 0 ? 0 : length > a.S ? a.S : length);
}

// A head's sink as an exponent: a key of value 0 that each of its rows has seen beforehand.
template <typename T>
__device__ __forceinline__ float sink_exponent(const AttentionArgs& a, int h) {
  const int64_t at = h * a.sinks_stride;
  const float sink =
      a.sinks_dtype == DType::f32 ? static_cast<const float*>(a.sinks)[at] : widen(static_cast<const T*>(a.sinks)[at]);
  return sink * kLog2e;
}

// ---------------------------------------------------------------- where keys lie

// A cache in one piece is one of a page a sequence.
struct Token {
  int page, row;
  __device__ __forceinline__ int64_t offset(const TokenStrides& strides) const {
    return page * strides.outer + row * strides.token;
  }
};

__device__ __forceinline__ Token find_token(const AttentionArgs& a, int b, int key) {
  if (a.block_table == nullptr) return {b, key};
  const unsigned page = static_cast<unsigned>(key) / static_cast<unsigned>(a.page);
  const int64_t at = b * a.table_strides[0] + page * a.table_strides[1];
  return {static_cast<int>(load_index(a.block_table, a.table_dtype, at)), key - static_cast<int>(page) * a.page};
}

// The chunk of 16 bytes that holds chunk `chunk` of row `row` in a tile with kChunks chunks a row. ldmatrix reads one
// chunk of each of 8 rows, and has to find them in 8 different sets of 4 banks. Where a row's chunks are a multiple of
// 2, 4 or 8, only 4, 2 or 1 of the 8 rows start in different sets, and the others change places with their neighbours.
template <unsigned kChunks>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned chunk) {
  constexpr unsigned kSame = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  // In two parts, so that only the one that the lane changes is more than a constant.
  return row * kChunks + chunk / kSame * kSame + (chunk % kSame ^ row / (8 / kSame) % kSame);
}

// For addresses that are made anew for each tile: kept for all of them they would take more registers than there are.
__device__ __forceinline__ unsigned opaque_thread() {
  unsigned thread = threadIdx.x;
  ptx::make_opaque(thread);
  return thread;
}

// ---------------------------------------------------------------- products

template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    ptx::mma_bf16(c, a, b0, b1);
  } else {
    ptx::mma_f16(c, a, b0, b1);
  }
}

// Bytes 0 and 2 of a register as a pair of T, and bytes 1 and 3: exactly, since T's significand has 8 bits or more.
template <typename T>
__device__ __forceinline__ void widen_bytes(unsigned bytes, unsigned& even, unsigned& odd) {
  constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa, kAndXor = (0xf0 & 0xcc) ^ 0xaa;
  const auto pair = [](unsigned x) {
    if constexpr (std::is_same_v<T, bf16>) {
      // 0x4300 with 7 bits in its significand is 128 + them; 0xc300 is -128, and with the sign's bit -256.
      const unsigned magnitude = ptx::lop3<kAndOr>(x, 0x007f007fu, 0x43004300u);
      const unsigned bias = ptx::lop3<kAndOr>(x, 0x00800080u, 0xc300c300u);
      return ptx::bf16x2_fma(magnitude, 0x3f803f80u, bias);
    } else {
      // 0x6400 with a byte in its significand is 1024 + it; the sign's bit, turned, makes that byte x + 128.
      return ptx::f16x2_sub(ptx::lop3<kAndXor>(x, 0x00ff00ffu, 0x64806480u), 0x64806480u);
    }
  };
  even = pair(bytes);
  odd = pair(bytes >> 8);
}

// rS = q K^T. load_q(lane, i, rQ) gives elements 16 i .. 16 i + 15 of the rows as operands a.
template <typename T, typename Cache, int kD, int kN, int kM, typename LoadQ>
__device__ __forceinline__ void score(float (&rS)[kM][kN / 8][4], const LoadQ& load_q, const unsigned char* sK) {
  constexpr unsigned kChunks = kD * sizeof(Cache) / 16;
  const unsigned lane = opaque_thread() % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rS[m][j][e] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    unsigned rQ[kM][4];
    load_q(lane, i, rQ);
    if constexpr (sizeof(Cache) == 1) {
#pragma unroll
      for (int j = 0; j < kN / 8; j += 4) {  // ldmatrix: 16 elements of 32 keys
        unsigned rK[4];
        ptx::load_matrices(rK, sK + 16 * swizzled<kChunks>(8 * j + lane, i));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          unsigned b0, b1;
          widen_bytes<T>(rK[n], b0, b1);
#pragma unroll
          for (int m = 0; m < kM; ++m) multiply<T>(rS[m][j + n], rQ[m], b0, b1);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kN / 8; j += 2) {  // ldmatrix: 16 elements of 16 keys
        unsigned rK[4];
        ptx::load_matrices(rK, sK + 16 * swizzled<kChunks>(8 * j + lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<T>(rS[m][j], rQ[m], rK[0], rK[2]);
          multiply<T>(rS[m][j + 1], rQ[m], rK[1], rK[3]);
        }
      }
    }
  }
}

// rO += weights V.
template <typename T, typename Cache, int kD, int kN, int kM>
__device__ __forceinline__ void add_values(float (&rO)[kM][kD / 8][4], const unsigned (&rP)[kM][kN / 16][4],
                                           const unsigned char* sV) {
  constexpr unsigned kChunks = kD * sizeof(Cache) / 16;
  const unsigned lane = opaque_thread() % 32;
#pragma unroll
  for (int j = 0; j < kD / 8; j += 2) {
    if constexpr (sizeof(Cache) == 1) {
#pragma unroll
      for (int i = 0; i < kN / 16; i += 2) {  // ldmatrix: 32 keys of 16 elements
        unsigned rV[4];
        ptx::load_matrices_transposed(rV, sV + 16 * swizzled<kChunks>(16 * i + lane, j / 2));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          unsigned even0, odd0, even1, odd1;
          widen_bytes<T>(rV[2 * n], even0, odd0);
          widen_bytes<T>(rV[2 * n + 1], even1, odd1);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            multiply<T>(rO[m][j], rP[m][i + n], even0, even1);
            multiply<T>(rO[m][j + 1], rP[m][i + n], odd0, odd1);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kN / 16; ++i) {  // ldmatrix: 16 keys of 16 elements
        unsigned rV[4];
        ptx::load_matrices_transposed(rV, sV + 16 * swizzled<kChunks>(16 * i + lane % 16, j + lane / 16));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply<T>(rO[m][j], rP[m][i], rV[0], rV[1]);
          multiply<T>(rO[m][j + 1], rP[m][i], rV[2], rV[3]);
        }
      }
    }
  }
}

// ---------------------------------------------------------------- softmax

// What f does to scores, see AttentionArgs.
template <int kM, int kJ>
__device__ __forceinline__ void transform(float (&rS)[kM][kJ][4], const AttentionArgs& a) {
  if (!a.scaled && !a.capped) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float z = rS[m][j][e] * a.factor;
        // The difference of 1 and 2 / (1 + 2^z) is off by 2^-24 at most: tanh to fp32's absolute accuracy.
        if (a.capped) z = a.cap * (1.0f - 2.0f * ptx::reciprocal(1.0f + ptx::exp2(z)));
        rS[m][j][e] = z;
      }
    }
  }
}

// Scores of keys that a row does not see become minus infinity. position(m, half): of rows g and g + 8 of each 16.
template <int kM, int kJ, typename Position>
__device__ __forceinline__ void hide(float (&rS)[kM][kJ][4], const AttentionArgs& a, int keys, int start,
                                     const Position& position) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // From this lane's first column on.
      const KeyRange seen = visible_keys(a, keys, position(m, half), position(m, half));
      const int begin = seen.begin - start - 2 * (static_cast<int>(threadIdx.x) % 4),
                end = begin + seen.end - seen.begin;
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e < begin || 8 * j + e >= end) rS[m][j][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

// Of rows g and g + 8 of each 16: the largest exponent so far, and the sum of this lane's weights relative to it.
template <int kM>
struct Softmax {
  float top[kM][2], total[kM][2];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[m][half] = -INFINITY;
        total[m][half] = 0.0f;
      }
    }
  }

  // Scores become weights relative to the new largest exponent, and what was summed before becomes so too.
  //
  // A weight is one fused multiply-add and one exp2; exponent z is rounded once, in `top`, not once more in each
  // difference. Where nothing is visible yet, -inf - -inf would be NaN. The result is whether any of the warp's has
  // moved: soon it is false, for the largest of the first keys is rarely surpassed.
  template <int kJ>
  __device__ __forceinline__ bool weigh(float (&rS)[kM][kJ][4], float exponent, float (&correction)[kM][2]) {
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;  // fmaxf drops a NaN; its weight is one, and so is the row's sum
#pragma unroll
        for (int j = 0; j < kJ; ++j) largest = fmaxf(largest, fmaxf(rS[m][j][2 * half], rS[m][j][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
        const float after = fmaxf(top[m][half], largest * exponent);
        const float shift = after == -INFINITY ? 0.0f : after;
        correction[m][half] = ptx::exp2(top[m][half] - shift);
        moved |= correction[m][half] != 1.0f;
        top[m][half] = after;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            rS[m][j][e] = ptx::exp2(fmaf(rS[m][j][e], exponent, -shift));
            sum += rS[m][j][e];
          }
        }
        total[m][half] = total[m][half] * correction[m][half] + sum;
      }
    }
    return __any_sync(kWholeWarp, moved);
  }
  template <int kColumns>
  __device__ __forceinline__ static void correct(float (&rO)[kM][kColumns][4], const float (&correction)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[m][j][e] *= correction[m][e / 2];
      }
    }
  }

  template <int kJ, int kColumns>
  __device__ __forceinline__ void weigh(float (&rS)[kM][kJ][4], float (&rO)[kM][kColumns][4], float exponent) {
    float correction[kM][2];
    if (weigh(rS, exponent, correction)) correct(rO, correction);
  }
};

// Weights, rounded to T, as operands a.
template <typename T, int kM, int kJ>
__device__ __forceinline__ void narrow_weights(unsigned (&rP)[kM][kJ / 2][4], const float (&rS)[kM][kJ][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < kJ / 2; ++i) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const float (&from)[4] = rS[m][2 * i + part / 2];
        rP[m][i][part] = narrow2<T>(from[part % 2 * 2], from[part % 2 * 2 + 1]);
      }
    }
  }
}

}  // namespace fastllm::cuda
