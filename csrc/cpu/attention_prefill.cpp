// Attention for many queries: blocked online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135). The T x S matrix never exists.
//
// The queries of the G heads that share a key/value head form T * G rows, token-major, so that the keys that a row sees
// grow with the row. A task is a run of M of these rows. It walks the blocks of kBlock keys that it sees; each block of
// K and V is widened to fp32 once and serves all M rows. Rows go in panels of kPanel:
//
//   scores  P[s][m] = K[s] . Q[m]      m runs along the vector, K is broadcast: nothing is transposed but Q, once
//   softmax down the columns of P      maxima and sums are plain vectors, one lane a row
//   acc[m] += P[.][m]^T V              d runs along the vector, P is broadcast
//
// A panel works on the keys that its own rows see, to the microtile, so that causal calls pay for half of the matrix.
// Blocks start at multiples of kBlock, and a key of weight 0 adds exactly 0: a row's bits depend neither on the other
// queries of the call nor on the cut into tasks, which may therefore follow the number of threads.
//
// Bytes: q, k, v read and o written once by the task that needs them; k and v again for every task of their head, from
// the cache nearest to it that holds them. Flops: 4 D for each pair of query and visible key, against about 20 vector
// instructions a vector of weights. FMA throughput is the limit: for each microtile step kPanelVecs + kKeys loads feed
// kPanelVecs * kKeys FMAs (scores) and kOutVecs + kOutRows feed kOutVecs * kOutRows (output).
//
// Where q, k and v are bf16 and the processor is fast at vdpbf16ps, the same tiles take two steps at once: pairs of d
// in scores, of which no bit is lost, and pairs of keys in the output, for which weights are rounded to bf16 and the
// sums they are divided by are of the rounded ones.
#include "attention_prefill.h"

#include "attention_common.h"
#include "parallel.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Microtiles: accumulators, one vector of each operand and a broadcast fill the register file (16, or 32 on AVX-512).
#if FASTLLM_ISA_LEVEL >= 2
constexpr int kPanelVecs = 3, kKeys = 8, kOutRows = 12, kOutVecs = 2;
#elif FASTLLM_ISA_LEVEL == 1
constexpr int kPanelVecs = 3, kKeys = 4, kOutRows = 6, kOutVecs = 2;
#else
constexpr int kPanelVecs = 4, kKeys = 2, kOutRows = 4, kOutVecs = 2;
#endif
constexpr int64_t kPanel = kPanelVecs * kWidth;
constexpr int64_t kBlock = 64;     // K and V of a block at D = 64 are 16 KiB each: half of L1, or a little of L2
constexpr int64_t kMaxPanels = 4;  // of a task: widening a block of K and V then costs 1/40 of the work on it
constexpr int64_t kRun = kWidth == 1 ? 8 : 32;  // without FMA each step rounds twice
static_assert(kPanel % kOutRows == 0 && kBlock % kKeys == 0, "tiles divide panels and blocks");

// Scratch of one thread.
struct Scratch {
  float* q;     // kMaxPanels of [D][kPanel]
  float* k;     // [kBlock][padded D]
  float* v;     // [kBlock][padded D]
  float* p;     // [kBlock][kPanel]: scores, then weights
  float* acc;   // [kMaxPanels * kPanel][padded D]
  float* max;   // [kMaxPanels * kPanel], running
  float* sum;   // [kMaxPanels * kPanel], running
  float* bias;  // [kBlock], and a row of q
};

FASTLLM_INLINE int64_t scratch_floats(int64_t D) {
  const int64_t wide = round_up(D, kWidth), rows = kMaxPanels * kPanel;
  return round_up(rows * D + 2 * kBlock * wide + kBlock * kPanel + rows * wide + 2 * rows + kBlock + wide, 64);
}
FASTLLM_INLINE Scratch carve(float* memory, int64_t D) {
  const int64_t wide = round_up(D, kWidth), rows = kMaxPanels * kPanel;
  Scratch s;
  s.p = memory;
  s.acc = s.p + kBlock * kPanel;
  s.max = s.acc + rows * wide;
  s.sum = s.max + rows;
  s.v = s.sum + rows;
  s.q = s.v + kBlock * wide;
  s.k = s.q + rows * D;
  s.bias = s.k + kBlock * wide;
  return s;
}

