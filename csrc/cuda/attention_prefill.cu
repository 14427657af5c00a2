// attention for many queries: a block keeps its queries' sums in registers and walks over the keys that they see.
//
//   block   kBlockM queries of one head: kNumWarps warps of 16 kM rows each
//   q       kBlockM x D in shared memory, read again for each tile: as registers it would not fit beside the sums
//   k, v    a ring of kSlots tiles of kN keys: K 0, V 0, K 1, V 1, ...; while one is multiplied, the next ones arrive
//
//             keys ->
//   queries   [ all seen  ][ all seen  ][ diagonal  ]   hidden           tiles that no row sees are not read, and
//     |       [ all seen  ][ all seen  ][ all seen  ][ diagonal  ]       only those on an edge are compared with it
//     v
//
// Flops: 4 D for each pair of a query and a key. Bytes: K and V once for each kBlockM queries, from L2 after the first:
// 128 flops a byte in bf16. Arithmetic is the limit. Of shared memory's 128 bytes a clock 32 rows take, for D = 128,
// six ldmatrix for 16 mma: 24 clocks beside the 32 of an A100's tensor cores, where 16 rows would take 20 beside 16.
// That is why a warp has 32, and q stays in shared memory. A score of a lane costs eight instructions of softmax and
// D / 32 mma.
//
// Expected: 60 % of an A100's 312 TFLOP/s for T = 8192, D = 128, causal. An H200's mma.sync has some 60 % of the 790
// TFLOP/s of its warp groups' instructions, 470, so 300 here: attention_prefill_sm90.cu goes before it, then Triton's.
#include "attention_tile.cuh"

namespace fastllm::cuda {
namespace {

// At most 48 KiB for D up to 128, so that two blocks share a multiprocessor of 100 KiB as of 164.
template <int kHeadDim>
struct PrefillTile {
  static constexpr int kD = kHeadDim;
  static constexpr int kNumWarps = 4;
  static constexpr int kThreads = 32 * kNumWarps;
  static constexpr int kM = kD <= 128 ? 2 : 1;
  static constexpr int kBlockM = 16 * kM * kNumWarps;
  static constexpr int kN = kD <= 96 ? 64 : 32;
  static constexpr int kSlots = kD == 64 ? 4 : 2;
  static constexpr int kChunks = kD / 8;  // of a row
  static constexpr int kRowBytes = 16 * kChunks;
  static constexpr int kSharedBytes = (kBlockM + kSlots * kN) * kRowBytes;
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(PrefillTile<kHeadDim>::kThreads) attention_prefill_kernel(AttentionArgs a) {
  using Tile = PrefillTile<kHeadDim>;
  constexpr int kD = Tile::kD, kM = Tile::kM, kN = Tile::kN, kSlots = Tile::kSlots, kChunks = Tile::kChunks;
  constexpr int kTileBytes = kN * Tile::kRowBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int h = blockIdx.x % a.H, b = blockIdx.x / a.H, head = h / (a.H / a.Hk);
  // Causal: the last queries see the most keys and go first, so that no long block is left at the end.
  const int t0 = static_cast<int>(gridDim.y - 1 - blockIdx.y) * Tile::kBlockM;
  const int keys = count_keys(a, b), position0 = keys - a.T;
  const KeyRange block_sees = visible_keys(a, keys, position0 + t0, position0 + min(t0 + Tile::kBlockM, a.T) - 1);
  const int first_tile = block_sees.begin / kN;
  const int tiles = max(0, (block_sees.end + kN - 1) / kN - first_tile);

  // This warp's rows.
  const int warp_t0 = t0 + warp * 16 * kM, warp_last = min(warp_t0 + 16 * kM, a.T) - 1;
  const bool live = warp_t0 < a.T;
  const KeyRange some = visible_keys(a, keys, position0 + warp_t0, position0 + warp_last);
  const KeyRange every = visible_keys(a, keys, position0 + warp_last, position0 + warp_t0);
  const auto position = [&](int m, int half) { return position0 + warp_t0 + 16 * m + 8 * half + lane / 4; };

  unsigned char* const sQ = shared_memory();
  unsigned char* const sRing = sQ + Tile::kBlockM * Tile::kRowBytes;
  const T* const gQ = static_cast<const T*>(a.q) + b * a.q_strides.outer + h * a.q_strides.head;
  const T* const gK = static_cast<const T*>(a.k) + head * a.k_strides.head;
  const T* const gV = static_cast<const T*>(a.v) + head * a.v_strides.head;
  // Half a step: K of tile step / 2, or V. Keys from block_sees.end on are zeros, whatever lies there.
  const auto load = [&](int step) {
    if (step >= 2 * tiles) return;
    const T* const from = step % 2 == 0 ? gK : gV;
    const TokenStrides strides = step % 2 == 0 ? a.k_strides : a.v_strides;
    unsigned char* const to = sRing + step % kSlots * kTileBytes;
    const int start = (first_tile + step / 2) * kN;
    const int thread = static_cast<int>(opaque_thread() % Tile::kThreads);
#pragma unroll
    for (int i = 0; i < kN * kChunks / Tile::kThreads; ++i) {
      const int at = i * Tile::kThreads + thread, row = at / kChunks, chunk = at % kChunks;
      const bool there = start + row < block_sees.end;
      const Token token = there ? find_token(a, b, start + row) : Token{0, 0};
      ptx::copy_async_16(to + 16 * swizzled<kChunks>(row, chunk), from + token.offset(strides) + chunk * kPerVector<T>,
                         there ? 16 : 0);
    }
  };
  int step = 0;  // the half that is multiplied next
  const auto take_turn = [&] {
    ptx::wait_for_copies<kSlots - 2>();
    __syncthreads();  // this half is there for all, and all are through with the one whose slot is filled next
    load(step + kSlots - 1);
    ptx::commit_copies();
    return sRing + step++ % kSlots * kTileBytes;
  };

#pragma unroll
  for (int i = 0; i < Tile::kBlockM * kChunks / Tile::kThreads; ++i) {
    const int at = i * Tile::kThreads + threadIdx.x, row = at / kChunks, chunk = at % kChunks;
    const int t = min(t0 + row, a.T - 1);
    ptx::copy_async_16(sQ + 16 * swizzled<kChunks>(row, chunk), gQ + t * a.q_strides.token + chunk * kPerVector<T>);
  }
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) {
    load(i);
    ptx::commit_copies();
  }
  const auto load_q = [&](unsigned lane, int i, unsigned (&rQ)[kM][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const unsigned row = (warp * kM + m) * 16 + lane % 16;
      ptx::load_matrices(rQ[m], sQ + 16 * swizzled<kChunks>(row, 2 * i + lane / 16));
    }
  };

