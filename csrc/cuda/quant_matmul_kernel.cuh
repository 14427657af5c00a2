// A product of few tokens with a weight of 4 or 8 bits, for float and for int8 activations alike: how weights, scales
// and activations travel. What is done with them (Math) stands in quant_matmul.cu and quant_matmul_int8.cu.
//
// The weight is the LEFT operand of the matrix instruction, because that side has 16 rows and takes them from registers
// as they were loaded; 8 tokens are the 8 columns of its narrow side. With g = lane / 4 and i = lane % 4, a warp's step
// is a strip of 32 rows (two blocks of the layout) and 32 columns:
//
//            a line of 64 bytes: 16 rows, a dword each (4 bits: 8 columns, 8 bits: 4)
//             rows 0-3       4-7       8-11      12-15
//   line i   [16 bytes] [16 bytes] [16 bytes] [16 bytes]      i = 0..3  (8 bits: lines 2 i and 2 i + 1)
//   block 0     g = 0       1          2          3           lane (g, i) loads 16 bytes: its columns of 4 rows
//   block 1     g = 4       5          6          7
//
// Row j of lane g is row 4 g + j of the strip. The instruction does not care which row of ours it calls g and which g +
// 8, nor in which order the columns come as long as x's come in the same: rows 0 and 1 of a lane are rows g and g + 8
// of a first tile, rows 2 and 3 of a second, and a lane's columns are those of its own lines. So weights go from memory
// to registers to the matrix unit without passing another lane, 4 scales of a lane are one load, and the right operand
// of lane (token g, i) is 8 neighbouring elements of x. Sums come out as rows 4 g + j of tokens 2 i and 2 i + 1.
//
//   tiles = 1 (up to 8 tokens)     every warp of a block has the same strip and a part of K of its own; x goes from
//                                  the first cache to registers, one step ahead: nobody waits for anybody until the
//                                  sums of the parts are added
//   tiles = 2, 4, 8 (up to 64)     a team of 4 warps has 4 strips and a part of K; x goes through a ring of stages in
//                                  shared memory, which a team fills for itself; teams add their sums at the end
//
// Weights and scales are loaded one stretch ahead, 64 bytes of weights a lane, into the registers that have just been
// used: 2 KB a warp are on their way at any time, 32 KB a multiprocessor with 16 warps, where 4.3 TB/s over 132
// multiprocessors times 0.7 us of latency ask for 23 KB.
//
// Sums are added in a fixed order everywhere: the same arguments give the same bits.
#pragma once

#include "dtypes.cuh"
#include "launch.h"

namespace fastllm::cuda {

constexpr int kStripRows = 32;
constexpr int kStepColumns = 32;
constexpr int kUnitSteps = 4;   // K is dealt out in units of 128 columns: whole groups
constexpr int kTokens = 8;      // of a tile
constexpr int kMostTiles = 8;   // of a pass; more tokens take several
constexpr int kTeams = 2;       // of a block whose x is shared
constexpr int kMostWarps = 16;  // of a block whose x is not

struct ProductArgs {
  const void* x;          // (M, K) at a stride of x_stride elements: floats, or integers of int8 activations
  int64_t x_stride;       //
  const float* x_groups;  // int8: (groups of x, x_tokens, 2): scale and scale * sum of integers
  const uint8_t* data;    //
  const void *scale, *minimum, *bias;
  void* out;  // (M, N) of out_dtype, or (splits, M, N) of float
  DType scale_dtype, out_dtype;
  int64_t M, N;  //
  int K, lines, groups, steps;
  int group_shift;          // step >> group_shift is the group of the weight
  int group_mask;           // step & group_mask is 0 where one may begin
  int x_group_mask;         // int8: (step + 1) & x_group_mask is 0 where a group of x ends
  int x_tokens;             //
  float center_minus_zero;  // w = u * scale + offset, offset = minimum + center_minus_zero * scale
  bool has_offset;
};

template <typename Math, int kTiles>
struct Form {
  static constexpr bool kSharedX = kTiles > 1;
  static constexpr int kTeamWarps = kSharedX ? 4 : 1;
  static constexpr int kTeamThreads = 32 * kTeamWarps;
  static constexpr int kRows = kStripRows * kTeamWarps;  // of a block
  static constexpr int kMostThreads = kSharedX ? kTeams * kTeamThreads : 32 * kMostWarps;
  static constexpr int kSteps = kUnitSteps / Math::kLoads;  // of a stretch: 4 loads of 16 bytes
  // A stage of x: rows of kSteps pieces of kPiece bytes, the columns of a step.
  static constexpr int kPiece = kStepColumns * Math::kXBytes;
  static constexpr int kStageRow = kSteps * kPiece;
  static constexpr int kStage = kTiles * kTokens * kStageRow;
  static constexpr int kStages = 3;
  // A token's sums, padded by 16 bytes so that the 4 tokens a quarter of a warp writes meet 4 different groups of
  // banks.
  static constexpr int kSumPitch = kRows + 4;