FASTLLM_INLINE void clear(vf (&acc)[kKeys][kPanelVecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = zero();
  }
}
// p = acc, or p += acc where it is not the first run of d.
FASTLLM_INLINE void store_scores(const vf (&acc)[kKeys][kPanelVecs], bool first, float* p) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVecs; ++j) {
      float* at = p + i * kPanel + j * kWidth;
      store(at, first ? acc[i][j] : load(at) + acc[i][j]);
    }
  }
}
template <int Vecs>
FASTLLM_INLINE void clear(vf (&acc)[kOutRows][Vecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < kOutRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; ++j) acc[i][j] = zero();
  }
}
// out[i] = out[i] * correction[i] + acc[i].
template <int Vecs>
FASTLLM_INLINE void add_output(const vf (&acc)[kOutRows][Vecs], int64_t wide, const float* correction, float* out) {
#pragma GCC unroll 16
  for (int i = 0; i < kOutRows; ++i) {
    const vf c = set1(correction[i]);
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; ++j) {
      float* at = out + i * wide + j * kWidth;
      store(at, fmadd(load(at), c, acc[i][j]));
    }
  }
}

// p[i][m] = sum over d of k[i][d] q[d][m] for kKeys keys and a panel of rows. Runs of kRun products are summed by
// themselves and then added up: the error of a single chain grows with D.
FASTLLM_INLINE void score_tile(const float* k, int64_t wide, const float* q, int64_t D, float* p) {
  for (int64_t d0 = 0; d0 < D; d0 += kRun) {
    vf acc[kKeys][kPanelVecs];
    clear(acc);
    const int64_t end = least(d0 + kRun, D);
    for (int64_t d = d0; d < end; ++d, q += kPanel) {
      vf rows[kPanelVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVecs; ++j) rows[j] = load(q + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const vf key = set1(k[i * wide + d]);
#pragma GCC unroll 16
        for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = fmadd(key, rows[j], acc[i][j]);
      }
    }
    store_scores(acc, d0 == 0, p);
  }
}

// out[i][d] = out[i][d] * correction[i] + sum over `keys` of p[s][i] v[s][d], for kOutRows rows and Vecs vectors of d.
template <int Vecs>
FASTLLM_INLINE void output_tile(const float* p, const float* v, int64_t wide, int64_t keys, const float* correction,
                                float* out) {
  vf acc[kOutRows][Vecs];
  clear<Vecs>(acc);
  for (int64_t s = 0; s < keys; ++s, p += kPanel, v += wide) {
    vf value[Vecs];
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; ++j) value[j] = load(v + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kOutRows; ++i) {
      const vf weight = set1(p[i]);
#pragma GCC unroll 16
      for (int j = 0; j < Vecs; ++j) acc[i][j] = fmadd(weight, value[j], acc[i][j]);
    }
  }
  add_output<Vecs>(acc, wide, correction, out);
}

void output_panel(const float* p, const float* v, int64_t wide, int64_t keys, const float* correction, float* acc) {
  for (int64_t r = 0; r < kPanel; r += kOutRows) {
    int64_t d = 0;
    for (; d + kOutVecs * kWidth <= wide; d += kOutVecs * kWidth)
      output_tile<kOutVecs>(p + r, v + d, wide, keys, correction + r, acc + r * wide + d);
    for (; d < wide; d += kWidth) output_tile<1>(p + r, v + d, wide, keys, correction + r, acc + r * wide + d);
  }
}

