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
//                                  the first cache to registers, one step ahead: a warp waits for no other until the
//                                  sums of the parts are added
//   tiles = 2, 4, 8 (up to 64)     a team of 4 warps has 4 strips and a part of K, and shares x; two teams a block
//
// Weights, scales and a team's x are copied two stretches ahead (a stretch: up to 2 KB of a warp's weights) into a ring
// of three stages in shared memory, each lane's weights to where it reads them itself. With 16 warps on a
// multiprocessor some 64 KB are on their way, where 4.3 TB/s over 132 multiprocessors times 0.7 us of latency ask for
// 23 KB.
//
//   stage   | x: tokens of a team | a warp's weights: loads of 32 x 16 bytes | its scales, its minimums | next warp ..
//
// A stretch's scales are widened once, each by one lane, and read back as fp32: what a step does has no branch.
//
// Sums are added in a fixed order everywhere: the same arguments give the same bits.
#pragma once

#include <type_traits>

#include "dtypes.cuh"
#include "launch.h"

namespace fastllm::cuda {

constexpr int kStripRows = 32;
constexpr int kStepColumns = 32;
constexpr int kUnitSteps = 4;  // K is dealt out in units of 128 columns: whole groups
constexpr int kTokens = 8;     // of a tile
constexpr int kMostTiles = 8;  // of a pass; more tokens take several
constexpr int kMostWarps = 8;  // of a block
constexpr int kStages = 3;

struct ProductArgs {
  const void* x;          // (M, K) at a stride of x_stride elements: floats, or the integers of int8 activations
  const float* x_groups;  // int8: (M, num_x_groups, 2): scale, sum of the integers (int8_groups.cuh)
  const uint8_t* data;
  const uint8_t *scale, *minimum;
  const void* bias;
  void* out;  // (M, N) of out_dtype, or (splits, M, N) of float
  DType scale_dtype, out_dtype;
  int64_t x_stride, M, N;
  int K, lines, groups, steps;
  int group_shift;    // step >> group_shift is the weight's group
  int x_group_shift;  // int8: step >> x_group_shift is the group of x
  int num_x_groups;
  float center_minus_zero;  // w = u * scale + offset, offset = minimum + center_minus_zero * scale
  bool has_offset;
};

template <typename Math, int kTiles>
struct Form {
  static constexpr bool kSharedX = kTiles > 1;
  static constexpr int kTeamWarps = kSharedX ? 4 : 1;
  static constexpr int kTeamThreads = 32 * kTeamWarps;
  static constexpr int kRows = kStripRows * kTeamWarps;  // of a block
  // Steps of a stretch: three stages of two teams have to fit the 99 KB of desktop GPUs.
  static constexpr int kSteps = (kSharedX ? 2 : 4) / Math::kLoads;
  static constexpr int kWeights = kSteps * Math::kLoads * 32 * 16;
  // Where sums take half of the registers, the next step's loads would take more than are left.
  static constexpr int kUnroll = kTiles == kMostTiles ? 1 : kSteps;
  // A warp's scales and then its offsets, as fp32.
  static constexpr int kScales = kSteps * kStripRows;
  // A stage's x: rows of kSteps pieces, each the columns of a step.
  static constexpr int kPiece = kStepColumns * Math::kXBytes;
  static constexpr int kXRow = kSteps * kPiece;
  static constexpr int kX = kSharedX ? kTiles * kTokens * kXRow : 0;
  // A token's sums, padded by 16 bytes so that the 4 tokens that 8 lanes write meet 4 different groups of banks.
  static constexpr int kSumPitch = kRows + 4;

  // Pieces of a row change places so that rows which are read together lie in different banks: two where 8 lanes read
  // 16 bytes each, four where 16 lanes read 8.
  static __device__ __forceinline__ int swizzled(int token, int piece) {
    constexpr int kTogether = 128 / kPiece, kRowsOf128 = kXRow < 128 ? 128 / kXRow : 1;
    return piece ^ (token % kTogether / kRowsOf128);
  }
};

// A stretch's scales as they are stored: scales and then minimums; of both blocks; its groups of 16 rows.
template <int kSteps>
struct ScaleStage {
  int groups, group_log2, block_log2, bytes;  // groups: 1, 2 or 4; bytes of a group and of a block, by their logarithm

