// y = x w^T in fp32, with w = fma(q, scale, minimum - zero * scale) made in registers from the packed weights.
//
// Cost: N K bits / 8 bytes of weights, plus scales, once for every kMaxTokens tokens; 2 M N K floating-point
// operations, and three instructions for each vector of weights (mask, convert, scale). With one token those
// instructions and reading the weights take about as long as each other. With many, weights are made once for all
// tokens into a panel of L1, and the multiply-add units are the limit.
//
// A token's bits do not depend on the other tokens: each row and token sums over k on one chain, in one order, segment
// by segment, whether the weights come from registers or from a panel. (Scaling sums of q x in place of each q would
// save an instruction, but sum(q x) is large where the activations have a mean, and cancels: it fails the tolerance
// rule.)
#include "quant_matmul_float.h"

#include "parallel.h"
#include "quant_lines.h"
#if FASTLLM_ISA_LEVEL >= 4
#include "quant_dot_bf16.h"
#endif

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Tokens in a tile of the panel path, and blocks of 16 rows beside each other: as many sums as registers hold.
constexpr int kTile = FASTLLM_ISA_LEVEL == 0 ? 1 : FASTLLM_ISA_LEVEL == 1 ? 6 : 12;
constexpr int kPanelBlocks = FASTLLM_ISA_LEVEL >= 2 ? 2 : 1;
// Up to this many tokens, weights go from registers into the sums; with few of them two blocks or more together keep
// enough chains of additions going.
constexpr int kDirectTokens = 4;
constexpr int kDirectBlocks = FASTLLM_ISA_LEVEL >= 2 ? 4 : FASTLLM_ISA_LEVEL == 1 ? 2 : 1;
constexpr int kMaxBlocks = kDirectBlocks > kPanelBlocks ? kDirectBlocks : kPanelBlocks;
constexpr int64_t kChain = 32;  // columns that are summed on one chain before the sum joins the total
constexpr int64_t kMaxGroups = kFloatSegment / 32;

// ---------------------------------------------------------------- scales

// The scales and offsets (minimum - zero * scale) of one segment of a block: (groups, 16) each.
FASTLLM_INLINE void widen_scales(const QuantMatmulArgs& a, int64_t block, int64_t k, int64_t num_groups, float* scale,
                                 float* offset) {
  const int64_t first = block * (a.K / a.group_size) + k / a.group_size;
  for (int64_t g = 0; g < num_groups; ++g) {
    widen_16(a.scale, a.scale_dtype, first + g, scale + g * kBlockRows);
    widen_offset(a, first + g, 0, scale + g * kBlockRows, offset + g * kBlockRows);
  }
}

struct Span {  // columns [k, k + count) of K, within one segment
  int64_t k, count, group, num_groups;
};

FASTLLM_INLINE Span span_at(const QuantMatmulArgs& a, int64_t k) {
  Span s;
  s.k = k;
  s.count = a.K - k < kFloatSegment ? a.K - k : kFloatSegment;
  s.group = a.group_size < kFloatSegment ? a.group_size : kFloatSegment;
  s.num_groups = (s.count + s.group - 1) / s.group;
  return s;
}

// ---------------------------------------------------------------- few tokens: straight from registers

// scale * 2^-p for p = 0, 4, 8, 12.
FASTLLM_INLINE void scales_by_power(vf scale, vf (&out)[4]) {
  out[0] = scale;
  out[1] = scale * set1(0x1p-4f);
  out[2] = scale * set1(0x1p-8f);
  out[3] = scale * set1(0x1p-12f);
}

