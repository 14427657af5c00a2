// attention for many queries on sm_90: one warpgroup copies with the copy engine (TMA), two multiply with wgmma.
//
//   block      128 queries of one head
//   warpgroup  0: one thread asks for q, then for K 0, V 0, K 1, V 1, ..., each as soon as a slot is free
//              1, 2: 64 of the queries each; scores, weights and sums in registers, q, K and V in shared memory
//
//   shared     | q of 1 | q of 2 | slot 0: K 0 | slot 1: V 0 | slot 2: K 1 | ... | barriers |
//              160 KiB at D = 128, where there are 4 slots, and 144 KiB at D = 64, where there are 8
//
//   a slot     D / 64 pieces, one after the other, each of kN rows (keys) of 64 elements: 128 bytes, as wide as the
//              swizzle of the copy engine and of wgmma. Chunk c of 16 bytes of row r lies at chunk c ^ r % 8.
//
//   K, as b of q K^T: k is D, the rows' direction         V, as b of P V: k is keys, across the rows
//
//         64 elements  (next piece)                             64 columns   (next piece)
//       +--+--+--+--+                                         +--------------+
//     8 |  |  |  |  | k16: 32 bytes on, or a piece          8 |______________| k16: two of these, 2048 bytes on
//       +--+--+--+--+                                       8 |______________|   stride offset: 1024 bytes, 8 keys
//     8 |  |  |  |  | stride offset: 1024 bytes, 8 rows       |              |   leading offset: a piece, 64 columns
//
//   full[slot]   ends a phase when a tile's bytes have arrived: consumers wait for it.
//   empty[slot]  ends a phase when all 8 warps of the consumers are through with it: the producer waits for it.
//
//   tensor cores  | q K 0 |           | q K 1, P 0 V 0 -->       | q K 2, P 1 V 1 -->     | of one consumer; the
//   other units           | softmax 0 |        | softmax 1, O *= c 1 |       | softmax 2, ...  other fills the gaps
//
// The product of a tile's weights with V is under way beside the next tile's softmax, and O is made relative to that
// one's largest score when both are done. wgmma's sums lie in registers as mma's do, and so do weights as operand a:
// attention_tile.cuh has the softmax for both kernels.
//
// Flops: 4 D for each pair of a query and a key. Bytes: K and V once for each 128 queries, from L2 after the first: 128
// flops a byte, so that an H200's 790 TFLOP/s would take 6 TB/s of L2, about what it gives. Clocks of a multiprocessor
// for 128 queries and a tile: 1024 (D = 64) or 2048 (D = 128) of its tensor cores; 1024 for the exp2, 16 a clock; some
// 800 for the softmax's other instructions. At D = 64 softmax takes as long as the products and is not hidden whole.
//
// Expected for T = 8192, causal: 60 to 70 % of 790 TFLOP/s at D = 128, 45 to 55 % at D = 64. No GPU has run this
// kernel: it stands on the PTX ISA, on what the compiler makes of it, and on tests/simt's executor.
#include "attention_tile.cuh"
#include "tensor_map.h"

