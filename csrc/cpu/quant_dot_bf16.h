// Products of packed weights with activations in bf16 by vdpbf16ps, which takes two columns a step: included by
// quant_matmul_float.cpp where the rung has it, and used where the processor is fast at it (fast_bf16_dots).
//
//   y[m, n] = sum over pieces of 32 columns of scale * sum((q - center) x) + offset * sum(x)
//   offset = minimum + (center - zero) * scale
//
// Integers of up to 8 bits and x are exact in bf16, and their products in fp32: what is rounded are sums, in fp32, far
// below the rounding of y to bf16. So are, unlike in fp32, sums that cancel because q is not scaled first. A piece's
// sums must not overflow before they are scaled: tokens with numbers of 2^64 or more are left to fp32.
//
// Cost: half of the multiply-adds of fp32 and none of its conversions of x. A line of 4-bit weights takes 3 shifts and
// 4 look-ups in a table of bf16 numbers (vpermw sees 5 bits of each 16, and the table repeats itself every 16), so that
// its columns come in the order 0 2 | 4 6 | 1 3 | 5 7; x is stored in it too.
//
// A token's bits do not depend on the other tokens: a piece is summed on one chain, whatever the tile.
#pragma once

#include "quant_lines.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int64_t kPiece = 32;                       // columns; lies within one group of weights
constexpr int64_t kPieces = kFloatSegment / kPiece;  // in a segment
constexpr int64_t kPairs = kFloatSegment / 2;        // of columns, in a segment
constexpr float kHugeActivation = 0x1p64f;
template <int kBits>
constexpr int kDotCenter = 1 << (kBits - 1);

// ---------------------------------------------------------------- weights

// The pairs of columns of one line, as bf16: four of 4-bit weights, two of 8-bit ones.
template <int kBits>
FASTLLM_INLINE void widen_line(const uint8_t* line, __m512i (&pairs)[16 / kBits]) {
  const __m512i bits = _mm512_loadu_si512(line);
  if constexpr (kBits == 4) {
    // -8 ... 7, twice.
    alignas(64) static constexpr uint16_t kNumbers[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i numbers = _mm512_load_si512(kNumbers);
    pairs[0] = _mm512_permutexvar_epi16(bits, numbers);
    pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi32(bits, 4), numbers);
    pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi32(bits, 8), numbers);
    pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi32(bits, 12), numbers);
  } else {
    const __m512i centred = _mm512_xor_si512(bits, _mm512_set1_epi8(-128));  // signed bytes
    const __m512 a = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(centred, 24), 24));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(centred, 16), 24));
    const __m512 c = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(centred, 8), 24));
    const __m512 d = _mm512_cvtepi32_ps(_mm512_srai_epi32(centred, 24));
    // The upper halves are all there is.
    const __m512i upper = _mm512_set1_epi32(-65536);
    pairs[0] =
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_and_si512(_mm512_castps_si512(b), upper));
    pairs[1] =
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(c), 16), _mm512_and_si512(_mm512_castps_si512(d), upper));
  }
}

// ---------------------------------------------------------------- tiles

// A segment of K, of kBlocks blocks of 16 rows.
struct BfSegment {
  const uint8_t* data;  // packed lines, or pairs as widen_line leaves them; blocks stand block_bytes apart
  const bf16* x;        // the first token's; the others x_stride apart
  const float* x_sums;  // the first token's first piece; the other tokens' pieces sums_stride apart
  const float* scale;   // (pieces, kBlocks, 16)
  const float* offset;  // likewise, or null
  int64_t block_bytes, x_stride, sums_stride, columns;
  float* sums;  // (tokens, kBlocks, 16), added to
  // Of the last segment, whose tiles write y: see quant_matmul_int8.cpp.
  bool last;
  const QuantMatmulArgs* args;
  int64_t token, block;
  Ahead ahead;
};

// A line's columns from `data`, or from a panel the same pairs.
template <int kBits, bool kPanel>
FASTLLM_INLINE void load_line(const uint8_t* data, __m512i (&pairs)[16 / kBits]) {
  if constexpr (kPanel) {
    for (int i = 0; i < 16 / kBits; ++i) pairs[i] = _mm512_loadu_si512(data + i * kLineBytes);
  } else {
    widen_line<kBits>(data, pairs);
  }
}