// sums += w x for the columns of one half of a line, in order of rank.
template <int kBits, int kTokens, int kBlocks, int kColumn, bool kUpper>
FASTLLM_INLINE void add_half(const vi (&half)[kBlocks][kBlockVectors], const float* x,
                             const vf (&scales)[kBlocks][kBlockVectors][4], const vf (&offsets)[kBlocks][kBlockVectors],
                             vf (&sums)[kBlocks][kTokens][kBlockVectors]) {
  if constexpr (in_upper_half<kBits>(kColumn) == kUpper) {
    vf w[kBlocks][kBlockVectors];
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVectors; ++v) {
        w[b][v] =
            fmadd(scaled_column<kBits, kColumn>(half[b][v]), scales[b][v][power<kBits>(kColumn) / 4], offsets[b][v]);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const vf one = set1(x[rank<kBits>(kColumn) * kTokens + t]);
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) sums[b][t][v] = fmadd(w[b][v], one, sums[b][t][v]);
      }
    }
  }
  if constexpr (kColumn + 1 < 32 / kBits) {
    add_half<kBits, kTokens, kBlocks, kColumn + 1, kUpper>(half, x, scales, offsets, sums);
  }
}

// x: (columns, kTokens), columns in order of rank; scale, offset: (kBlocks, kMaxGroups, 16); sums: (kBlocks, kTokens,
// 16), added to. Blocks stand block_bytes apart.
template <int kBits, int kTokens, int kBlocks>
FASTLLM_INLINE void add_direct(const uint8_t* data, int64_t block_bytes, const float* x, const float* scale,
                               const float* offset, const Span& span, float* sums) {
  constexpr int kColumns = 32 / kBits;
  const int64_t padded = padded_k(span.count);
  for (int64_t g = 0; g < span.num_groups; ++g) {
    vf scales[kBlocks][kBlockVectors][4], offsets[kBlocks][kBlockVectors];
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t at = (b * kMaxGroups + g) * kBlockRows + v * kWidth;
        scales_by_power(load(scale + at), scales[b][v]);
        offsets[b][v] = load(offset + at);
      }
    }
    const int64_t end = (g + 1) * span.group < padded ? (g + 1) * span.group : padded;
    for (int64_t k = g * span.group; k < end;) {
      vf chains[kBlocks][kTokens][kBlockVectors];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
          for (int v = 0; v < kBlockVectors; ++v) chains[b][t][v] = zero();
        }
      }
      const int64_t chain_end = k + kChain < end ? k + kChain : end;
#pragma GCC unroll 1
      for (; k < chain_end; k += kColumns) {
        vi half[kBlocks][kBlockVectors];
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b) {
          __builtin_prefetch(data + b * block_bytes + kPrefetchBytes);
#pragma GCC unroll 16
          for (int v = 0; v < kBlockVectors; ++v) half[b][v] = load_int(data + b * block_bytes + v * 4 * kWidth);
        }
        add_half<kBits, kTokens, kBlocks, 0, false>(half, x, scales, offsets, chains);
