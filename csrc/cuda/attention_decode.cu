// attention for few query rows: keys are split over blocks and warps, and a second kernel adds the splits up.
//
//   block   one split of the keys of one key/value head of one sequence, for 16 of the T G rows that read them
//   warp    every kNumWarps-th tile of kN keys of the split; it has a ring of its own, so no warp waits for another
//
//   ring    | K tile, V tile, scales | K tile, V tile, scales | K tile, V tile, scales |   kStages; int8 has scales
//              mma reads                cp.async has written or writes
//
// Bytes: K and V once, 4 S Hk D in bf16, half of that and 8 S Hk of scales in int8; and 4 D a row, written and read
// again, for each split: with 128 keys a split and 4 rows a head 6 % of K and V in bf16, mostly in L2. Flops: 4 D for
// each key and each of the 16 rows, whether there or not: 16 flops a byte in bf16, 32 in int8, at 4.3 TB/s 70 and 140
// of the 470 TFLOP/s of an H200's mma.sync. Copying is the limit, and what it takes is bytes under way: 8 warps a
// multiprocessor with two stages of 8 KiB each are 128 KiB, four times what 1 us of latency needs.
//
// Expected: 85 % of the copy rate for B = 8, S = 16384, Hk = 8, D = 128 in bf16; 75 % in int8, whose conversion takes
// half of the issue slots. Less below 32 MB of K and V, which take 8 us: the second launch and what it reads take 3 us.
#include "attention_tile.cuh"

namespace fastllm::cuda {
namespace {

constexpr int kRows = 16;

// A stage of K and V is about 8 KiB, so that a block's rings fit the 99 KiB that every GPU from 8.0 on has. Beside the
// sums of a head of 256 q does not fit into registers, and a stage is twice as large.
template <typename Cache, int kD>
struct DecodeTile {
  static constexpr bool kScaled = sizeof(Cache) == 1;
  static constexpr int kN = kScaled || kD <= 64 ? 32 : 16;
  static constexpr int kChunks = kD * sizeof(Cache) / 16;
  static constexpr int kTileBytes = 16 * kChunks * kN;
  static constexpr int kStageBytes = 2 * kTileBytes + (kScaled ? 2 * kN * 4 : 0);
  static constexpr bool kSharedQ = kD > 128;
  static constexpr int kNumWarps = kSharedQ ? 2 : 4;
  static constexpr int kStages = kSharedQ ? 2 : 3;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kNumWarps * kRingBytes + (kSharedQ ? kRows * kD * 2 : 0);
  static constexpr int kSumStride = kD + 8;
  static constexpr int kThreads = 32 * kNumWarps;
  static constexpr int kBlocks = kSharedQ ? 1 : 2;  // at once: left to itself, ptxas would spill to make it three
  static_assert(kSharedBytes <= 99 << 10 && kRows * (kSumStride + 2) * 4 <= kRingBytes);
};

// fp16 holds a weight times v's scale wherever it would hold v, if that is made 64 times larger.
constexpr float kValueScale = 64.0f;

template <typename T, typename Cache, int kD>
__global__ void __launch_bounds__(DecodeTile<Cache, kD>::kThreads, DecodeTile<Cache, kD>::kBlocks)
    attention_decode_kernel(AttentionArgs a) {
  using Tile = DecodeTile<Cache, kD>;
  constexpr int kN = Tile::kN, kNumWarps = Tile::kNumWarps, kStages = Tile::kStages, kChunks = Tile::kChunks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int G = a.H / a.Hk, R = a.T * G, row_tiles = (R + kRows - 1) / kRows;
  const int r0 = blockIdx.x % row_tiles * kRows, head = blockIdx.x / row_tiles;
  const int split = blockIdx.y, b = blockIdx.z;
  const int keys = count_keys(a, b);
  const int low = keys - a.T + r0 / G, high = keys - a.T + (min(r0 + kRows, R) - 1) / G;
  const KeyRange some = visible_keys(a, keys, low, high), every = visible_keys(a, keys, high, low);
  const int first = max(some.begin, split * a.split_keys), last = min(some.end, (split + 1) * a.split_keys);
  if (first >= last) return;  // nobody will ask for this split

  // Of rows g and g + 8 of this lane. What is made of a row that is not there is never stored.
  const auto position = [&](int, int half) { return keys - a.T + (r0 + lane / 4 + 8 * half) / G; };
  // Elements 16 i .. 16 i + 15 of their q as an mma's operand a; beside int8 in the order that widen_bytes gives K.
  const auto fetch_q = [&](int i, unsigned (&to)[4]) {
    const auto pair = [](T x, T y) { return x.bits | static_cast<unsigned>(y.bits) << 16; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = r0 + lane / 4 + 8 * half, t = r / G, h = head * G + r % G;
      const int64_t row = b * a.q_strides.outer + h * a.q_strides.head + t * a.q_strides.token;
      const T* const gQ = static_cast<const T*>(a.q) + row + 16 * i;
      if (r >= R) {
        to[half] = to[2 + half] = 0;
      } else if constexpr (Tile::kScaled) {
        const Pack<T, 4> x = load_pack<T, 4>(gQ + lane % 4 * 4);
        to[half] = pair(x.at[0], x.at[2]);
        to[2 + half] = pair(x.at[1], x.at[3]);
      } else {
        const Pack<T, 2> x = load_pack<T, 2>(gQ + lane % 4 * 2), y = load_pack<T, 2>(gQ + lane % 4 * 2 + 8);
        to[half] = pair(x.at[0], x.at[1]);
        to[2 + half] = pair(y.at[0], y.at[1]);
      }
    }
  };
  unsigned rQ[Tile::kSharedQ ? 1 : kD / 16][4];
  uint4* const sQ = reinterpret_cast<uint4*>(shared_memory() + kNumWarps * Tile::kRingBytes) + lane;
  if constexpr (Tile::kSharedQ) {
    for (int i = warp; i < kD / 16; i += kNumWarps) {
      fetch_q(i, rQ[0]);
      sQ[32 * i] = {rQ[0][0], rQ[0][1], rQ[0][2], rQ[0][3]};
    }
    __syncthreads();
  } else {
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) fetch_q(i, rQ[i]);
  }
  const auto load_q = [&](unsigned, int i, unsigned (&to)[1][4]) {
    if constexpr (Tile::kSharedQ) {
      const uint4 x = sQ[32 * i];
      to[0][0] = x.x, to[0][1] = x.y, to[0][2] = x.z, to[0][3] = x.w;
    } else {
#pragma unroll
      for (int part = 0; part < 4; ++part) to[0][part] = rQ[i][part];
    }
  };