template <int kBits, int kTokens, int kBlocks, bool kPanel>
void add_bf16_tile(const BfSegment& s) {
  constexpr int kColumns = 32 / kBits, kStep = kPanel ? 16 / kBits * kLineBytes : kLineBytes;
  const uint8_t* data = s.data;
  const bf16* x = s.x;
  vf totals[kTokens][kBlocks];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b) totals[t][b] = load(s.sums + (t * kBlocks + b) * kBlockRows);
  }
  for (int64_t k = 0, piece = 0; k < s.columns; ++piece) {
    vf sums[kTokens][kBlocks];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) sums[t][b] = zero();
    }
    const int64_t end = k + kPiece < s.columns ? k + kPiece : s.columns;
#pragma GCC unroll 1
    for (; k < end; k += kColumns) {
      __m512i pairs[kBlocks][16 / kBits];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b) {
        load_line<kBits, kPanel>(data + b * s.block_bytes, pairs[b]);
        if constexpr (!kPanel) __builtin_prefetch(data + b * s.block_bytes + kPrefetchBytes);
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16 / kBits; ++i) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b) sums[t][b] = dot_pair(sums[t][b], pairs[b][i], x + t * s.x_stride + 2 * i);
        }
      }
      data += kStep;
      x += kColumns;
    }
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t at = (piece * kBlocks + b) * kBlockRows;
      const vf scale = load(s.scale + at);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        totals[t][b] = fmadd(sums[t][b], scale, totals[t][b]);
        if (s.offset) {
          totals[t][b] = fmadd(load(s.offset + at), set1(s.x_sums[t * s.sums_stride + piece]), totals[t][b]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
    for (int b = 0; b < kBlocks; ++b) store(s.sums + (t * kBlocks + b) * kBlockRows, totals[t][b]);
  }
}

template <int kBits, int kTokens, int kBlocks>
FASTLLM_INLINE void add_bf16_tiles(BfSegment s, int64_t tokens) {
  for (; tokens >= kTokens; tokens -= kTokens) {
    ask_ahead<kTokens, kBlocks>(s.ahead, (tokens + kTokens - 1) / kTokens);
    add_bf16_tile<kBits, kTokens, kBlocks, true>(s);
    for (int b = 0; s.last && b < kBlocks; ++b) {
      store_rows(*s.args, s.token, kTokens, s.block + b, s.sums + b * kBlockRows, kBlocks * kBlockRows);
    }
    s.token += kTokens;
    s.x += kTokens * s.x_stride;
    s.x_sums += kTokens * s.sums_stride;
    s.sums += kTokens * kBlocks * kBlockRows;
  }
  if constexpr (kTokens > 1) add_bf16_tiles<kBits, smaller_tile(kTokens), kBlocks>(s, tokens);
}

// ---------------------------------------------------------------- activations

struct BfActivations {
  bf16* x;      // segments, in them tokens, in them columns in the order of widen_line
  float* sums;  // (tokens, pieces of K)
  int64_t pieces;
};

// Whether all numbers are small enough.
template <int kBits>
bool store_token(const QuantMatmulArgs& a, int64_t row, int64_t token, int64_t tokens, const BfActivations& to) {
  const bf16* from = static_cast<const bf16*>(a.x) + row_offset(a.x_rows, row);
  vf largest = zero();
  for (int64_t k = 0; k < a.K; k += kFloatSegment) {
    const int64_t count = a.K - k < kFloatSegment ? a.K - k : kFloatSegment, padded = padded_k(count);
    alignas(64) bf16 values[kFloatSegment] = {};
    std::memcpy(values, from + k, static_cast<size_t>(count) * sizeof(bf16));
    for (int64_t i = 0; i < count; i += kPiece) {
      const vf first = load(values + i), second = load(values + i + kWidth);
      largest = max_magnitude(first, max_magnitude(second, largest));
      to.sums[token * to.pieces + (k + i) / kPiece] = reduce_add(first + second);
    }
    bf16* out = to.x + k * tokens + token * padded;
    for (int64_t i = 0; i < padded; i += 8) {
      __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i));
      if (kBits == 4) {
        eight = _mm_shuffle_epi8(eight, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight);
    }
  }
  return reduce_max_magnitude(largest) < kHugeActivation;  // false for NaN
}

// ---------------------------------------------------------------- all tokens of a pass x some blocks