namespace fastllm::cuda {
namespace {

struct PrefillArgs {
  TensorMap q, k, v;
  AttentionArgs attention;
};

constexpr int kWarpgroup = 128;
constexpr int kPieceColumns = 64;  // of 16 bits: the 128 bytes of the swizzle

template <int kHeadDim>
struct Sm90Tile {
  static constexpr int kD = kHeadDim;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kRows = 64;  // of a consumer: wgmma's
  static constexpr int kBlockM = kConsumers * kRows;
  static constexpr int kN = 128;
  static constexpr int kSlots = kD == 64 ? 8 : 4;
  static constexpr int kPieces = kD / kPieceColumns;
  static constexpr int kRowBytes = 2 * kD;
  static constexpr int kQBytes = kRows * kRowBytes;  // of a consumer
  static constexpr int kTileBytes = kN * kRowBytes;
  static constexpr int kBarriers = 1 + 2 * kSlots;
  static constexpr int kSharedBytes = kConsumers * kQBytes + kSlots * kTileBytes + 8 * kBarriers;
  static_assert(kSharedBytes <= 227 << 10);
  // 65536 registers a multiprocessor, 168 a thread when the block starts.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
};

// Which slot a tile of the ring lies in, and which of its phases: tile 2 i is K i, tile 2 i + 1 is V i.
template <int kSlots>
struct Turn {
  int slot;
  unsigned parity;
  __device__ __forceinline__ explicit Turn(int step) : slot(step % kSlots), parity(step / kSlots % 2) {}
};

// wgmma's description of a matrix in shared memory with the 128-byte swizzle. PTX ISA 9.7.15.5.1.2.2.
__device__ __forceinline__ uint64_t describe(const void* s_matrix, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return ptx::shared_address(s_matrix) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128;
}
constexpr int kEightRows = 8 * 2 * kPieceColumns;

// Starts rS = q K^T, a group of its own. Both are rows of D.
template <typename T, typename Tile>
__device__ __forceinline__ void start_scores(float (&rS)[Tile::kN / 8][4], const unsigned char* sQ,
                                             const unsigned char* sK) {
  ptx::fence_registers();
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) {
    // The leading offset counts only for what is wider than the swizzle.
    const uint64_t q = describe(sQ + piece * Tile::kQBytes / Tile::kPieces, 16, kEightRows);
    const uint64_t k = describe(sK + piece * Tile::kTileBytes / Tile::kPieces, 16, kEightRows);
#pragma unroll
    for (int i = 0; i < kPieceColumns / 16; ++i) {  // 32 bytes of each row
      if constexpr (std::is_same_v<T, bf16>) {
        ptx::multiply_tiles_bf16(rS, q + i * 32 / 16, k + i * 32 / 16, piece + i > 0);
      } else {
        ptx::multiply_tiles_f16(rS, q + i * 32 / 16, k + i * 32 / 16, piece + i > 0);
      }
    }
  }
  ptx::commit_products();
}

// Starts rO += weights V, a group of its own.
template <typename T, typename Tile>
__device__ __forceinline__ void start_values(float (&rO)[Tile::kD / 8][4], const unsigned (&rP)[Tile::kN / 16][4],
                                             const unsigned char* sV) {
  const uint64_t v = describe(sV, Tile::kTileBytes / Tile::kPieces, kEightRows);
  ptx::fence_registers();
#pragma unroll
  for (int i = 0; i < Tile::kN / 16; ++i) {
    if constexpr (std::is_same_v<T, bf16>) {
      ptx::multiply_weights_bf16(rO, rP[i], v + i * 2 * kEightRows / 16);
    } else {
      ptx::multiply_weights_f16(rO, rP[i], v + i * 2 * kEightRows / 16);
    }
  }
  ptx::commit_products();
}

template <typename Tile>
__device__ __forceinline__ void copy_rows(unsigned char* to, int rows, const TensorMap& map, uint64_t* barrier,
                                          int token, int head, int b) {
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) {
    ptx::copy_box(to + piece * rows * 2 * kPieceColumns, &map, barrier, piece * kPieceColumns, token, head, b);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90Tile<kHeadDim>::kThreads, 1)
    attention_prefill_sm90_kernel(const __grid_constant__ PrefillArgs p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTLLM_SIMT)
  using Tile = Sm90Tile<kHeadDim>;
  using RingTurn = Turn<Tile::kSlots>;
  constexpr int kD = Tile::kD, kN = Tile::kN, kSlots = Tile::kSlots;
  const AttentionArgs& a = p.attention;
  const int h = blockIdx.x % a.H, b = blockIdx.x / a.H, head = h / (a.H / a.Hk);
  // Causal: the last queries see the most keys and go first, so that no long block is left at the end.
  const int t0 = static_cast<int>(gridDim.y - 1 - blockIdx.y) * Tile::kBlockM;
  const int keys = count_keys(a, b), position0 = keys - a.T;
  const KeyRange block_sees = visible_keys(a, keys, position0 + t0, position0 + min(t0 + Tile::kBlockM, a.T) - 1);
  const int first_tile = block_sees.begin / kN;
  const int tiles = max(0, (block_sees.end + kN - 1) / kN - first_tile);

