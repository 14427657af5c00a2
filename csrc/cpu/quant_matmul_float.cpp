// y = x w^T in fp32, with w = fma(q, scale, minimum - zero * scale) made in registers from the packed weights.
//
// Cost: N K bits / 8 bytes of weights, plus scales, once for every kMaxTokens tokens; 2 M N K floating-point operations,
// and four instructions for each vector of weights (shift, mask, convert, scale). With one token those instructions and
// reading the weights take about as long as each other. With many, weights are made once for all tokens into a panel of
// L1, and the multiply-add units are the limit.
//
// A token's bits do not depend on the other tokens: each row and token sums over k on one chain in order, segment by
// segment, whether the weights come from registers or from a panel.
#include "quant_matmul_float.h"

#include "parallel.h"
#include "quant_lines.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Tokens in a tile of the panel path, and blocks of 16 rows beside each other: as many sums as registers hold.
constexpr int kTile = FASTLLM_ISA_LEVEL == 0 ? 1 : FASTLLM_ISA_LEVEL == 1 ? 6 : 12;
constexpr int kPanelBlocks = FASTLLM_ISA_LEVEL >= 2 ? 2 : 1;
// Up to this many tokens, weights go from registers into the sums; with one token several blocks together keep enough
// chains of additions going.
constexpr int kDirectTokens = 3;
constexpr int kDirectBlocks = FASTLLM_ISA_LEVEL >= 2 ? 4 : FASTLLM_ISA_LEVEL == 1 ? 2 : 1;
constexpr int kMaxBlocks = kDirectBlocks > kPanelBlocks ? kDirectBlocks : kPanelBlocks;
constexpr int64_t kMaxGroups = kFloatSegment / 32;

// The next smaller size of tile that there is a kernel for: 12, 6, 3, 2, 1.
constexpr int smaller_tile(int tokens) { return tokens == 2 ? 1 : tokens == 3 ? 2 : tokens / 2; }

// ---------------------------------------------------------------- weights of 16 rows, eight or four columns a line

// Calls body(j, w) for the columns j of a line in order of k, w being their weights, one register of rows.
template <int kBits, int kColumn, typename Body>
FASTLLM_INLINE void each_column(vi line, vf scale, vf offset, const Body& body) {
  constexpr int kColumns = 32 / kBits;
  // 4 bits: columns 0 to 3 are the low nibbles of the four bytes, 4 to 7 the high ones.
  constexpr int kShift = kBits == 8 ? 8 * kColumn : 8 * (kColumn % 4) + kColumn / 4 * 4;
  body(kColumn, fmadd(weight_at<kBits, kShift>(line), scale, offset));
  if constexpr (kColumn + 1 < kColumns) each_column<kBits, kColumn + 1>(line, scale, offset, body);
}

// The scales and offsets (minimum - zero * scale) of one segment of a block: (groups, 16) each.
FASTLLM_INLINE void widen_scales(const QuantMatmulArgs& a, int64_t block, int64_t k, int64_t num_groups, float* scale,
                                 float* offset) {
  const int64_t first = block * (a.K / a.group_size) + k / a.group_size;
  for (int64_t g = 0; g < num_groups; ++g) {
    widen_16(a.scale, a.scale_dtype, first + g, scale + g * kBlockRows);
    widen_offset(a, first + g, a.zero, scale + g * kBlockRows, offset + g * kBlockRows);
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

// x: (columns, kTokens); sums: (kBlocks, tokens, 16), added to. Blocks beyond the first stand block_bytes apart.
template <int kBits, int kTokens, int kBlocks>
FASTLLM_INLINE void add_direct(const uint8_t* data, int64_t block_bytes, const float* x, const float* scale,
                               const float* offset, const Span& span, float* sums) {
  constexpr int kColumns = 32 / kBits;
  vf totals[kBlocks][kTokens][kBlockVectors];
#pragma GCC unroll 16
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVectors; ++v) totals[b][t][v] = zero();
    }
  }
  const int64_t padded = padded_k(span.count);
  for (int64_t g = 0; g < span.num_groups; ++g) {
    vf scales[kBlocks][kBlockVectors], offsets[kBlocks][kBlockVectors];
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t at = (b * kMaxGroups + g) * kBlockRows + v * kWidth;
        scales[b][v] = load(scale + at);
        offsets[b][v] = load(offset + at);
      }
    }
    const int64_t end = (g + 1) * span.group < padded ? (g + 1) * span.group : padded;
    for (int64_t k = g * span.group; k < end; k += kColumns) {
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
        for (int v = 0; v < kBlockVectors; ++v) {
          const vi line = load_int(data + b * block_bytes + v * 4 * kWidth);
          each_column<kBits, 0>(line, scales[b][v], offsets[b][v], [&](int j, vf w) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int t = 0; t < kTokens; ++t) {
              totals[b][t][v] = fmadd(w, set1(x[(k + j) * kTokens + t]), totals[b][t][v]);
            }
          });
        }
      }
      data += kLineBytes;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVectors; ++v) {
        float* to = sums + (b * kTokens + t) * kBlockRows + v * kWidth;
        store(to, load(to) + totals[b][t][v]);
      }
    }
  }
}

