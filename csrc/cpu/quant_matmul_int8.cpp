// y = x w^T with activations quantised to int8, symmetric, a scale for each token and group of columns.
//
//   scale_x, xq: as quantize.h makes them, or as a norm or gate has made them with it
//   y[m, n] = sum over groups of scale_x * (scale_w * sum((q - center) * xq)) + offset * (scale_x * sum(xq))
//   offset = minimum + (center - zero) * scale_w
//
// The inner sums are exact integers. They count q from the middle of its range (center = 8 or 128): counted from 0, the
// two terms would be large and cancel wherever activations have a mean. A group that holds an infinity or a NaN has the
// scale NaN, and so gets every output of its row.
//
// Cost: N K bits / 8 bytes of weights, plus scales, once for every kMaxTokens tokens at most; 2 M N K integer
// operations. With few tokens reading the weights is the limit. With many it is the multiplier: a step of 4-bit weights
// is two instructions (vpmaddubsw, vpaddw) for 32 products on AVX2, one (vpdpbusd) for 64 with VNNI; 8-bit weights
// without VNNI are widened to 16 bits and cost two (vpmaddwd, vpaddd) for 16, because vpmaddubsw would saturate.
//
// A token's bits do not depend on the other tokens: each row and token sums its groups in one order, in segments.
#include "quant_matmul_int8.h"

#include "parallel.h"
#include "quant_lines.h"
#include "quantize.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// u8 x s8 into 32 bits in one step: VNNI, and the scalar twin.
constexpr bool kDotBytes = FASTLLM_ISA_LEVEL == 0 || FASTLLM_ISA_LEVEL >= 3;
// 4-bit weights without that: pairs of products are summed in 16 bits, 32 columns at a time (8 * 2 * 15 * 127 < 2^15).
template <int kBits>
constexpr bool kNarrowSums = kBits == 4 && !kDotBytes;
// 8-bit weights without that: activations are stored as 16 bits.
template <int kBits>
constexpr bool kWideActivations = kBits == 8 && !kDotBytes;

// A unit is what eight bytes of activations multiply: columns, and bytes of the weights of 16 rows.
template <int kBits>
constexpr int kUnitColumns = kWideActivations<kBits> ? 4 : 8;
template <int kBits>
constexpr int kUnitBytes = kBits == 8 && kDotBytes ? 128 : 64;
constexpr int kUnpackedBytes = 128;  // once its nibbles stand in bytes
template <int kBits>
constexpr int kCenter = 1 << (kBits - 1);
constexpr int kUnitsAStep = 4;  // of 4-bit weights: the 32 columns that sums of 16 bits can hold

constexpr int kPrefetchBytes = 4096;  // how far ahead of the weights

constexpr int64_t kMaxGroups = kMaxSegment / 32;  // in a segment
// Tokens in a tile: as many as leave registers for the sums of 16 rows.
constexpr int kTile = FASTLLM_ISA_LEVEL == 0 ? 1 : FASTLLM_ISA_LEVEL == 1 ? 4 : 8;
// Of packed 4-bit weights on AVX2 one less: their nibbles take registers too.
template <int kBits>
constexpr int kPackedTile = FASTLLM_ISA_LEVEL == 1 && kBits == 4 ? 3 : kTile;
// With many tokens, AVX-512 has registers for two blocks of rows beside each other: a load of activations, of which
// there are only two a cycle, then feeds two products.
constexpr int kWideTile = FASTLLM_ISA_LEVEL >= 2 ? 6 : kTile, kWideBlocks = FASTLLM_ISA_LEVEL >= 2 ? 2 : 1;
// From more tokens on, unpacking to memory once costs less than unpacking in registers for each tile.
constexpr int kUnpackTokens = 12;
// As many tokens are worth unpacking for: a thread's own.
constexpr int64_t kPartTokens = 64;
// A part at most: kMaxTokens in whole tiles, so that a pass makes no third part for a rest.
constexpr int64_t kMostTokens = (kMaxTokens + kWideTile - 1) / kWideTile * kWideTile;