#pragma GCC unroll 16
        for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
          for (int v = 0; v < kBlockVectors; ++v) half[b][v] = shift_right<16>(half[b][v]);
        }
        add_half<kBits, kTokens, kBlocks, 0, true>(half, x, scales, offsets, chains);
        data += kLineBytes;
        x += kColumns * kTokens;
      }
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
          for (int v = 0; v < kBlockVectors; ++v) {
            float* to = sums + (b * kTokens + t) * kBlockRows + v * kWidth;
            store(to, load(to) + chains[b][t][v]);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- many tokens: through a panel

// Writes the columns of one line to a panel, `stride` floats apart, in order of rank.
template <int kBits, int kColumn>
FASTLLM_INLINE void fill_columns(vi line, vi upper, const vf (&scales)[4], vf offset, int64_t stride, float* to) {
  const vf q = scaled_column<kBits, kColumn>(in_upper_half<kBits>(kColumn) ? upper : line);
  store(to + rank<kBits>(kColumn) * stride, fmadd(q, scales[power<kBits>(kColumn) / 4], offset));
  if constexpr (kColumn + 1 < 32 / kBits) fill_columns<kBits, kColumn + 1>(line, upper, scales, offset, stride, to);
}

// panel: (columns, blocks, 16) floats.
template <int kBits>
FASTLLM_INLINE void fill_panel(const uint8_t* data, const float* scale, const float* offset, const Span& span,
                               int64_t blocks, float* panel) {
  constexpr int kColumns = 32 / kBits;
  const int64_t padded = padded_k(span.count), stride = blocks * kBlockRows;
  for (int64_t g = 0; g < span.num_groups; ++g) {
    const int64_t end = (g + 1) * span.group < padded ? (g + 1) * span.group : padded;
    for (int v = 0; v < kBlockVectors; ++v) {
      const vf s = load(scale + g * kBlockRows + v * kWidth), o = load(offset + g * kBlockRows + v * kWidth);
      vf scales[4];
      scales_by_power(s, scales);
      for (int64_t k = g * span.group; k < end; k += kColumns) {
        const vi line = load_int(data + k / kColumns * kLineBytes + v * 4 * kWidth);
        fill_columns<kBits, 0>(line, shift_right<16>(line), scales, o, stride, panel + k * stride + v * kWidth);
      }
    }
  }
}

// x: (columns, kTokens); sums: (tokens, kBlocks, 16), added to.
template <int kTokens, int kBlocks>
void add_panel_tile(const float* panel, const float* x, int64_t columns, float* sums) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  for (int64_t k = 0; k < columns;) {
    vf chains[kTokens][kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) chains[t][v] = zero();
    }
    const int64_t chain_end = k + kChain < columns ? k + kChain : columns;
    for (; k < chain_end; ++k) {
      vf w[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kWidth);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const vf one = set1(x[t]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) chains[t][v] = fmadd(w[v], one, chains[t][v]);
      }
      panel += kVectors * kWidth;
      x += kTokens;
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + t * kBlocks * kBlockRows + v * kWidth;
        store(to, load(to) + chains[t][v]);
      }
    }
  }
}

template <int kTokens, int kBlocks>
FASTLLM_INLINE void add_panel_tiles(const float* panel, const float* x, int64_t columns, int64_t tokens, float* sums) {
  for (; tokens >= kTokens; tokens -= kTokens) {
    add_panel_tile<kTokens, kBlocks>(panel, x, columns, sums);
    x += columns * kTokens;
    sums += kTokens * kBlocks * kBlockRows;
  }
  if constexpr (kTokens > 1) add_panel_tiles<smaller_tile(kTokens), kBlocks>(panel, x, columns, tokens, sums);
}

// ---------------------------------------------------------------- activations

// Where a token stands: in one tile with all others, or among the tiles of the panel path.
struct Place {
  int64_t tile, in_tile, tile_tokens;  // the tile's first token, the token in it, the tile's size
};

FASTLLM_INLINE Place place_of(int64_t token, int64_t tokens) {
  if (tokens <= kDirectTokens) return {0, token, tokens};
  int64_t tile = 0;
  for (int size = kTile;; size = smaller_tile(size)) {
    const int64_t end = tile + (tokens - tile) / size * size;
    if (token < end) {
      tile += (token - tile) / size * size;
      return {tile, token - tile, size};
    }
    tile = end;
  }
}

template <typename T>
FASTLLM_INLINE void load_columns(const T* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t left = count - i;
    store(out + i, left >= kWidth ? load(x + i) : load_n(x + i, left));
  }
}

// x[row, k ...] as floats, zeros from `count` to `padded`.
void load_row(const QuantMatmulArgs& a, int64_t row, int64_t k, int64_t count, int64_t padded, float* out) {
  const int64_t at = row_offset(a.x_rows, row) + k;
  for (int64_t i = count; i < padded; ++i) out[i] = 0.0f;
#define FASTLLM_BODY(T) load_columns(static_cast<const decltype(T)*>(a.x) + at, count, out)
  FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
}