// Scores p[begin .. end)[m] become weights 2^((score - new maximum) c); max, sum and correction = 2^((old - new) c)
// follow.
FASTLLM_INLINE void softmax_panel(float* p, int64_t begin, int64_t end, float c, float* row_max, float* row_sum,
                                  float* correction) {
  const vf exponent = set1(c);
#pragma GCC unroll 16
  for (int j = 0; j < kPanelVecs; ++j) {
    float* column = p + j * kWidth;
    const vf before = load(row_max + j * kWidth);
    vf after = before;
    for (int64_t s = begin; s < end; ++s) after = max(after, load(column + s * kPanel));
    // Where no key was visible so far, the maximum is minus infinity, and subtracting it would give NaN.
    const vf shift = max(set1(kLowest), after);
    vf sum = zero();
    for (int64_t s = begin; s < end; ++s) {
      const vf weight = exp2((load(column + s * kPanel) - shift) * exponent);
      store(column + s * kPanel, weight);
      sum = sum + weight;
    }
    const vf scale = exp2((before - shift) * exponent);
    store(correction + j * kWidth, scale);
    store(row_max + j * kWidth, after);
    store(row_sum + j * kWidth, fmadd(load(row_sum + j * kWidth), scale, sum));
  }
}

// ---------------------------------------------------------------- the same in pairs of bf16

#if FASTLLM_ISA_LEVEL >= 4

constexpr uint32_t kLower = 0x0000ffff, kUpper = 0xffff0000;  // of a pair: the first, the second

FASTLLM_INLINE uint32_t* words(float* scratch) { return reinterpret_cast<uint32_t*>(scratch); }

// p[i][m] as score_tile has it; k and q in pairs of d, of which there are D / 2.
FASTLLM_INLINE void score_tile(const uint32_t* k, int64_t wide, const uint32_t* q, int64_t D, float* p) {
  for (int64_t d0 = 0; d0 < D / 2; d0 += kRun / 2) {
    vf acc[kKeys][kPanelVecs];
    clear(acc);
    const int64_t end = least(d0 + kRun / 2, D / 2);
    for (int64_t d = d0; d < end; ++d, q += kPanel) {
      __m512i rows[kPanelVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVecs; ++j) rows[j] = _mm512_loadu_si512(q + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = dot_pair(acc[i][j], rows[j], k + i * wide + d);
      }
    }
    store_scores(acc, d0 == 0, p);
  }
}

// As softmax_panel, but the weights of keys 2 i and 2 i + 1 become pairs, at p[i]: their scores are read by then. A key
// outside of [begin, end) has the weight 0.
FASTLLM_INLINE void softmax_pairs(float* p, int64_t begin, int64_t end, float c, float* row_max, float* row_sum,
                                  float* correction) {
  const vf exponent = set1(c);
  constexpr uint32_t kOnes = 0x3f803f80;
#pragma GCC unroll 16
  for (int j = 0; j < kPanelVecs; ++j) {
    float* column = p + j * kWidth;
    const vf before = load(row_max + j * kWidth);
    vf after = before;
    for (int64_t s = begin; s < end; ++s) after = max(after, load(column + s * kPanel));
    const vf shift = max(set1(kLowest), after);
    vf sum = zero();
    for (int64_t i = begin / 2; 2 * i < end; ++i) {
      const float* scores = column + 2 * i * kPanel;
      pair weights = {zero(), zero()};
      if (2 * i >= begin) weights.first = exp2((load(scores) - shift) * exponent);
      if (2 * i + 1 < end) weights.second = exp2((load(scores + kPanel) - shift) * exponent);
      const __m512i both = narrow_pair(weights);
      _mm512_storeu_si512(words(column + i * kPanel), both);
      sum = dot_pair(sum, both, &kOnes);
    }
    const vf scale = exp2((before - shift) * exponent);
    store(correction + j * kWidth, scale);
    store(row_max + j * kWidth, after);
    store(row_sum + j * kWidth, fmadd(load(row_sum + j * kWidth), scale, sum));
  }
}