  unsigned char* const sQ = shared_memory();
  unsigned char* const sRing = sQ + Tile::kConsumers * Tile::kQBytes;
  uint64_t* const sQFull = reinterpret_cast<uint64_t*>(sRing + kSlots * Tile::kTileBytes);
  uint64_t* const sFull = sQFull + 1;
  uint64_t* const sEmpty = sFull + kSlots;
  if (threadIdx.x == 0) {
    ptx::init_barrier(sQFull, 1);
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::init_barrier(sFull + slot, 1);
      ptx::init_barrier(sEmpty + slot, Tile::kConsumers * kWarpgroup / 32);
    }
    ptx::fence_async_proxy();
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    ptx::give_up_registers<Tile::kProducerRegisters>();
    if (threadIdx.x != 0 || tiles == 0) return;
    ptx::arrive_expecting(sQFull, Tile::kConsumers * Tile::kQBytes);
    for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
      copy_rows<Tile>(sQ + consumer * Tile::kQBytes, Tile::kRows, p.q, sQFull, t0 + consumer * Tile::kRows, h, b);
    }
    for (int step = 0; step < 2 * tiles; ++step) {
      const RingTurn turn(step);
      ptx::wait_for_phase(sEmpty + turn.slot, turn.parity ^ 1);  // the first time round at once
      ptx::arrive_expecting(sFull + turn.slot, Tile::kTileBytes);
      copy_rows<Tile>(sRing + turn.slot * Tile::kTileBytes, kN, step % 2 == 0 ? p.k : p.v, sFull + turn.slot,
                      (first_tile + step / 2) * kN, head, b);
    }
    return;
  }

  ptx::take_registers<Tile::kConsumerRegisters>();
  const int consumer = threadIdx.x / kWarpgroup - 1, thread = threadIdx.x % kWarpgroup;
  const int warp = thread / 32, lane = threadIdx.x % 32;
  const int group_barrier = 1 + consumer;  // 0 is the block's
  unsigned char* const sMyQ = sQ + consumer * Tile::kQBytes;
  // Rows g and g + 8 of this warp's 16.
  const int warp_t0 = t0 + consumer * Tile::kRows + warp * 16, warp_last = min(warp_t0 + 16, a.T) - 1;
  const KeyRange every = visible_keys(a, keys, position0 + warp_last, position0 + warp_t0);
  const auto position = [&](int, int half) { return position0 + warp_t0 + 8 * half + lane / 4; };

  const auto await = [&](int step) {
    const RingTurn turn(step);
    ptx::wait_for_phase(sFull + turn.slot, turn.parity);
    return sRing + turn.slot * Tile::kTileBytes;
  };
  const auto release = [&](int step) {
    if (lane == 0) ptx::arrive(sEmpty + RingTurn(step).slot);
  };

  // As attention_tile.cuh has them, with one tile of 16 rows a warp.
  float rS[1][kN / 8][4], rO[1][kD / 8][4] = {};
  unsigned rP[1][kN / 16][4];
  Softmax<1> softmax;
  softmax.start();
  const auto weigh = [&](int tile, float (&correction)[1][2]) {
    const int start = (first_tile + tile) * kN;
    transform(rS, a);
    if (start < every.begin || start + kN > every.end) hide(rS, a, keys, start, position);
    return softmax.weigh(rS, a.exponent, correction);
  };

  if (tiles > 0) {
    float correction[1][2];
    ptx::wait_for_phase(sQFull, 0);
    const unsigned char* sK = await(0);
    start_scores<T, Tile>(rS[0], sMyQ, sK);
    ptx::wait_for_products<0>(rS[0]);
    release(0);
    weigh(0, correction);
    narrow_weights<T>(rP, rS);
    for (int tile = 1; tile < tiles; ++tile) {
      const int k_step = 2 * tile, v_step = 2 * tile - 1;
      sK = await(k_step);
      start_scores<T, Tile>(rS[0], sMyQ, sK);
      const unsigned char* const sV = await(v_step);
      start_values<T, Tile>(rO[0], rP[0], sV);
      ptx::wait_for_products<1>(rS[0]);
      release(k_step);
      const bool moved = weigh(tile, correction);
      ptx::wait_for_products<0>(rO[0]);
      release(v_step);
      if (moved) softmax.correct(rO, correction);
      narrow_weights<T>(rP, rS);
    }
    // The last tile's values. Behind block_sees.end lies what nobody sees: zeros of the copy engine, or a cache's rows
    // that no token has been written to, which may hold NaN. Their weights are 0, but 0 NaN is NaN: they become zeros
    // here. Each consumer does this for itself; where the other has done it, zeros are written over zeros.
    unsigned char* const sV = await(2 * tiles - 1);
    const int there = block_sees.end - (first_tile + tiles - 1) * kN;
    if (there < kN) {
      constexpr int kRowChunks = 2 * kPieceColumns / 16;
      for (int at = there * kRowChunks + thread; at < kN * kRowChunks; at += kWarpgroup) {
#pragma unroll
        for (int piece = 0; piece < Tile::kPieces; ++piece) {
          *reinterpret_cast<uint4*>(sV + piece * kN * 2 * kPieceColumns + 16 * at) = {0, 0, 0, 0};
        }
      }
      ptx::fence_async_proxy();
      ptx::barrier(group_barrier, kWarpgroup);
    }
    start_values<T, Tile>(rO[0], rP[0], sV);
    ptx::wait_for_products<0>(rO[0]);
  }

  // Out through this warp's part of q's tile, so that global memory is written in rows of 16 bytes. The group's other
  // warps are through with q, too.
  ptx::barrier(group_barrier, kWarpgroup);
  constexpr int kChunks = kD / 8;
  unsigned char* const sOut = sMyQ + warp * 16 * Tile::kRowBytes;
  const float sink = a.sinks == nullptr ? -INFINITY : sink_exponent<T>(a, h);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float top = fmaxf(softmax.top[0][half], sink), shift = top == -INFINITY ? 0.0f : top;
    const float weight = ptx::exp2(softmax.top[0][half] - shift);
    const float total = reduce_lanes<4>(softmax.total[0][half], Sum()) * weight + ptx::exp2(sink - shift);
    const float share = weight / (total == 0.0f ? 1.0f : total);  // a row that sees no key gives zeros
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      const unsigned pair = narrow2<T>(rO[0][j][2 * half] * share, rO[0][j][2 * half + 1] * share);
      *reinterpret_cast<unsigned*>(sOut + 16 * swizzled<kChunks>(half * 8 + lane / 4, j) + lane % 4 * 4) = pair;
    }
  }
  __syncwarp();
  T* const gO = static_cast<T*>(a.o) + b * a.o_strides.outer + h * a.o_strides.head;
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; ++i) {
    const int row = (32 * i + lane) / kChunks, chunk = (32 * i + lane) % kChunks;
    if (warp_t0 + row > warp_last) continue;
    const auto* const from = reinterpret_cast<const uint4*>(sOut + 16 * swizzled<kChunks>(row, chunk));
    *reinterpret_cast<uint4*>(gO + (warp_t0 + row) * a.o_strides.token + chunk * kPerVector<T>) = *from;
  }