template <int kBits, int kTokens, int kBlocks>
void bf16_blocks(const QuantMatmulArgs& a, const BfActivations& of, int64_t first_token, int64_t tokens,
                 int64_t block) {
  constexpr bool kPanel = kTokens == 0;
  constexpr int64_t kRows = kBlocks * kBlockRows, kPanelBytes = kPairs * kLineBytes;
  alignas(64) float sums[(kPanel ? kMaxTokens : kTokens) * kRows];
  alignas(64) uint8_t panel[kPanel ? kBlocks * kPanelBytes : 1];
  alignas(64) float scale[kPieces * kRows], offset[kPieces * kRows];
  std::memset(sums, 0, static_cast<size_t>(tokens * kRows) * sizeof(float));
  const int64_t block_bytes = padded_k(a.K) * kBlockRows * kBits / 8;
  const bool has_offset = a.minimum != nullptr || a.zero != kDotCenter<kBits>;
  for (int64_t k = 0; k < a.K; k += kFloatSegment) {
    const int64_t count = a.K - k < kFloatSegment ? a.K - k : kFloatSegment;
    for (int64_t piece = 0; piece * kPiece < count; ++piece) {
      for (int64_t b = 0; b < kBlocks; ++b) {
        const int64_t group = (block + b) * (a.K / a.group_size) + (k + piece * kPiece) / a.group_size;
        const int64_t at = (piece * kBlocks + b) * kBlockRows;
        widen_16(a.scale, a.scale_dtype, group, scale + at);
        if (has_offset) widen_offset(a, group, kDotCenter<kBits>, scale + at, offset + at);
      }
    }
    BfSegment s;
    s.data = a.data + block * block_bytes + k * kBlockRows * kBits / 8;
    s.block_bytes = block_bytes;
    s.columns = padded_k(count);
    s.x_stride = s.columns;
    s.x = of.x + k * tokens;
    s.sums_stride = of.pieces;
    s.x_sums = of.sums + k / kPiece;
    s.scale = scale;
    s.offset = has_offset ? offset : nullptr;
    s.sums = sums;
    if constexpr (kPanel) {
      for (int b = 0; b < kBlocks; ++b) {
        uint8_t* to = panel + b * kPanelBytes;
        for (int64_t i = 0; i < s.columns; i += 32 / kBits) {
          __m512i pairs[16 / kBits];
          widen_line<kBits>(s.data + b * block_bytes + i * kBlockRows * kBits / 8, pairs);
          for (int j = 0; j < 16 / kBits; ++j, to += kLineBytes) _mm512_store_si512(to, pairs[j]);
        }
      }
      s.last = k + kFloatSegment >= a.K;
      s.args = &a;
      s.token = first_token;
      s.block = block;
      const int64_t segment_bytes = kFloatSegment * kBlockRows * kBits / 8;
      s.ahead = {};
      s.ahead.weights = s.data + (s.last ? block_bytes * kBlocks - k * kBlockRows * kBits / 8 : segment_bytes);
      s.ahead.lines = (segment_bytes < block_bytes ? segment_bytes : block_bytes) / kLineBytes;
      s.ahead.block_stride = block_bytes;
      if (s.last) {
        s.ahead.y = static_cast<const char*>(a.y) + (first_token * a.N + block * kBlockRows) * 2;
        s.ahead.y_stride = a.N * 2;
      }
      s.data = panel;
      s.block_bytes = kPanelBytes;
      add_bf16_tiles<kBits, kBlocks == 1 ? 12 : 6, kBlocks>(s, tokens);
    } else {
      add_bf16_tile<kBits, kTokens, kBlocks, false>(s);
    }
  }
  for (int64_t b = 0; !kPanel && b < kBlocks; ++b) {
    store_rows(a, first_token, tokens, block + b, sums + b * kBlockRows, kRows);
  }
}

// kTokens 0: any number, through a panel.
template <int kBits, int kTokens, int kBlocks>
FASTLLM_INLINE void bf16_range(const QuantMatmulArgs& a, const BfActivations& of, int64_t first, int64_t tokens,
                               int64_t block, int64_t end) {
  for (; block + kBlocks <= end; block += kBlocks) bf16_blocks<kBits, kTokens, kBlocks>(a, of, first, tokens, block);
  for (; block < end; ++block) bf16_blocks<kBits, kTokens, 1>(a, of, first, tokens, block);
}

template <int kBits>
void multiply_bf16_blocks(const QuantMatmulArgs& a, const BfActivations& of, int64_t first, int64_t tokens,
                          int64_t begin, int64_t end) {
  switch (tokens) {
    case 1:
      return bf16_range<kBits, 1, 4>(a, of, first, tokens, begin, end);
    case 2:
      return bf16_range<kBits, 2, 2>(a, of, first, tokens, begin, end);
    case 3:
      return bf16_range<kBits, 3, 2>(a, of, first, tokens, begin, end);
    case 4:
      return bf16_range<kBits, 4, 2>(a, of, first, tokens, begin, end);
    default:
      return bf16_range<kBits, 0, 2>(a, of, first, tokens, begin, end);
  }
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