// One pair of keys: v has a word for each d, of which `mask` is left; a key that no row sees may be NaN.
template <int Vecs>
FASTLLM_INLINE void output_step(const uint32_t* p, const uint32_t* v, uint32_t mask, vf (&acc)[kOutRows][Vecs]) {
  __m512i value[Vecs];
#pragma GCC unroll 16
  for (int j = 0; j < Vecs; ++j) {
    value[j] = _mm512_and_si512(_mm512_loadu_si512(v + j * kWidth), _mm512_set1_epi32(static_cast<int32_t>(mask)));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kOutRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; ++j) acc[i][j] = dot_pair(acc[i][j], value[j], p + i);
  }
}

// As output_tile, over the keys [begin, end); p and v in pairs of keys.
template <int Vecs>
FASTLLM_INLINE void output_pairs_tile(const uint32_t* p, const uint32_t* v, int64_t wide, int64_t begin, int64_t end,
                                      const float* correction, float* out) {
  vf acc[kOutRows][Vecs];
  clear<Vecs>(acc);
  int64_t i = begin / 2;
  if (begin % 2 != 0) {
    output_step<Vecs>(p + i * kPanel, v + i * wide, kUpper, acc);
    ++i;
  }
  for (; 2 * i + 1 < end; ++i) output_step<Vecs>(p + i * kPanel, v + i * wide, kLower | kUpper, acc);
  if (2 * i < end) output_step<Vecs>(p + i * kPanel, v + i * wide, kLower, acc);
  add_output<Vecs>(acc, wide, correction, out);
}

void output_pairs(const uint32_t* p, const uint32_t* v, int64_t wide, int64_t begin, int64_t end,
                  const float* correction, float* acc) {
  for (int64_t r = 0; r < kPanel; r += kOutRows) {
    int64_t d = 0;
    for (; d + kOutVecs * kWidth <= wide; d += kOutVecs * kWidth)
      output_pairs_tile<kOutVecs>(p + r, v + d, wide, begin, end, correction + r, acc + r * wide + d);
    for (; d < wide; d += kWidth)
      output_pairs_tile<1>(p + r, v + d, wide, begin, end, correction + r, acc + r * wide + d);
  }
}

// D bf16 as D / 2 pairs, each `step` words from the last; their signs turned if asked.
FASTLLM_INLINE void spread_row(const bf16* x, int64_t D, bool negative, uint32_t* out, int64_t step) {
  const uint32_t signs = negative ? 0x80008000 : 0;
  for (int64_t d = 0; d < D / 2; ++d) {
    uint32_t both;
    std::memcpy(&both, x + 2 * d, sizeof both);
    out[d * step] = both ^ signs;
  }
}

// Rows a and b become words of `wide` d: a's bits in the lower half, b's, or 0 where there is no b, in the upper.
FASTLLM_INLINE void join_rows(const bf16* a, const bf16* b, int64_t D, int64_t wide, uint32_t* out) {
  for (int64_t d = 0; d < wide; d += kWidth) {
    const __mmask16 lanes = D - d < kWidth ? lane_mask(D - d) : static_cast<__mmask16>(-1);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, a + d));
    const __m512i high = b ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, b + d)) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

#endif

// ---------------------------------------------------------------- a task

struct Task {
  int64_t b, kv_head, row0, row1;  // row = token * G + query head of the group
};

template <typename T>
FASTLLM_INLINE T* row_of(const void* tensor, const int64_t (&strides)[3], int64_t b, int64_t head, int64_t token) {
  return static_cast<T*>(const_cast<void*>(tensor)) + b * strides[0] + head * strides[1] + token * strides[2];
}