  unsigned char* const sRing = shared_memory() + warp * Tile::kRingBytes;
  const Cache* const gK = static_cast<const Cache*>(a.k) + head * a.k_strides.head;
  const Cache* const gV = static_cast<const Cache*>(a.v) + head * a.v_strides.head;
  // Where this lane's key of a tile lies. Asked for a tile ahead, so that no copy waits for the table.
  const auto find = [&](int tile) {
    const int key = tile * kN + lane % kN;
    return key < last ? find_token(a, b, key) : Token{0, 0};
  };
  const auto load = [&](int tile, int stage, const Token& mine) {
    unsigned char* const sK = sRing + stage * Tile::kStageBytes;
    unsigned char* const sV = sK + Tile::kTileBytes;
    const int lane = static_cast<int>(opaque_thread() % 32);
#pragma unroll 4  // all at once their addresses would not fit beside the sums of a wide head
    for (int i = 0; i < kN * kChunks / 32; ++i) {
      const int row = (32 * i + lane) / kChunks, chunk = (32 * i + lane) % kChunks;
      const Token token{__shfl_sync(kWholeWarp, mine.page, row), __shfl_sync(kWholeWarp, mine.row, row)};
      const int bytes = tile * kN + row < last ? 16 : 0;
      const int to = 16 * swizzled<kChunks>(row, chunk), from = chunk * kPerVector<Cache>;
      ptx::copy_async_16(sK + to, gK + token.offset(a.k_strides) + from, bytes);
      ptx::copy_async_16(sV + to, gV + token.offset(a.v_strides) + from, bytes);
    }
    if constexpr (Tile::kScaled) {
      float* const sScales = reinterpret_cast<float*>(sV + Tile::kTileBytes);
      const int bytes = tile * kN + lane < last ? 4 : 0;
      const float* gKScale = a.k_scale + head * a.k_scale_strides.head + mine.offset(a.k_scale_strides);
      const float* gVScale = a.v_scale + head * a.v_scale_strides.head + mine.offset(a.v_scale_strides);
      ptx::copy_async_4(sScales + lane, gKScale, bytes);
      ptx::copy_async_4(sScales + kN + lane, gVScale, bytes);
    }
  };