// ---------------------------------------------------------------- one step

struct Unit {
  vi half[2];  // what the first and the last four bytes of activations multiply
};

// The high byte of each pair, as 16 bits.
FASTLLM_INLINE vi odd_bytes(vi line) {
#if FASTLLM_ISA_LEVEL >= 2
  return {_mm512_srli_epi16(line.v, 8)};
#elif FASTLLM_ISA_LEVEL == 1
  return {_mm256_srli_epi16(line.v, 8)};
#else
  return {line.v >> 8 & 0x00ff00ff};
#endif
}

template <int kBits>
FASTLLM_INLINE Unit load_unit(const uint8_t* p, int v) {
  const vi line = load_int(p + v * 4 * kWidth);
  if constexpr (kBits == 4) {
    const vi low = set1_int(0x0f0f0f0f);
    return {{line & low, shift_right<4>(line) & low}};
  } else if constexpr (kDotBytes) {
    return {{line, load_int(p + kLineBytes + v * 4 * kWidth)}};
  } else {
    return {{line & set1_int(0x00ff00ff), odd_bytes(line)}};
  }
}

FASTLLM_INLINE Unit load_unpacked(const uint8_t* p, int v) {
  return {{load_int(p + v * 4 * kWidth), load_int(p + kLineBytes + v * 4 * kWidth)}};
}

// Keeps the compiler from adding products to each other before the sum, which takes registers that AVX2 does not have,
// and from moving sums about (GCC).
FASTLLM_INLINE vi in_place(vi sum) {
#if FASTLLM_ISA_LEVEL >= 2 && defined(__AVX512F__)  // not where it is emulated
  asm("" : "+v"(sum.v));
#elif FASTLLM_ISA_LEVEL == 1
  asm("" : "+x"(sum.v));
#endif
  return sum;
}

template <int kBits>
FASTLLM_INLINE vi dot(vi sum, vi w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
#if FASTLLM_ISA_LEVEL >= 3
  return in_place({_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))});
#elif FASTLLM_ISA_LEVEL == 2
  const __m512i xs = _mm512_set1_epi32(four);
  if constexpr (kNarrowSums<kBits>) return in_place({_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(w.v, xs))});
  return in_place({_mm512_add_epi32(sum.v, _mm512_madd_epi16(w.v, xs))});
#elif FASTLLM_ISA_LEVEL == 1
  const __m256i xs = _mm256_set1_epi32(four);
  if constexpr (kNarrowSums<kBits>) return in_place({_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(w.v, xs))});
  return in_place({_mm256_add_epi32(sum.v, _mm256_madd_epi16(w.v, xs))});
#else
  int32_t total = 0;
  for (int j = 0; j < 4; ++j) total += static_cast<int32_t>(w.v >> (8 * j) & 255) * x[j];
  return sum + set1_int(total);
#endif
}

// Pairs of 16-bit sums -> 32 bits.
FASTLLM_INLINE vi widen_pairs(vi sums) {
#if FASTLLM_ISA_LEVEL >= 2
  return {_mm512_madd_epi16(sums.v, _mm512_set1_epi16(1))};
#elif FASTLLM_ISA_LEVEL == 1
  return {_mm256_madd_epi16(sums.v, _mm256_set1_epi16(1))};
#else
  return sums;
#endif
}

// ---------------------------------------------------------------- activations

// Groups of 32 whose sums have 16 bits take half of the start in either half of 32 bits. The end, sum((q - 4) x) over
// one half of the columns minus sum(4 x) over the other, stays within 16 * 11 * 127 + 16 * 4 * 127 < 2^15.
template <int kBits>
FASTLLM_INLINE int32_t start_of(int32_t total, int64_t group_size) {
  if (kNarrowSums<kBits> && group_size == 32) {
    const uint32_t half = static_cast<uint16_t>(-kCenter<kBits> / 2 * total);
    return static_cast<int32_t>(half << 16 | half);
  }
  return -kCenter<kBits> * total;
}