  float rO[kM][kD / 8][4] = {};
  Softmax<kM> softmax;
  softmax.start();
  for (int tile = 0; tile < tiles; ++tile) {
    const int start = (first_tile + tile) * kN;
    const bool sees = live && start < some.end && start + kN > some.begin;
    unsigned rP[kM][kN / 16][4];
    const unsigned char* const sK = take_turn();
    if (sees) {
      float rS[kM][kN / 8][4];
      score<T, T, kD, kN, kM>(rS, load_q, sK);
      transform(rS, a);
      if (start < every.begin || start + kN > every.end) hide(rS, a, keys, start, position);
      softmax.weigh(rS, rO, a.exponent);
      narrow_weights<T>(rP, rS);
    }
    const unsigned char* const sV = take_turn();
    if (sees) add_values<T, T, kD, kN, kM>(rO, rP, sV);
  }

  // Out through this warp's part of q's tile, so that global memory is written in rows of 16 bytes.
  ptx::wait_for_copies<0>();  // q's own, where there are no keys
  __syncthreads();
  const float sink = a.sinks == nullptr ? -INFINITY : sink_exponent<T>(a, h);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = fmaxf(softmax.top[m][half], sink), shift = top == -INFINITY ? 0.0f : top;
      const float weight = ptx::exp2(softmax.top[m][half] - shift);
      const float total = reduce_lanes<4>(softmax.total[m][half], Sum()) * weight + ptx::exp2(sink - shift);
      const float share = weight / (total == 0.0f ? 1.0f : total);  // a row that sees no key gives zeros
      const int row = (warp * kM + m) * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        const unsigned pair = narrow2<T>(rO[m][j][2 * half] * share, rO[m][j][2 * half + 1] * share);
        *reinterpret_cast<unsigned*>(sQ + 16 * swizzled<kChunks>(row, j) + lane % 4 * 4) = pair;
      }
    }
  }
  __syncwarp();
  T* const gO = static_cast<T*>(a.o) + b * a.o_strides.outer + h * a.o_strides.head;
#pragma unroll
  for (int i = 0; i < 16 * kM * kChunks / 32; ++i) {
    const int row = (32 * i + lane) / kChunks, chunk = (32 * i + lane) % kChunks;
    if (warp_t0 + row > warp_last) continue;
    const auto* const from = reinterpret_cast<const uint4*>(sQ + 16 * swizzled<kChunks>(warp * 16 * kM + row, chunk));
    *reinterpret_cast<uint4*>(gO + (warp_t0 + row) * a.o_strides.token + chunk * kPerVector<T>) = *from;
  }
}

template <typename T, int kD>
void launch_as(const AttentionArgs& a, Place place) {
  using Tile = PrefillTile<kD>;
  const Shape shape{dim3(a.B * a.H, ceil_div(a.T, Tile::kBlockM)), Tile::kThreads, Tile::kSharedBytes};
  launch("attention_prefill", attention_prefill_kernel<T, kD>, shape, a, place);
}

template <typename T>
void launch_for(const AttentionArgs& a, Place place) {
  switch (a.D) {
    case 64:
      return launch_as<T, 64>(a, place);
    case 80:
      return launch_as<T, 80>(a, place);
    case 96:
      return launch_as<T, 96>(a, place);
    case 128:
      return launch_as<T, 128>(a, place);
    default:
      return launch_as<T, 256>(a, place);
  }
}

}  // namespace

void attention_prefill(const AttentionArgs& a, Place place) {
  if (attention_prefill_sm90(a, place)) return;
  a.dtype == DType::bf16 ? launch_for<bf16>(a, place) : launch_for<f16>(a, place);
}

}  // namespace fastllm::cuda