// kPairs: in pairs of bf16, which q and the cache are and D has whole ones of.
template <typename Cache, bool kPairs>
void attend(const AttentionArgs& a, const Task& task, const Scratch& x) {
  const int64_t D = a.D, wide = round_up(D, kWidth), G = a.H / a.Hk, head0 = task.kv_head * G;
  const int64_t rows = task.row1 - task.row0, padded = round_up(rows, kPanel);
  const int64_t keys = num_keys(a, task.b);

  // Q, widened and transposed into panels; rows past the last are zero.
  const float factor = q_factor(a), exponent = weight_exponent(a);
  std::memset(x.q, 0, static_cast<size_t>(padded * D) * sizeof(float));
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = task.row0 + m;
#if FASTLLM_ISA_LEVEL >= 4
    if constexpr (kPairs) {
      spread_row(row_of<const bf16>(a.q, a.q_strides, task.b, head0 + row % G, row / G), D, factor < 0,
                 words(x.q + m / kPanel * kPanel * (D / 2) + m % kPanel), kPanel);
      continue;
    }
#endif
#define FASTLLM_BODY(T) \
  widen_row(row_of<const decltype(T)>(a.q, a.q_strides, task.b, head0 + row % G, row / G), D, factor, x.bias)
    FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
    float* column = x.q + m / kPanel * kPanel * D + m % kPanel;
    for (int64_t d = 0; d < D; ++d) column[d * kPanel] = x.bias[d];
  }
  // A sink is a key of value 0 that every row has seen beforehand.
  for (int64_t m = 0; m < padded; ++m) {
    const float sink = a.sinks ? a.sinks[head0 + (task.row0 + m) % G] : -kInfinity;
    x.max[m] = sink;
    x.sum[m] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  std::memset(x.acc, 0, static_cast<size_t>(padded * wide) * sizeof(float));

  const Cache* k = row_of<const Cache>(a.k, a.k_strides, task.b, task.kv_head, 0);
  const Cache* v = row_of<const Cache>(a.v, a.v_strides, task.b, task.kv_head, 0);
  const bool scaled = a.k_scale != nullptr;
  const float* k_scale = scaled ? scales_of(a.k_scale, a.k_scale_strides, task.b, task.kv_head) : nullptr;
  const float* v_scale = scaled ? scales_of(a.v_scale, a.v_scale_strides, task.b, task.kv_head) : nullptr;
  const int64_t first = visible(a, keys, task.row0 / G).begin / kBlock * kBlock;
  const int64_t last = visible(a, keys, (task.row1 - 1) / G).end;
  for (int64_t s0 = first; s0 < last; s0 += kBlock) {
    const int64_t block = least(kBlock, last - s0);
#if FASTLLM_ISA_LEVEL >= 4
    if constexpr (kPairs) {
      for (int64_t s = 0; s < block; ++s) {
        spread_row(k + (s0 + s) * a.k_strides[2], D, false, words(x.k) + s * (D / 2), 1);
        if (s % 2 != 0) continue;
        const bf16* row = v + (s0 + s) * a.v_strides[2];
        join_rows(row, s + 1 < block ? row + a.v_strides[2] : nullptr, D, wide, words(x.v) + s / 2 * wide);
      }
      std::memset(words(x.k) + block * (D / 2), 0, static_cast<size_t>((round_up(block, kKeys) - block) * D) * 2);
    }
#endif
    for (int64_t s = 0; !kPairs && s < block; ++s) {
      widen_row(k + (s0 + s) * a.k_strides[2], D, scaled ? k_scale[s0 + s] : 1.0f, x.k + s * wide);
      widen_row(v + (s0 + s) * a.v_strides[2], D, scaled ? v_scale[s0 + s] : 1.0f, x.v + s * wide);
    }
    if constexpr (!kPairs) {
      std::memset(x.k + block * wide, 0, static_cast<size_t>((round_up(block, kKeys) - block) * wide) * sizeof(float));
    }

    for (int64_t m0 = 0; m0 < rows; m0 += kPanel) {
      const int64_t row0 = task.row0 + m0, row1 = least(row0 + kPanel, task.row1);
      const Range of_first = visible(a, keys, row0 / G), of_last = visible(a, keys, (row1 - 1) / G);
      const int64_t begin = most(of_first.begin - s0, 0), end = least(of_last.end - s0, block);
      if (begin >= end) continue;
      for (int64_t s = begin / kKeys * kKeys; s < end; s += kKeys) {
#if FASTLLM_ISA_LEVEL >= 4
        if constexpr (kPairs) {
          score_tile(words(x.k) + s * (D / 2), D / 2, words(x.q) + m0 * (D / 2), D, x.p + s * kPanel);
          continue;
        }
#endif
        score_tile(x.k + s * wide, wide, x.q + m0 * D, D, x.p + s * kPanel);
      }
      scale_scores(a, x.p + begin * kPanel, (end - begin) * kPanel);
      const bool all_see_all = of_last.begin <= s0 + begin && of_first.end >= s0 + end;
      for (int64_t row = row0; row < row1 && !(all_see_all && a.mask == nullptr); ++row) {
        const Range r = visible(a, keys, row / G);
        const int64_t from = least(most(r.begin - s0, begin), end), to = most(least(r.end - s0, end), from);
        float* column = x.p + row - row0;
        for (int64_t s = begin; s < from; ++s) column[s * kPanel] = -kInfinity;
        for (int64_t s = to; s < end; ++s) column[s * kPanel] = -kInfinity;
        if (a.mask) {
          mask_row(a, task.b, head0 + row % G, row / G, s0 + from, to - from, x.bias);
          for (int64_t s = from; s < to; ++s) column[s * kPanel] += x.bias[s - from];
        }
      }
      float correction[kPanel];
#if FASTLLM_ISA_LEVEL >= 4
      if constexpr (kPairs) {
        softmax_pairs(x.p, begin, end, exponent, x.max + m0, x.sum + m0, correction);
        output_pairs(words(x.p), words(x.v), wide, begin, end, correction, x.acc + m0 * wide);
        continue;
      }
#endif
      softmax_panel(x.p, begin, end, exponent, x.max + m0, x.sum + m0, correction);
      output_panel(x.p + begin * kPanel, x.v + begin * wide, wide, end - begin, correction, x.acc + m0 * wide);
    }
  }

  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = task.row0 + m;
#define FASTLLM_BODY(T) \
  store_row(x.acc + m * wide, x.sum[m], D, row_of<decltype(T)>(a.o, a.o_strides, task.b, head0 + row % G, row / G))
    FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  }
}

}  // namespace