// All groups of a row have the same scale and no offset: the sum of them is scaled, and smaller until then, so that it
// stays finite where the result does.
template <int kBits>
FASTLLM_INLINE bool has_one_scale(const QuantMatmulArgs& a) {
  return a.minimum == nullptr && a.zero == kCenter<kBits> && a.group_size == a.K && a.K > 128;
}
constexpr float kSmaller = 0x1p-20f;

// One token's integers, which may be given. out: whole segments, `segment_stride` bytes apart; groups: one for each
// `group_size` columns.
template <int kBits>
void quantize_token(const QuantMatmulArgs& a, int64_t token, int64_t group_size, int8_t* out, int64_t segment_stride,
                    ActivationGroup* groups) {
  const int64_t x_at = row_offset(a.x_rows, token), token_groups = (a.K + group_size - 1) / group_size;
  const int64_t segment = int8_segment(a.K);
  const float factor = has_one_scale<kBits>(a) ? kSmaller : 1.0f;
  for (int64_t k = 0; k < a.K; k += segment, out += segment_stride) {
    const int64_t count = a.K - k < segment ? a.K - k : segment, padded = padded_k(count);
    alignas(64) int8_t bytes[kMaxSegment];
    int8_t* q = kWideActivations<kBits> ? bytes : out;
    float found[2 * kMaxGroups];
    const float* of = found;
    if (a.x_groups) {
      std::memcpy(q, static_cast<const int8_t*>(a.x) + x_at + k, static_cast<size_t>(count));
      of = a.x_groups + 2 * (token * token_groups + k / group_size);
    } else {
#define FASTLLM_BODY(T) quantize_groups(static_cast<const decltype(T)*>(a.x) + x_at + k, count, group_size, q, found)
      FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
    }
    std::memset(q + count, 0, static_cast<size_t>(padded - count));
    for (int64_t g = 0; g < (count + group_size - 1) / group_size; ++g) {
      const float scale = of[2 * g], sum = of[2 * g + 1];
      // Given sums may be anything; true ones are far from where a conversion has no result.
      const int32_t total = __builtin_fabsf(sum) <= 0x1p20f ? static_cast<int32_t>(sum) : 0;
      *groups++ = {scale * factor, scale * sum, start_of<kBits>(total, group_size)};
    }
    if constexpr (kWideActivations<kBits>) {
      // Even columns stand in the low halves of the weights' dwords, odd ones in the high.
      int16_t* wide = reinterpret_cast<int16_t*>(out);
      for (int64_t i = 0; i < padded; i += 4) {
        wide[i] = bytes[i];
        wide[i + 1] = bytes[i + 2];
        wide[i + 2] = bytes[i + 1];
        wide[i + 3] = bytes[i + 3];
      }
    }
  }
}

// ---------------------------------------------------------------- one tile: blocks of 16 rows x kTokens tokens x a
// segment

// One segment of K, of one block of 16 rows or of blocks beside each other.
struct Segment {
  const uint8_t* weights;        // units, packed; or unpacked, if the tile says so; blocks stand block_stride apart
  const int8_t* x;               // the first token's; the others x_stride bytes apart
  const ActivationGroup* group;  // the first token's first; the other tokens' group_stride apart
  const float* scale;            // (groups, blocks, 16)
  const float* offset;           // likewise, or null
  bool one_scale;                // all groups have the same, and no offset
  int64_t block_stride, x_stride, group_stride;
  int64_t units, units_a_group;
  float* sums;  // (tokens, blocks, 16): written by the first segment, added to by the others
  bool first, last;
  // Of the last segment, whose tiles write y: rows that stand a power of two apart push each other out of the caches
  // where they wait for all tiles.
  const QuantMatmulArgs* args;
  int64_t token, block;
  Ahead ahead;
};