  // Pieces of a row are swapped so that the rows which are read together (8 lanes of 16 bytes: 2 of them; 16 lanes of 8
  // bytes: 4) lie in different banks.
  static __device__ __forceinline__ int swizzled(int token, int piece) {
    if (kPiece == 64) return piece ^ (token & 1);
    return piece ^ (kSteps == 4 ? token & 3 : token >> 1 & 1);
  }
  static size_t shared_bytes(int teams) {
    const size_t sums = sizeof(float) * teams * kTiles * kTokens * kSumPitch;
    const size_t ring = kSharedX ? static_cast<size_t>(teams) * kStages * kStage : 0;
    return sums > ring ? sums : ring;
  }
};

// Four scales as they are stored: 8 or 16 bytes.
__device__ __forceinline__ uint4 load_scales(const void* scales, DType dtype, int64_t at) {
  if (dtype == DType::f32) return *reinterpret_cast<const uint4*>(static_cast<const float*>(scales) + at);
  const uint2 half = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(scales) + at);
  return {half.x, half.y, 0, 0};
}
__device__ __forceinline__ void widen_scales(float (&to)[4], uint4 raw, DType dtype) {
  if (dtype == DType::f32) {
    to[0] = __uint_as_float(raw.x), to[1] = __uint_as_float(raw.y);
    to[2] = __uint_as_float(raw.z), to[3] = __uint_as_float(raw.w);
  } else if (dtype == DType::f16) {
    to[0] = ptx::f32_of_f16(static_cast<uint16_t>(raw.x)), to[1] = ptx::f32_of_f16(static_cast<uint16_t>(raw.x >> 16));
    to[2] = ptx::f32_of_f16(static_cast<uint16_t>(raw.y)), to[3] = ptx::f32_of_f16(static_cast<uint16_t>(raw.y >> 16));
  } else {
    to[0] = __uint_as_float(raw.x << 16), to[1] = __uint_as_float(raw.x & 0xffff0000u);
    to[2] = __uint_as_float(raw.y << 16), to[3] = __uint_as_float(raw.y & 0xffff0000u);
  }
}

__device__ __forceinline__ float load_float(const void* from, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[at];
  const uint16_t bits = static_cast<const uint16_t*>(from)[at];
  return dtype == DType::bf16 ? widen(bf16{bits}) : widen(f16{bits});
}
__device__ __forceinline__ void store_float(void* to, DType dtype, int64_t at, float x) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[at] = x;
  } else {
    static_cast<uint16_t*>(to)[at] = dtype == DType::bf16 ? narrow<bf16>(x).bits : narrow<f16>(x).bits;
  }
}