  FASTLLM_ON_BOTH static ScaleStage of(const ProductArgs& a) {
    ScaleStage stage;
    stage.groups = kSteps >> a.group_shift ? kSteps >> a.group_shift : 1;
    stage.group_log2 = a.scale_dtype == DType::f32 ? 6 : 5;
    stage.block_log2 = stage.group_log2 + stage.groups / 2;
    stage.bytes = (a.minimum ? 4 : 2) << stage.block_log2;
    return stage;
  }
};

// Four neighbouring scales.
__device__ __forceinline__ void load_scales(float (&to)[4], const unsigned char* from, DType dtype) {
  if (dtype == DType::f32) {
    const float4 raw = *reinterpret_cast<const float4*>(from);
    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
    return;
  }
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  if (dtype == DType::f16) {
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
__global__ void __launch_bounds__(32 * kMostWarps, kTiles == 1 ? 2 : 1) quant_product_kernel(ProductArgs a) {
  using F = Form<Math, kTiles>;
  using X = typename Math::X;  // a lane's 8 columns of a token
  constexpr int kLoads = Math::kLoads, kSteps = F::kSteps;
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  const int warp = threadIdx.x / 32, team = warp / F::kTeamWarps, teams = blockDim.x / F::kTeamThreads;
  const int strip = blockIdx.x * F::kTeamWarps + warp % F::kTeamWarps;
  const bool has_rows = strip * kStripRows < a.N;  // the last block's strips may lie below the weight
  const int64_t m0 = static_cast<int64_t>(blockIdx.z) * kMostTiles * kTokens;

  // This team's part of K.
  const int parts = gridDim.y * teams, part = blockIdx.y * teams + team;
  const int64_t units = (a.steps + kUnitSteps - 1) / kUnitSteps;
  const int first = static_cast<int>(units * part / parts) * kUnitSteps;
  const int end = static_cast<int>(units * (part + 1) / parts) * kUnitSteps;  // may lie past K, where all is 0

  // ---------------- from global to shared memory
  const auto scales = ScaleStage<kSteps>::of(a);
  const int stage_bytes = F::kX + F::kTeamWarps * (F::kWeights + scales.bytes);
  unsigned char* sTeam = shared_memory() + team * kStages * stage_bytes;
  // Where a stage holds this warp's weights.
  const int own = F::kX + warp % F::kTeamWarps * (F::kWeights + scales.bytes);

  // Rows past N: the last block is read once more, and what comes of it is not stored.
  const int blocks = static_cast<int>((a.N + 15) / 16);
  const auto block = [&](int half) { return 2 * strip + half < blocks ? 2 * strip + half : blocks - 1; };
  const int line0 = i * kLoads;
  const uint8_t* gW = a.data + ((static_cast<int64_t>(block(g / 4)) * a.lines + line0) * 64 + g % 4 * 16);
  const char* gX = static_cast<const char*>(a.x);
  const auto address = [&](int64_t token, int column) { return gX + (token * a.x_stride + column) * Math::kXBytes; };

  // A copy of no bytes does not read its source, which may then lie anywhere.
  const auto fetch_x = [&](unsigned char* sX, int step) {
    constexpr int kPerRow = F::kXRow / 16, kCopies = kTiles * kTokens * kPerRow;
#pragma unroll
    for (int copy = threadIdx.x % F::kTeamThreads; copy < kCopies; copy += F::kTeamThreads) {
      const int token = copy / kPerRow, byte = copy % kPerRow * 16;
      const int column = step * kStepColumns + byte / Math::kXBytes;
      ptx::copy_async_16(sX + token * F::kXRow + F::swizzled(token, byte / F::kPiece) * F::kPiece + byte % F::kPiece,
                         address(m0 + token, column), m0 + token < a.M && column < a.K ? 16 : 0);
    }
  };
  const auto fetch_weights = [&](unsigned char* sW, int step) {
    const uint8_t* from = gW + static_cast<int64_t>(step) * (4 * kLoads * 64);
    const int lines_left = a.lines - step * 4 * kLoads - line0;
#pragma unroll
    for (int load = 0; load < kSteps * kLoads; ++load) {
      const int line = load / kLoads * 4 * kLoads + load % kLoads;
      ptx::copy_async_16(sW + (load * 32 + lane) * 16, from + line * 64, line < lines_left ? 16 : 0);
    }
    const int group = step >> a.group_shift;
#pragma unroll
    for (int copy = 0; copy < 2; ++copy) {  // the second is fp32's
      const int byte = (copy * 32 + lane) * 16;
      if (byte >= scales.bytes) break;
      const int which = byte >> scales.block_log2, within = byte & ((1 << scales.block_log2) - 1);
      const bool there = group + (within >> scales.group_log2) < a.groups;
      const int64_t at = ((static_cast<int64_t>(block(which % 2)) * a.groups + group) << scales.group_log2) + within;
      ptx::copy_async_16(sW + F::kWeights + byte, (which < 2 ? a.scale : a.minimum) + at, there ? 16 : 0);
    }
  };
  const auto fetch = [&](int slot, int step) {
    unsigned char* stage = sTeam + slot * stage_bytes;
    if (step < end) {
      if constexpr (F::kSharedX) fetch_x(stage, step);
      if (has_rows) fetch_weights(stage + own, step);
    }
    ptx::commit_copies();  // an empty group too: waiting counts groups
  };

  // ---------------- the products
  float rAcc[kTiles][2][4] = {};
  typename Math::Sums rSums[Math::kHeldSums ? kTiles : 1];
#pragma unroll
  for (auto& sums : rSums) Math::clear(sums);
  // A lane's own x, where it is not shared.
  const char* gOwnX = address(m0 + g, 8 * i);
  const int own_columns = m0 + g < a.M ? a.K - 8 * i : 0;
  const auto load_x = [&](int step) {
    const int column = step * kStepColumns;
    return column < own_columns ? *reinterpret_cast<const X*>(gOwnX + static_cast<int64_t>(column) * Math::kXBytes)
                                : X{};
  };
  X rX{};
  if constexpr (!F::kSharedX) rX = load_x(first);

  float* sScales = reinterpret_cast<float*>(shared_memory() + teams * kStages * stage_bytes) + warp * 2 * F::kScales;
  const float* sOwnScales = sScales + g / 4 * scales.groups * 16 + g % 4 * 4;  // of this lane's rows
  const auto widen_scales = [&](const unsigned char* sRaw) {
    if (lane < 8 * scales.groups) {  // four rows of a group each
      const int quarter = 1 << (scales.group_log2 - 2);
      float scale[4], offset[4] = {};
      load_scales(scale, sRaw + lane * quarter, a.scale_dtype);
      if (a.minimum) load_scales(offset, sRaw + (2 << scales.block_log2) + lane * quarter, a.scale_dtype);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        offset[j] = fmaf(a.center_minus_zero, scale[j], offset[j]);
        scale[j] *= Math::kUnit;
      }
      *reinterpret_cast<float4*>(sScales + 4 * lane) = {scale[0], scale[1], scale[2], scale[3]};
      *reinterpret_cast<float4*>(sScales + F::kScales + 4 * lane) = {offset[0], offset[1], offset[2], offset[3]};
    }
    __syncwarp();
  };
  const auto multiply = [&](auto offset_tag, const unsigned char* sX, const unsigned char* sW, int stretch) {
    constexpr bool kOffset = decltype(offset_tag)::value;
#pragma unroll F::kUnroll
    for (int s = 0; s < kSteps; ++s) {
      const int step = stretch + s;
      const float* sScale = sOwnScales + (s >> a.group_shift) * 16;
      const float4 scale = *reinterpret_cast<const float4*>(sScale);
      const float4 offset = kOffset ? *reinterpret_cast<const float4*>(sScale + F::kScales) : float4{};
      const float rScale[4] = {scale.x, scale.y, scale.z, scale.w};
      const float rOffset[4] = {offset.x, offset.y, offset.z, offset.w};
      uint4 rW[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
        rW[load] = *reinterpret_cast<const uint4*>(sW + ((s * kLoads + load) * 32 + lane) * 16);
      unsigned rU[4][Math::kRegisters];
      Math::unpack(rU, rW);
      [[maybe_unused]] X rNext{};
      if constexpr (!F::kSharedX) rNext = load_x(step + 1);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        [[maybe_unused]] const int token = t * kTokens + g;
        if constexpr (F::kSharedX)
          rX = *reinterpret_cast<const X*>(sX + token * F::kXRow + F::swizzled(token, s) * F::kPiece + i * sizeof(X));
        auto& sums = rSums[Math::kHeldSums ? t : 0];
        const auto b = Math::operand(rX);
        Math::multiply(sums, rU, b);
        if (Math::closes(a, step)) {
          Math::template close<kOffset>(rAcc[t], sums, rScale, rOffset, b, a, step, m0 + t * kTokens + 2 * i);
          Math::clear(sums);
        }
      }
      if constexpr (!F::kSharedX) rX = rNext;
    }
  };

#pragma unroll
  for (int slot = 0; slot < kStages - 1; ++slot) fetch(slot, first + slot * kSteps);
  int slot = 0;
#pragma unroll 1
  for (int stretch = first; stretch < end; stretch += kSteps) {
    ptx::wait_for_copies<kStages - 2>();
    // Everyone's copies have arrived, and everyone is done with the stage before, which is the next to be filled.
    if constexpr (F::kSharedX) {
      ptx::barrier(1 + team, F::kTeamThreads);
    } else {
      __syncwarp();
    }
    fetch(slot == 0 ? kStages - 1 : slot - 1, stretch + (kStages - 1) * kSteps);
    const unsigned char* sX = sTeam + slot * stage_bytes;
    slot = slot == kStages - 1 ? 0 : slot + 1;
    if (!has_rows) continue;
    widen_scales(sX + own + F::kWeights);
    if (a.has_offset) {
      multiply(std::true_type(), sX, sX + own, stretch);
    } else {
      multiply(std::false_type(), sX, sX + own, stretch);
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
  const int teams = cut.warps / F::kTeamWarps;
  const size_t warp = F::kWeights + ScaleStage<F::kSteps>::of(a).bytes;
  const size_t ring = teams * kStages * (F::kX + F::kTeamWarps * warp) + cut.warps * 2 * F::kScales * sizeof(float);
  const size_t sums = sizeof(float) * teams * kTiles * kTokens * F::kSumPitch;
  const Shape shape{dim3(ceil_div(a.N, F::kRows), cut.splits, passes), 32 * cut.warps, ring > sums ? ring : sums};
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
  int group, num_groups;
  int8_t* q;        // (M, num_groups * group), columns past K are 0
  float* x_groups;  // (M, num_groups, 2): scale, sum of the integers
};
void quantize_activations(const QuantizeArgs& a, Place place);

}  // namespace fastllm::cuda