// Segments, in them tiles, in them columns in order of rank, in them tokens.
template <int kBits>
void spread_token(const QuantMatmulArgs& a, int64_t row, int64_t token, int64_t tokens, float* out) {
  constexpr int kColumns = 32 / kBits;
  const Place place = place_of(token, tokens);
  for (int64_t k = 0; k < a.K; k += kFloatSegment) {
    const int64_t count = a.K - k < kFloatSegment ? a.K - k : kFloatSegment, padded = padded_k(count);
    float* to = out + k * tokens + place.tile * padded + place.in_tile;
    alignas(64) float values[kFloatSegment];
    load_row(a, row, k, count, padded, values);
    for (int64_t i = 0; i < padded; i += kColumns) {
      for (int c = 0; c < kColumns; ++c) to[(i + rank<kBits>(c)) * place.tile_tokens] = values[i + c];
    }
  }
}

// ---------------------------------------------------------------- all tokens of a pass x some blocks

template <int kBits, int kTokens, int kBlocks>
void direct_blocks(const QuantMatmulArgs& a, const float* x, int64_t first_token, int64_t block) {
  alignas(64) float sums[kBlocks * kTokens * kBlockRows] = {};
  alignas(64) float scale[kBlocks * kMaxGroups * kBlockRows], offset[kBlocks * kMaxGroups * kBlockRows];
  const int64_t block_bytes = padded_k(a.K) * kBlockRows * kBits / 8;
  for (int64_t k = 0; k < a.K; k += kFloatSegment) {
    const Span span = span_at(a, k);
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t at = b * kMaxGroups * kBlockRows;
      widen_scales(a, block + b, k, span.num_groups, scale + at, offset + at);
    }
    add_direct<kBits, kTokens, kBlocks>(a.data + block * block_bytes + k * kBlockRows * kBits / 8, block_bytes,
                                        x + k * kTokens, scale, offset, span, sums);
  }
  for (int b = 0; b < kBlocks; ++b) {
    store_rows(a, first_token, kTokens, block + b, sums + b * kTokens * kBlockRows, kBlockRows);
  }
}

template <int kBits, int kBlocks>
void panel_blocks(const QuantMatmulArgs& a, const float* x, int64_t first_token, int64_t tokens, int64_t block) {
  alignas(64) float sums[kMaxTokens * kBlocks * kBlockRows];
  alignas(64) float panel[kFloatSegment * kBlocks * kBlockRows];
  alignas(64) float scale[kMaxGroups * kBlockRows], offset[kMaxGroups * kBlockRows];
  const int64_t block_bytes = padded_k(a.K) * kBlockRows * kBits / 8;
  std::memset(sums, 0, static_cast<size_t>(tokens * kBlocks * kBlockRows) * sizeof(float));
  for (int64_t k = 0; k < a.K; k += kFloatSegment) {
    const Span span = span_at(a, k);
    for (int b = 0; b < kBlocks; ++b) {
      widen_scales(a, block + b, k, span.num_groups, scale, offset);
      fill_panel<kBits>(a.data + (block + b) * block_bytes + k * kBlockRows * kBits / 8, scale, offset, span, kBlocks,
                        panel + b * kBlockRows);
    }
    add_panel_tiles<kTile, kBlocks>(panel, x + k * tokens, padded_k(span.count), tokens, sums);
  }
  for (int b = 0; b < kBlocks; ++b) {
    store_rows(a, first_token, tokens, block + b, sums + b * kBlockRows, kBlocks * kBlockRows);
  }
}

template <int kBits, int kTokens, int kBlocks>
FASTLLM_INLINE void direct_range(const QuantMatmulArgs& a, const float* x, int64_t first, int64_t block, int64_t end) {
  for (; block + kBlocks <= end; block += kBlocks) direct_blocks<kBits, kTokens, kBlocks>(a, x, first, block);
  if constexpr (kBlocks > 1) {
    for (; block < end; ++block) direct_blocks<kBits, kTokens, 1>(a, x, first, block);
  }
}