template <typename Math, int kTiles>
__global__ void __launch_bounds__((Form<Math, kTiles>::kMostThreads), 1) quant_product_kernel(ProductArgs a) {
  using F = Form<Math, kTiles>;
  using X = typename Math::X;  // a lane's 8 columns of a token
  constexpr int kLoads = Math::kLoads, kSteps = F::kSteps;
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  const int warp = threadIdx.x / 32, team = warp / F::kTeamWarps;
  const int teams = blockDim.x / F::kTeamThreads;
  const int strip = blockIdx.x * F::kTeamWarps + warp % F::kTeamWarps;
  const bool has_rows = strip * kStripRows < a.N;  // the last block's strips may lie below the weight
  const int64_t m0 = static_cast<int64_t>(blockIdx.z) * kMostTiles * kTokens;

  // This team's part of K.
  const int parts = gridDim.y * teams, part = blockIdx.y * teams + team;
  const int64_t units = (a.steps + kUnitSteps - 1) / kUnitSteps;
  const int first = static_cast<int>(units * part / parts) * kUnitSteps;
  const int last = static_cast<int>(units * (part + 1) / parts) * kUnitSteps;
  const int end = last < a.steps ? last : a.steps;

  // ---------------- weights and their scales, one stretch ahead
  const int blocks = static_cast<int>((a.N + 15) / 16);
  const int own = 2 * strip + g / 4, block = own < blocks ? own : blocks - 1;
  const uint8_t* gW = a.data + (static_cast<int64_t>(block) * a.lines * 64 + g % 4 * 16);
  const int64_t scale_row = static_cast<int64_t>(block) * a.groups * 16 + g % 4 * 4;
  uint4 rW[kSteps][kLoads], rRawScale[kSteps], rRawMinimum[kSteps];
  const auto load_step = [&](int s, int step) {
    if (step >= end) return;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int line = (step * 4 + i) * kLoads + load;
      rW[s][load] = line < a.lines ? ptx::load_once(gW + static_cast<int64_t>(line) * 64) : uint4{0, 0, 0, 0};
    }
    if ((s & a.group_mask) == 0) {
      const int64_t at = scale_row + static_cast<int64_t>(step >> a.group_shift) * 16;
      rRawScale[s] = load_scales(a.scale, a.scale_dtype, at);
      if (a.minimum) rRawMinimum[s] = load_scales(a.minimum, a.scale_dtype, at);
    }
  };

  // ---------------- activations
  const char* gX = static_cast<const char*>(a.x);
  // 16 bytes of x that exist begin at `column` of a token.
  const auto exists = [&](int64_t token, int column) { return token < a.M && column < a.K; };
  const auto address = [&](int64_t token, int column) { return gX + (token * a.x_stride + column) * Math::kXBytes; };
  const auto load_x = [&](int step) {
    const int column = step * kStepColumns + 8 * i;
    return exists(m0 + g, column) ? *reinterpret_cast<const X*>(address(m0 + g, column)) : X{};
  };
  unsigned char* sX = shared_memory() + team * F::kStages * F::kStage;
  const auto fetch_x = [&](int step) {  // a team's stage
    if (step < end) {
      unsigned char* stage = sX + (step - first) / kSteps % F::kStages * F::kStage;
      constexpr int kPerRow = F::kStageRow / 16, kCopies = kTiles * kTokens * kPerRow;
#pragma unroll
      for (int copy = threadIdx.x % F::kTeamThreads; copy < kCopies; copy += F::kTeamThreads) {
        const int token = copy / kPerRow, byte = copy % kPerRow * 16;
        const int column = step * kStepColumns + byte / Math::kXBytes;
        const bool there = exists(m0 + token, column);
        ptx::copy_async_16(
            stage + token * F::kStageRow + F::swizzled(token, byte / F::kPiece) * F::kPiece + byte % F::kPiece,
            there ? address(m0 + token, column) : gX, there ? 16 : 0);
      }
    }
    ptx::commit_copies();
  };

  // ---------------- the products
  float rAcc[kTiles][2][4] = {}, rScale[4], rOffset[4];
  typename Math::Sums rSums[Math::kHeldSums ? kTiles : 1];
#pragma unroll
  for (auto& sums : rSums) Math::clear(sums);
  X rX{};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    rRawMinimum[s] = uint4{0, 0, 0, 0};
    if (has_rows) load_step(s, first + s);
  }
  if constexpr (F::kSharedX) {
#pragma unroll
    for (int stage = 0; stage < F::kStages - 1; ++stage) fetch_x(first + stage * kSteps);
  } else {
    rX = load_x(first);
  }