// What a tile is compiled for.
template <int kBitsOf, int kTokensOf, int kBlocksOf, bool kUnpackedOf>
struct Tile {
  static constexpr int kBits = kBitsOf, kTokens = kTokensOf, kBlocks = kBlocksOf;
  static constexpr int kVectors = kBlocks * kBlockVectors;
  static constexpr bool kUnpacked = kUnpackedOf;
};

template <typename T>
FASTLLM_INLINE void add_unit(const uint8_t*& weights, const int8_t*& x, const Segment& s,
                             vi (&sums)[T::kTokens][T::kVectors]) {
  Unit w[T::kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < T::kVectors; ++v) {
    const uint8_t* at = weights + v / kBlockVectors * s.block_stride;
    w[v] = T::kUnpacked ? load_unpacked(at, v % kBlockVectors) : load_unit<T::kBits>(at, v % kBlockVectors);
  }
  if constexpr (!T::kUnpacked && T::kBlocks == 1) {
#pragma GCC unroll 2
    for (int line = 0; line < kUnitBytes<T::kBits>; line += 64) __builtin_prefetch(weights + kPrefetchBytes + line);
  }
  // Halves outside, so that half of the weights are in registers at a time; tokens next, for few activations.
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
    for (int t = 0; t < T::kTokens; ++t) {
#pragma GCC unroll 16
      for (int v = 0; v < T::kVectors; ++v) {
        sums[t][v] = dot<T::kBits>(sums[t][v], w[v].half[half], x + t * s.x_stride + 4 * half);
      }
    }
  }
  weights += T::kUnpacked ? kUnpackedBytes : kUnitBytes<T::kBits>;
  x += 8;
}

template <typename T>
FASTLLM_INLINE void add_units(const uint8_t*& weights, const int8_t*& x, const Segment& s, int64_t units,
                              vi (&sums)[T::kTokens][T::kVectors]) {
#pragma GCC unroll 1
  for (int64_t u = 0; u < units; ++u) add_unit<T>(weights, x, s, sums);
}

// The integer sums of one group, in 32 bits.
template <typename T>
FASTLLM_INLINE void add_group(const uint8_t*& weights, const int8_t*& x, const Segment& s, int64_t units,
                              vi (&sums)[T::kTokens][T::kVectors]) {
  if constexpr (!kNarrowSums<T::kBits>) {
    add_units<T>(weights, x, s, units, sums);
  } else {
    for (; units > 0; units -= kUnitsAStep) {
      vi narrow[T::kTokens][T::kVectors];
#pragma GCC unroll 16
      for (int t = 0; t < T::kTokens; ++t) {
#pragma GCC unroll 16
        for (int v = 0; v < T::kVectors; ++v) narrow[t][v] = set1_int(0);
      }
      add_units<T>(weights, x, s, units < kUnitsAStep ? units : kUnitsAStep, narrow);
#pragma GCC unroll 16
      for (int t = 0; t < T::kTokens; ++t) {
#pragma GCC unroll 16
        for (int v = 0; v < T::kVectors; ++v) sums[t][v] = sums[t][v] + widen_pairs(narrow[t][v]);
      }
    }
  }
}

// kOneStep: a group is a step, of which sums of 16 bits are all there is. kOneScale: the weights' scale multiplies the
// segment's sum, on the ports of the dot products, rather than each group's.
template <typename T, bool kOneStep, bool kOffset, bool kOneScale>
FASTLLM_INLINE void add_groups(const Segment& s) {
  const uint8_t* weights = s.weights;
  const int8_t* x = s.x;
  const ActivationGroup* group = s.group;
  const float *scale = s.scale, *offset = s.offset;
  vf totals[T::kTokens][T::kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < T::kTokens; ++t) {
#pragma GCC unroll 16
    for (int v = 0; v < T::kVectors; ++v) totals[t][v] = zero();
  }
  for (int64_t left = s.units; left > 0; left -= s.units_a_group) {
    vi sums[T::kTokens][T::kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < T::kTokens; ++t) {
      const vi start = set1_int(group[t * s.group_stride].start);
#pragma GCC unroll 16
      for (int v = 0; v < T::kVectors; ++v) sums[t][v] = start;
    }
    if constexpr (kOneStep) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnitsAStep; ++u) add_unit<T>(weights, x, s, sums);
#pragma GCC unroll 16
      for (int t = 0; t < T::kTokens; ++t) {
#pragma GCC unroll 16
        for (int v = 0; v < T::kVectors; ++v) sums[t][v] = widen_pairs(sums[t][v]);
      }
    } else {
      const int64_t units = left < s.units_a_group ? left : s.units_a_group;
      add_group<T>(weights, x, s, units, sums);
    }