#endif
}

// A map of (B, heads, tokens, D) in boxes of `rows` tokens of a head. The copy engine takes strides that are multiples
// of 16 bytes above 0; one of a dim of size 1 is never used.
bool map_tokens(TensorMap& map, const void* address, const TokenStrides& strides, int outer, int heads, int tokens,
                int D, int rows) {
  const int64_t sizes[] = {D, tokens, heads, outer};
  int64_t bytes[] = {2 * strides.token, 2 * strides.head, 2 * strides.outer};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i + 1] == 1) bytes[i] = 2 * D;
    if (sizes[i + 1] < 1 || bytes[i] <= 0 || bytes[i] % 16 != 0 || bytes[i] >= int64_t{1} << 40) return false;
  }
  return is_aligned(address, 16) && make_tensor_map(map, address, sizes, bytes, {kPieceColumns, rows, 1, 1});
}

template <typename T, int kD>
bool launch_as(const AttentionArgs& a, Place place) {
  using Tile = Sm90Tile<kD>;
  PrefillArgs p;
  p.attention = a;
  if (!map_tokens(p.q, a.q, a.q_strides, a.B, a.H, a.T, kD, Tile::kRows) ||
      !map_tokens(p.k, a.k, a.k_strides, a.B, a.Hk, a.S, kD, Tile::kN) ||
      !map_tokens(p.v, a.v, a.v_strides, a.B, a.Hk, a.S, kD, Tile::kN)) {
    return false;
  }
  const Shape shape{dim3(a.B * a.H, ceil_div(a.T, Tile::kBlockM)), Tile::kThreads, Tile::kSharedBytes};
  launch("attention_prefill_sm90", attention_prefill_sm90_kernel<T, kD>, shape, p, place);
  return true;
}

template <typename T>
bool launch_for(const AttentionArgs& a, Place place) {
  return a.D == 64 ? launch_as<T, 64>(a, place) : a.D == 128 && launch_as<T, 128>(a, place);
}

}  // namespace

bool attention_prefill_sm90(const AttentionArgs& a, Place place) {
  if (!gpu(place.device).sm90a || a.block_table != nullptr || a.k_scale != nullptr) return false;
  return a.dtype == DType::bf16 ? launch_for<bf16>(a, place) : launch_for<f16>(a, place);
}

}  // namespace fastllm::cuda