  // Warps take tiles by their place in the sequence, so that a row's bits do not depend on where its block begins.
  const int tile_end = (last + kN - 1) / kN;
  int tile = first / kN;
  tile += (warp - tile % kNumWarps + kNumWarps) % kNumWarps;
  Token mine = find(tile);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (tile + stage * kNumWarps < tile_end) {
      load(tile + stage * kNumWarps, stage, mine);
      mine = find(tile + (stage + 1) * kNumWarps);
    }
    ptx::commit_copies();
  }
  float rO[1][kD / 8][4] = {};
  Softmax<1> softmax;
  softmax.start();
  for (int stage = 0; tile < tile_end; tile += kNumWarps, stage = (stage + 1) % kStages) {
    ptx::wait_for_copies<kStages - 2>();
    __syncwarp();  // this tile is there for every lane, and every lane is through with the stage that is filled next
    if (const int ahead = tile + (kStages - 1) * kNumWarps; ahead < tile_end) {
      load(ahead, (stage + kStages - 1) % kStages, mine);
      mine = find(ahead + kNumWarps);
    }
    ptx::commit_copies();

    const unsigned char* const sK = sRing + stage * Tile::kStageBytes;
    const unsigned char* const sV = sK + Tile::kTileBytes;
    // Of this lane's columns: those of K, and behind them those of V.
    [[maybe_unused]] const float* const sScales = reinterpret_cast<const float*>(sV + Tile::kTileBytes) + lane % 4 * 2;
    float rS[1][kN / 8][4];
    score<T, Cache, kD, kN, 1>(rS, load_q, sK);
    if constexpr (Tile::kScaled) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[0][j][e] *= sScales[8 * j + e % 2];
      }
    }
    transform(rS, a);
    if (tile * kN < every.begin || (tile + 1) * kN > every.end) hide(rS, a, keys, tile * kN, position);
    softmax.weigh(rS, rO, a.exponent);
    if constexpr (Tile::kScaled) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[0][j][e] *= sScales[kN + 8 * j + e % 2] * kValueScale;
      }
    }
    unsigned rP[1][kN / 16][4];
    narrow_weights<T>(rP, rS);
    add_values<T, Cache, kD, kN, 1>(rO, rP, sV);
  }

  // The warps' results meet where their rings were: 16 rows of D sums, their largest exponents, their totals. Rows lie
  // D
  // + 8 apart, so that four of them written at once do not meet in the same banks.
  constexpr int kSums = kRows * Tile::kSumStride, kSharedStride = Tile::kRingBytes / 4;
  float* const sWarp = reinterpret_cast<float*>(sRing);
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int j = 0; j < kD / 8; j += 2) {
      float* const to = sWarp + row * Tile::kSumStride + 8 * j;
      const float *const left = rO[0][j] + 2 * half, *const right = rO[0][j + 1] + 2 * half;
      if constexpr (Tile::kScaled) {
        store_pack<float, 4>(to + lane % 4 * 4, {left[0], right[0], left[1], right[1]});
      } else {
        store_pack<float, 2>(to + lane % 4 * 2, {left[0], left[1]});
        store_pack<float, 2>(to + lane % 4 * 2 + 8, {right[0], right[1]});
      }
    }
    const float total = reduce_lanes<4>(softmax.total[0][half], Sum());
    if (lane % 4 == 0) {
      sWarp[kSums + row] = softmax.top[0][half];
      sWarp[kSums + kRows + row] = total;
    }
  }
  __syncthreads();
  const float* const sAll = reinterpret_cast<const float*>(shared_memory());
  const int64_t row0 = (static_cast<int64_t>(b) * a.Hk + head) * R + r0;
  for (int at = threadIdx.x * 4; at < min(kRows, R - r0) * kD; at += Tile::kThreads * 4) {
    const int row = at / kD;
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) top = fmaxf(top, sAll[w * kSharedStride + kSums + row]);
    const float shift = top == -INFINITY ? 0.0f : top;
    float total = 0.0f;
    Pack<float, 4> sums = {};
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) {
      const float* const sOther = sAll + w * kSharedStride;
      const float weight = ptx::exp2(sOther[kSums + row] - shift);
      const Pack<float, 4> other = load_pack<float, 4>(sOther + row * Tile::kSumStride + at % kD);
      total += weight * sOther[kSums + kRows + row];
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.at[e] += weight * other.at[e];
    }
    if constexpr (Tile::kScaled) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.at[e] *= 1.0f / kValueScale;
    }
    const int64_t part = (row0 + row) * a.splits + split;
    store_pack(a.part + part * kD + at % kD, sums);
    if (at % kD == 0) a.part_softmax[part] = {top, total};
  }
}

// ---------------------------------------------------------------- adding up

constexpr int kAddThreads = 256;