#pragma GCC unroll 16
    for (int v = 0; v < T::kVectors; ++v) {
      const vf ws = load(scale + v * kWidth);
      const vf wo = kOffset ? load(offset + v * kWidth) : ws;
#pragma GCC unroll 16
      for (int t = 0; t < T::kTokens; ++t) {
        const ActivationGroup& of = group[t * s.group_stride];
        const vf sum = to_float(sums[t][v]);
        vf total = fmadd(kOneScale ? sum : sum * ws, set1(of.scale), totals[t][v]);
        if constexpr (kOffset) total = fmadd(wo, set1(of.sum), total);
        totals[t][v] = total;
      }
    }
    if constexpr (kOffset) offset += T::kBlocks * kBlockRows;
    if constexpr (!kOneScale) scale += T::kBlocks * kBlockRows;
    ++group;
  }
#pragma GCC unroll 16
  for (int t = 0; t < T::kTokens; ++t) {
#pragma GCC unroll 16
    for (int v = 0; v < T::kVectors; ++v) {
      float* to = s.sums + (t * T::kVectors + v) * kWidth;
      const vf one_scale = load(s.scale + v * kWidth) * set1(1 / kSmaller);
      const vf total = kOneScale ? totals[t][v] * one_scale : totals[t][v];
      store(to, s.first ? total : load(to) + total);
    }
  }
}

template <typename T>
void add_tile(const Segment& s) {
  constexpr bool kNarrow = kNarrowSums<T::kBits>;
  const bool one_step = kNarrow && s.units_a_group == kUnitsAStep;
  if (s.offset) {
    one_step ? add_groups<T, kNarrow, true, false>(s) : add_groups<T, false, true, false>(s);
  } else if (one_step) {
    add_groups<T, kNarrow, false, false>(s);
  } else {
    s.one_scale ? add_groups<T, false, false, true>(s) : add_groups<T, false, false, false>(s);
  }
}

template <int kBits, int kTokens, int kBlocks, bool kUnpacked>
void add_tiles(Segment& s, int64_t tokens) {
  // 4 + 4 keep more sums under way than 6 + 2.
  while (tokens >= kTokens && !(kTokens == 6 && tokens == 8)) {
    if constexpr (kBlocks > 1) ask_ahead<kTokens, kBlocks>(s.ahead, (tokens + kTokens - 1) / kTokens);
    add_tile<Tile<kBits, kTokens, kBlocks, kUnpacked>>(s);
    for (int b = 0; s.last && b < kBlocks; ++b) {
      store_rows(*s.args, s.token, kTokens, s.block + b, s.sums + b * kBlockRows, kBlocks * kBlockRows);
    }
    s.token += kTokens;
    s.x += kTokens * s.x_stride;
    s.group += kTokens * s.group_stride;
    s.sums += kTokens * kBlocks * kBlockRows;
    tokens -= kTokens;
  }
  if constexpr (kTokens > 1) add_tiles<kBits, smaller_tile(kTokens), kBlocks, kUnpacked>(s, tokens);
}

// Nibbles -> bytes, once for all tiles of a block.
void unpack_units(const uint8_t* packed, int64_t units, uint8_t* unpacked) {
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 16
    for (int v = 0; v < kBlockVectors; ++v) {
      const Unit w = load_unit<4>(packed, v);
      store_int(unpacked + v * 4 * kWidth, w.half[0]);
      store_int(unpacked + kLineBytes + v * 4 * kWidth, w.half[1]);
    }
    packed += kUnitBytes<4>;
    unpacked += kUnpackedBytes;
  }
}