void attention_prefill(const AttentionArgs& a) {
  const int64_t heads = a.B * a.Hk, rows = heads > 0 ? a.T * (a.H / a.Hk) : 0;
  if (rows == 0) return;
  // Rows of a task: kMaxPanels panels, fewer where that would leave threads without work.
  int64_t length = kMaxPanels * kPanel;
  while (length > kPanel && heads * ((rows + length - 1) / length) < 4 * a.threads) length -= kPanel;
  const int64_t runs = (rows + length - 1) / length, tasks = runs * heads;

  const int64_t workers = least(a.threads < 1 ? 1 : a.threads, tasks), floats = scratch_floats(a.D);
  float* memory = workspace(workers * floats);
  // In the order of tokens, so that a thread has those that it projected and rotated; but the last of them, which see
  // the most keys of a causal call, first, so that no thread is left with a long task at the end.
  Shares shares(tasks, static_cast<int>(workers));
  // One chunk a worker, each with its own scratch.
  parallel_for(workers, 1, static_cast<int>(workers), [&](int64_t worker, int64_t end) {
    for (; worker < end; ++worker) {
      const Scratch scratch = carve(memory + worker * floats, a.D);
      int64_t i, after;
      while (shares.take(static_cast<int>(worker), 1, 1, &i, &after)) {
        if (a.causal) i = shares.mirrored(i);
        const int64_t row0 = i / heads * length;
        const Task task = {i % heads / a.Hk, i % a.Hk, row0, least(row0 + length, rows)};
#if FASTLLM_ISA_LEVEL >= 4
        if (a.bf16_dots && a.dtype == DType::bf16 && a.kv_dtype == DType::bf16 && a.D % 2 == 0) {
          attend<bf16, true>(a, task, scratch);
          continue;
        }
#endif
#define FASTLLM_BODY(T) attend<decltype(T), false>(a, task, scratch)
        FASTLLM_FOR_CACHE(a.kv_dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
      }
    }
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