// ---------------------------------------------------------------- many tokens: through a panel

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
      for (int64_t k = g * span.group; k < end; k += kColumns) {
        const vi line = load_int(data + k / kColumns * kLineBytes + v * 4 * kWidth);
        float* to = panel + k * stride + v * kWidth;
        each_column<kBits, 0>(line, s, o, [&](int j, vf w) { store(to + j * stride, w); });
      }
    }
  }
}

// x: (columns, kTokens); sums: (tokens, kBlocks, 16), added to.
template <int kTokens, int kBlocks>
void add_panel_tile(const float* panel, const float* x, int64_t columns, float* sums) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  vf totals[kTokens][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) totals[t][v] = zero();
  }
  for (int64_t k = 0; k < columns; ++k) {
    vf w[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kWidth);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const vf one = set1(x[t]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) totals[t][v] = fmadd(w[v], one, totals[t][v]);
    }
    panel += kVectors * kWidth;
    x += kTokens;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + t * kBlocks * kBlockRows + v * kWidth;
      store(to, load(to) + totals[t][v]);
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

// Where a token's column k stands: segments, in them tiles, in them columns, in them tokens.
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
void spread_token(const T* x, int64_t K, int64_t token, int64_t tokens, float* out) {
  const Place place = place_of(token, tokens);
  for (int64_t k = 0; k < K; k += kFloatSegment) {
    const int64_t count = K - k < kFloatSegment ? K - k : kFloatSegment, padded = padded_k(count);
    float* to = out + k * tokens + place.tile * padded + place.in_tile;
    alignas(64) float values[kFloatSegment];
    for (int64_t i = 0; i < padded; i += kWidth) {
      const int64_t left = count - i;
      store(values + i, left >= kWidth ? load(x + k + i) : load_n(x + k + i, left > 0 ? left : 0));
    }
    for (int64_t i = 0; i < padded; ++i) to[i * place.tile_tokens] = values[i];
  }
}

// ---------------------------------------------------------------- all tokens of a pass x some blocks

template <int kBits, int kTokens, int kBlocks, typename T>
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
    const int64_t n = (block + b) * kBlockRows, columns = a.N - n < kBlockRows ? a.N - n : kBlockRows;
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + n : nullptr;
    for (int t = 0; t < kTokens; ++t) {
      store_block(static_cast<T*>(a.y) + (first_token + t) * a.N + n, bias, sums + (b * kTokens + t) * kBlockRows,
                  columns);
    }
  }
}

template <int kBits, int kBlocks, typename T>
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
    const int64_t n = (block + b) * kBlockRows, columns = a.N - n < kBlockRows ? a.N - n : kBlockRows;
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + n : nullptr;
    for (int64_t t = 0; t < tokens; ++t) {
      store_block(static_cast<T*>(a.y) + (first_token + t) * a.N + n, bias, sums + (t * kBlocks + b) * kBlockRows,
                  columns);
    }
  }
}

template <int kBits, typename T>
void multiply_blocks(const QuantMatmulArgs& a, const float* x, int64_t first, int64_t tokens, int64_t begin,
                     int64_t end) {
  int64_t block = begin;
  if (tokens > kDirectTokens) {
    for (; block + kPanelBlocks <= end; block += kPanelBlocks) {
      panel_blocks<kBits, kPanelBlocks, T>(a, x, first, tokens, block);
    }
    for (; block < end; ++block) panel_blocks<kBits, 1, T>(a, x, first, tokens, block);
  } else if (tokens == 3) {
    for (; block < end; ++block) direct_blocks<kBits, 3, 1, T>(a, x, first, block);
  } else if (tokens == 2) {
    for (; block < end; ++block) direct_blocks<kBits, 2, 1, T>(a, x, first, block);
  } else {
    for (; block + kDirectBlocks <= end; block += kDirectBlocks) {
      direct_blocks<kBits, 1, kDirectBlocks, T>(a, x, first, block);
    }
    for (; block < end; ++block) direct_blocks<kBits, 1, 1, T>(a, x, first, block);
  }
}

template <int kBits, typename T>
void multiply(const QuantMatmulArgs& a) {
  const int64_t blocks = (a.N + kBlockRows - 1) / kBlockRows;
  float* x = reinterpret_cast<float*>(a.scratch);
  for (int64_t first = 0; first < a.M; first += kMaxTokens) {
    const int64_t tokens = a.M - first < kMaxTokens ? a.M - first : kMaxTokens;
    parallel_for(tokens, 1 + 32768 / a.K, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        spread_token(static_cast<const T*>(a.x) + row_offset(a.x_rows, first + t), a.K, t, tokens, x);
      }
    });
    // A chunk is worth waking a thread for (64 KiB from memory are about 5 us), and a thread that falls behind can leave
    // the rest to the others.
    const int64_t block_work = padded_k(a.K) * kBits * 2 * tokens;
    const int64_t grain = round_up(1 + 65536 / block_work, kMaxBlocks);
    parallel_for(blocks, grain, a.threads, [&](int64_t begin, int64_t end) {
      multiply_blocks<kBits, T>(a, x, first, tokens, begin, end);
    });
  }
}

}  // namespace

void quant_matmul_float(const QuantMatmulArgs& a) {
#define FASTLLM_BODY(T) a.bits == 4 ? multiply<4, decltype(T)>(a) : multiply<8, decltype(T)>(a)
  FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
}

}  // namespace fastllm::cpu::FASTLLM_ISA