template <int kBits>
void multiply_blocks(const QuantMatmulArgs& a, const float* x, int64_t first, int64_t tokens, int64_t begin,
                     int64_t end) {
  switch (tokens) {
    case 1:
      return direct_range<kBits, 1, kDirectBlocks>(a, x, first, begin, end);
    case 2:
      return direct_range<kBits, 2, kDirectBlocks>(a, x, first, begin, end);
    case 3:
      return direct_range<kBits, 3, 1>(a, x, first, begin, end);
    case kDirectTokens:
      return direct_range<kBits, 4, 1>(a, x, first, begin, end);
    default:
      break;
  }
  int64_t block = begin;
  for (; block + kPanelBlocks <= end; block += kPanelBlocks) {
    panel_blocks<kBits, kPanelBlocks>(a, x, first, tokens, block);
  }
  for (; block < end; ++block) panel_blocks<kBits, 1>(a, x, first, tokens, block);
}

// A chunk is worth waking a thread for (64 KiB from memory are about 5 us), and a thread that falls behind can leave
// the rest to the others.
template <int kBits>
FASTLLM_INLINE int64_t chunk_blocks(const QuantMatmulArgs& a, int64_t tokens) {
  const int64_t block_work = padded_k(a.K) * kBits * 2 * tokens;
  return round_up(1 + 65536 / block_work, kMaxBlocks);
}

// Tokens [first, first + tokens), of one pass over the weights.
template <int kBits>
void multiply_tokens(const QuantMatmulArgs& a, int64_t first, int64_t tokens) {
  const int64_t blocks = (a.N + kBlockRows - 1) / kBlockRows;
  float* x = reinterpret_cast<float*>(a.scratch);
  parallel_for(tokens, 1 + 32768 / a.K, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) spread_token<kBits>(a, first + t, t, tokens, x);
  });
  parallel_for(blocks, chunk_blocks<kBits>(a, tokens), a.threads,
               [&](int64_t begin, int64_t end) { multiply_blocks<kBits>(a, x, first, tokens, begin, end); });
}

#if FASTLLM_ISA_LEVEL >= 4
template <int kBits>
void multiply_tokens_bf16(const QuantMatmulArgs& a, int64_t first, int64_t tokens) {
  const int64_t blocks = (a.N + kBlockRows - 1) / kBlockRows;
  BfActivations of;
  of.x = reinterpret_cast<bf16*>(a.scratch);
  of.sums = reinterpret_cast<float*>(of.x + tokens * padded_k(a.K));
  of.pieces = (a.K + kPiece - 1) / kPiece;
  bool small[kMaxTokens];
  parallel_for(tokens, 1 + 32768 / a.K, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) small[t] = store_token<kBits>(a, first + t, t, tokens, of);
  });
  parallel_for(blocks, chunk_blocks<kBits>(a, tokens), a.threads,
               [&](int64_t begin, int64_t end) { multiply_bf16_blocks<kBits>(a, of, first, tokens, begin, end); });
  for (int64_t t = 0; t < tokens; ++t) {
    if (!small[t]) multiply_tokens<kBits>(a, first + t, 1);
  }
}
#endif

template <int kBits>
void multiply(const QuantMatmulArgs& a) {
  for (int64_t first = 0; first < a.M; first += kMaxTokens) {
    const int64_t tokens = a.M - first < kMaxTokens ? a.M - first : kMaxTokens;
#if FASTLLM_ISA_LEVEL >= 4
    if (a.dtype == DType::bf16 && a.bf16_dots) {
      multiply_tokens_bf16<kBits>(a, first, tokens);
      continue;
    }
#endif
    multiply_tokens<kBits>(a, first, tokens);
  }
}

}  // namespace

void quant_matmul_float(const QuantMatmulArgs& a) { a.bits == 4 ? multiply<4>(a) : multiply<8>(a); }

}  // namespace fastllm::cpu::FASTLLM_ISA