// One row: threads are groups of D / 4, which take a split each and every groups-th after it, four elements a thread.
template <typename T>
__global__ void __launch_bounds__(kAddThreads) attention_add_kernel(AttentionArgs a) {
  const int G = a.H / a.Hk, R = a.T * G, columns = a.D / 4, groups = kAddThreads / columns;
  const int r = blockIdx.x % R, head = blockIdx.x / R, b = blockIdx.y, t = r / G, h = head * G + r % G;
  const int keys = count_keys(a, b), position = keys - a.T + t;
  const KeyRange seen = visible_keys(a, keys, position, position);
  const int first = seen.begin / a.split_keys;
  const int last = seen.begin < seen.end ? (seen.end + a.split_keys - 1) / a.split_keys : first;
  const int64_t part0 = ((static_cast<int64_t>(b) * a.Hk + head) * R + r) * a.splits;
  float* const sReduce = reinterpret_cast<float*>(shared_memory());  // a float a warp, twice
  float* const sSums = sReduce + 2 * kAddThreads / 32;               // (groups, D)
  float* const sWeight = sSums + groups * a.D;                       // a float a split

  const float sink = a.sinks == nullptr ? -INFINITY : sink_exponent<T>(a, h);
  float top = sink;
  for (int s = first + threadIdx.x; s < last; s += kAddThreads) top = fmaxf(top, a.part_softmax[part0 + s].x);
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  top = reduce_block<kAddThreads / 32>(top, sReduce, larger);
  const float shift = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int s = first + threadIdx.x; s < last; s += kAddThreads) {
    const float2 softmax = a.part_softmax[part0 + s];
    const float weight = ptx::exp2(softmax.x - shift);
    sWeight[s - first] = weight;
    total += weight * softmax.y;
  }
  total = reduce_block<kAddThreads / 32>(total, sReduce + kAddThreads / 32, Sum()) + ptx::exp2(sink - shift);

  const int group = threadIdx.x / columns, column = threadIdx.x % columns * 4;
  if (group < groups) {
    Pack<float, 4> sums = {};
#pragma unroll 4
    for (int s = first + group; s < last; s += groups) {
      const Pack<float, 4> other = load_pack<float, 4>(a.part + (part0 + s) * a.D + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.at[e] += sWeight[s - first] * other.at[e];
    }
    store_pack(sSums + group * a.D + column, sums);
  }
  __syncthreads();
  T* const gO = static_cast<T*>(a.o) + b * a.o_strides.outer + h * a.o_strides.head + t * a.o_strides.token;
  for (int d = threadIdx.x; d < a.D; d += kAddThreads) {
    float sum = 0.0f;
    for (int i = 0; i < groups; ++i) sum += sSums[i * a.D + d];
    gO[d] = narrow<T>(sum / (total == 0.0f ? 1.0f : total));  // a row that sees no key gives zeros
  }
}

template <typename T, typename Cache, int kD>
void launch_as(const AttentionArgs& a, Place place) {
  using Tile = DecodeTile<Cache, kD>;
  const int R = a.T * (a.H / a.Hk);
  const Shape shape{dim3(ceil_div(R, kRows) * a.Hk, a.splits, a.B), Tile::kThreads, Tile::kSharedBytes};
  launch("attention_decode", attention_decode_kernel<T, Cache, kD>, shape, a, place);
  const size_t floats = 2 * kAddThreads / 32 + kAddThreads / (kD / 4) * kD + a.splits;
  launch("attention_add", attention_add_kernel<T>, {dim3(a.Hk * R, a.B), kAddThreads, 4 * floats}, a, place);
}

template <typename T, typename Cache>
void launch_for(const AttentionArgs& a, Place place) {
  switch (a.D) {
    case 64:
      return launch_as<T, Cache, 64>(a, place);
    case 80:
      return launch_as<T, Cache, 80>(a, place);
    case 96:
      return launch_as<T, Cache, 96>(a, place);
    case 128:
      return launch_as<T, Cache, 128>(a, place);
    default:
      return launch_as<T, Cache, 256>(a, place);
  }
}

}  // namespace

// As many blocks as give each multiprocessor four, but tiles for each warp and, for long caches that are mostly empty,
// no more than 512 keys a block; 4096 weights fit into the second kernel's shared memory.
int attention_split_keys(int64_t S, int64_t Hk, int device) {
  const int64_t even = S * Hk / (4 * gpu(device).multiprocessors);
  int64_t keys = 64;
  while (keys < 512 && 2 * keys <= even) keys *= 2;
  while (keys * 4096 < S) keys *= 2;
  return static_cast<int>(keys);
}

void attention_decode(const AttentionArgs& a, Place place) {
  const bool int8 = a.k_scale != nullptr;
  if (a.dtype == DType::bf16) {
    int8 ? launch_for<bf16, int8_t>(a, place) : launch_for<bf16, bf16>(a, place);
  } else {
    int8 ? launch_for<f16, int8_t>(a, place) : launch_for<f16, f16>(a, place);
  }
}

}  // namespace fastllm::cuda