// ---------------------------------------------------------------- some tokens of a pass x some blocks

struct Tokens {
  const int8_t* x;  // of the first of them
  const ActivationGroup* groups;
  int64_t segment_bytes;  // from one segment of x to the next
  int64_t first, count;
};

// Blocks [block, block + kBlocks).
template <int kBits, int kBlocks>
void multiply_some(const QuantMatmulArgs& a, const Tokens& of_pass, int64_t block) {
  constexpr int kBytes = kWideActivations<kBits> ? 2 : 1;
  constexpr int64_t kRows = kBlocks * kBlockRows, kUnpackedBlock = kMaxSegment / 8 * kUnpackedBytes;
  alignas(64) float sums[kMostTokens * kRows];
  alignas(64) float scale[kMaxGroups * kRows], offset[kMaxGroups * kRows];
  alignas(64) uint8_t unpacked[kBits == 4 ? kBlocks * kUnpackedBlock : 1];
  const int64_t act_group = activation_group(a.group_size), act_groups = (a.K + act_group - 1) / act_group;
  const int64_t weight_groups = a.K / a.group_size, block_bytes = padded_k(a.K) * kBlockRows * a.bits / 8;
  const int64_t tokens = of_pass.count;
  const bool many = tokens > kUnpackTokens;
  const bool has_offset = a.minimum != nullptr || a.zero != kCenter<kBits>;
  const int64_t segment = int8_segment(a.K);
  for (int64_t k = 0; k < a.K; k += segment) {
    const int64_t count = a.K - k < segment ? a.K - k : segment;
    const int64_t num_groups = (count + act_group - 1) / act_group;
    for (int64_t g = 0; g < num_groups; ++g) {
      for (int64_t b = 0; b < kBlocks; ++b) {
        // A group of activations lies within one group of weights.
        const int64_t of = (block + b) * weight_groups + (k + g * act_group) / a.group_size;
        const int64_t at = (g * kBlocks + b) * kBlockRows;
        widen_16(a.scale, a.scale_dtype, of, scale + at);
        if (has_offset) widen_offset(a, of, kCenter<kBits>, scale + at, offset + at);
      }
    }
    Segment s;
    s.weights = a.data + block * block_bytes + k * kBlockRows * a.bits / 8;
    s.block_stride = block_bytes;
    s.x_stride = segment * kBytes;
    s.x = of_pass.x + k / segment * of_pass.segment_bytes;
    s.group = of_pass.groups + k / act_group;
    s.group_stride = act_groups;
    s.scale = scale;
    s.offset = has_offset ? offset : nullptr;
    s.one_scale = has_one_scale<kBits>(a);
    s.units = padded_k(count) / kUnitColumns<kBits>;
    s.units_a_group = act_group / kUnitColumns<kBits>;
    s.sums = sums;
    s.first = k == 0;
    s.last = k + segment >= a.K;
    s.args = &a;
    s.token = of_pass.first;
    s.block = block;
    s.ahead = {};
    if constexpr (kBlocks > 1) {
      const int64_t segment_bytes = segment * kBlockRows * a.bits / 8;
      // Behind the last segment stands the next block, which is one of those at work.
      s.ahead.weights = s.weights + (s.last ? block_bytes * kBlocks - k * kBlockRows * a.bits / 8 : segment_bytes);
      s.ahead.lines = (segment_bytes < block_bytes ? segment_bytes : block_bytes) / kLineBytes;
      s.ahead.block_stride = block_bytes;
      if (s.last) {
        const int64_t size = a.dtype == DType::f32 ? 4 : 2;
        s.ahead.y = static_cast<const char*>(a.y) + (of_pass.first * a.N + block * kBlockRows) * size;
        s.ahead.y_stride = a.N * size;
      }
    }
    if constexpr (kBits == 4) {
      if (many) {
        for (int64_t b = 0; b < kBlocks; ++b) {
          unpack_units(s.weights + b * block_bytes, s.units, unpacked + b * kUnpackedBlock);
        }
        s.weights = unpacked;
        s.block_stride = kUnpackedBlock;
        add_tiles<kBits, kBlocks == 1 ? kTile : kWideTile, kBlocks, true>(s, tokens);
        continue;
      }
    }
    if constexpr (kBlocks == 1) {
      add_tiles<kBits, kPackedTile<kBits>, 1, false>(s, tokens);
    } else if constexpr (kBits == 8) {
      add_tiles<kBits, kWideTile, kBlocks, false>(s, tokens);
    }
  }
}