#pragma unroll 1
  for (int stretch = first; stretch < end; stretch += kSteps) {
    const unsigned char* stage = sX + (stretch - first) / kSteps % F::kStages * F::kStage;
    if constexpr (F::kSharedX) {
      ptx::wait_for_copies<F::kStages - 2>();
      // Everyone's copies have arrived, and everyone is done with the stage before: it is the next to be filled.
      ptx::barrier(1 + team, F::kTeamThreads);
      fetch_x(stretch + (F::kStages - 1) * kSteps);
      if (!has_rows) continue;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int step = stretch + s;
      if (step >= end) break;
      if ((s & a.group_mask) == 0) {
        widen_scales(rScale, rRawScale[s], a.scale_dtype);
        widen_scales(rOffset, rRawMinimum[s], a.scale_dtype);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          rOffset[j] = fmaf(a.center_minus_zero, rScale[j], rOffset[j]);
          rScale[j] *= Math::kUnit;
        }
      }
      unsigned rU[4][Math::kRegisters];
      Math::unpack(rU, rW[s]);
      load_step(s, step + kSteps);
      X rXNext{};
      if constexpr (!F::kSharedX) rXNext = load_x(step + 1);
      const bool closes = ((step + 1) & Math::x_group_mask(a)) == 0 || step + 1 == end;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if constexpr (F::kSharedX) {
          const int token = t * kTokens + g;
          rX = *reinterpret_cast<const X*>(stage + token * F::kStageRow + F::swizzled(token, s) * F::kPiece +
                                           i * (F::kPiece / 4));
        }
        auto& sums = rSums[Math::kHeldSums ? t : 0];
        const auto b = Math::operand(rX);
        Math::multiply(sums, rU, b);
        if (closes) {
          Math::close(rAcc[t], sums, rScale, rOffset, b, a, step, m0 + t * kTokens + 2 * i);
          Math::clear(sums);
        }
      }
      if constexpr (!F::kSharedX) rX = rXNext;
    }
  }

  // ---------------- the teams' sums, in their order
  float* sSums = reinterpret_cast<float*>(shared_memory());
  __syncthreads();  // it was the ring's memory
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = t * kTokens + 2 * i + c, row = warp % F::kTeamWarps * kStripRows + 4 * g;
      *reinterpret_cast<float4*>(&sSums[(team * kTiles * kTokens + token) * F::kSumPitch + row]) = {
          rAcc[t][0][c], rAcc[t][0][2 + c], rAcc[t][1][c], rAcc[t][1][2 + c]};
    }
  }
  __syncthreads();
  for (int element = threadIdx.x; element < kTiles * kTokens * F::kRows; element += blockDim.x) {
    const int token = element / F::kRows, row = element % F::kRows;
    const int64_t m = m0 + token, n = static_cast<int64_t>(blockIdx.x) * F::kRows + row;
    if (m >= a.M || n >= a.N) continue;
    float sum = a.bias ? load_float(a.bias, a.out_dtype, n) : 0.0f;
    for (int from = 0; from < teams; ++from) sum += sSums[(from * kTiles * kTokens + token) * F::kSumPitch + row];
    store_float(a.out, a.out_dtype, (blockIdx.y * a.M + m) * a.N + n, sum);
  }
}

// How a product is cut into blocks.
struct Cut {
  int tiles, warps, splits;
};

template <typename Math, int kTiles>
void launch_product(const ProductArgs& a, const Cut& cut, Place place) {
  using F = Form<Math, kTiles>;
  const int passes = ceil_div(a.M, kMostTiles * kTokens);
  const Shape shape{dim3(ceil_div(a.N, F::kRows), cut.splits, passes), 32 * cut.warps,
                    F::shared_bytes(cut.warps / F::kTeamWarps)};
  launch("quant_matmul", quant_product_kernel<Math, kTiles>, shape, a, place);
}

template <typename Math>
void launch_product(const ProductArgs& a, const Cut& cut, Place place) {
  if (cut.tiles == 1) return launch_product<Math, 1>(a, cut, place);
  if (cut.tiles == 2) return launch_product<Math, 2>(a, cut, place);
  if (cut.tiles == 4) return launch_product<Math, 4>(a, cut, place);
  return launch_product<Math, 8>(a, cut, place);
}

// quant_matmul_int8.cu
void launch_int8_product(const ProductArgs& a, int bits, const Cut& cut, Place place);
struct QuantizeArgs {
  const void* x;  // (M, K), row starts at x_rows
  DType dtype;
  Rows x_rows;
  int64_t M, K;
  int group, groups, tokens;  // tokens: M and padding, whose scales are 0
  int8_t* q;                  // (tokens, groups * group), columns past K are 0
  float* x_groups;            // (groups, tokens, 2)
};
void quantize_activations(const QuantizeArgs& a, Place place);

}  // namespace fastllm::cuda