template <int kBits>
void multiply_blocks(const QuantMatmulArgs& a, const Tokens& tokens, int64_t block, int64_t end) {
  if constexpr (kWideBlocks > 1) {
    for (; tokens.count > kUnpackTokens && block + kWideBlocks <= end; block += kWideBlocks) {
      multiply_some<kBits, kWideBlocks>(a, tokens, block);
    }
  }
  for (; block < end; ++block) multiply_some<kBits, 1>(a, tokens, block);
}

template <int kBits>
void multiply(const QuantMatmulArgs& a) {
  const int64_t act_group = activation_group(a.group_size), act_groups = (a.K + act_group - 1) / act_group;
  const int64_t blocks = (a.N + kBlockRows - 1) / kBlockRows;
  for (int64_t first = 0; first < a.M; first += kPassTokens) {
    const int64_t tokens = a.M - first < kPassTokens ? a.M - first : kPassTokens;
    // x: (segments, tokens, columns of a segment) integers, then (tokens, groups) scales.
    constexpr int kBytes = kWideActivations<kBits> ? 2 : 1;
    const int64_t row_bytes = int8_segment(a.K) * kBytes, segment_bytes = tokens * row_bytes;
    int8_t* x = reinterpret_cast<int8_t*>(a.scratch);
    auto* groups = reinterpret_cast<ActivationGroup*>(a.scratch + tokens * round_up(a.K, int8_segment(a.K)) * kBytes);
    parallel_for(tokens, 1 + 16384 / a.K, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        quantize_token<kBits>(a, first + t, act_group, x + t * row_bytes, segment_bytes, groups + t * act_groups);
      }
    });
    // Many tokens are divided among the threads: what a norm or a gate wrote and will read of a token is then in the
    // caches of the thread that multiplies it. Unpacking weights once for each part costs 1/100 of its products.
    int64_t parts = tokens / kPartTokens < a.threads ? tokens / kPartTokens : a.threads;
    // Whole tiles, so that only the last part has a rest.
    const int64_t least = (tokens + kMostTokens - 1) / kMostTokens;
    if (parts < least) parts = least;
    const int64_t part = (tokens + parts * kWideTile - 1) / (parts * kWideTile) * kWideTile;
    const int64_t block_work = padded_k(a.K) * a.bits * 2 * (part < 8 ? 1 : part / 4);
    // In steps of the widest tile, so that no chunk ends with half of one.
    const int64_t step = tokens > kUnpackTokens ? kWideBlocks : 1, steps = (blocks + step - 1) / step;
    parallel_for(parts * steps, 1 + 16384 / (block_work * step), a.threads, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t p = begin / steps, from = begin - p * steps, left = from + (end - begin);
        const int64_t to = left < steps ? left : steps, t = p * part;
        const Tokens these = {x + t * row_bytes, groups + t * act_groups, segment_bytes, first + t,
                              p < parts - 1 ? part : tokens - t};
        multiply_blocks<kBits>(a, these, from * step, to * step < blocks ? to * step : blocks);
        begin += to - from;
      }
    });
  }
}

}  // namespace

void quant_matmul_int8(const QuantMatmulArgs& a) { a.bits == 4 ? multiply<4>(a) : multiply<8>(a); }

}  // namespace fastllm::cpu::FASTLLM_ISA
