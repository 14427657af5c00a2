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

// p[i][m] = sum over d of k[i][d] q[d][m] for kKeys keys and a panel of rows. Runs of kRun products are summed by
// themselves and then added up: the error of a single chain grows with D.
FASTLLM_INLINE void score_tile(const float* k, int64_t wide, const float* q, int64_t D, float* p) {
  for (int64_t d0 = 0; d0 < D; d0 += kRun) {
    vf acc[kKeys][kPanelVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = zero();
    }
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
    if (d0 > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < kPanelVecs; ++j) acc[i][j] = acc[i][j] + load(p + i * kPanel + j * kWidth);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kPanelVecs; ++j) store(p + i * kPanel + j * kWidth, acc[i][j]);
    }
  }
}

// out[i][d] = out[i][d] * correction[i] + sum over `keys` of p[s][i] v[s][d], for kOutRows rows and Vecs vectors of d.
template <int Vecs>
FASTLLM_INLINE void output_tile(const float* p, const float* v, int64_t wide, int64_t keys, const float* correction,
                                float* out) {
  vf acc[kOutRows][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < kOutRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; ++j) acc[i][j] = zero();
  }
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

struct Task {
  int64_t b, kv_head, row0, row1;  // row = token * G + query head of the group
};

template <typename T>
FASTLLM_INLINE T* row_of(const void* tensor, const int64_t (&strides)[3], int64_t b, int64_t head, int64_t token) {
  return static_cast<T*>(const_cast<void*>(tensor)) + b * strides[0] + head * strides[1] + token * strides[2];
}

template <typename Cache>
void attend(const AttentionArgs& a, const Task& task, const Scratch& x) {
  const int64_t D = a.D, wide = round_up(D, kWidth), G = a.H / a.Hk, head0 = task.kv_head * G;
  const int64_t rows = task.row1 - task.row0, padded = round_up(rows, kPanel);
  const int64_t keys = num_keys(a, task.b);

  // Q, widened and transposed into panels; rows past the last are zero.
  const float factor = q_factor(a), exponent = weight_exponent(a);
  std::memset(x.q, 0, static_cast<size_t>(padded * D) * sizeof(float));
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = task.row0 + m;
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
    for (int64_t s = 0; s < block; ++s) {
      widen_row(k + (s0 + s) * a.k_strides[2], D, scaled ? k_scale[s0 + s] : 1.0f, x.k + s * wide);
      widen_row(v + (s0 + s) * a.v_strides[2], D, scaled ? v_scale[s0 + s] : 1.0f, x.v + s * wide);
    }
    std::memset(x.k + block * wide, 0, static_cast<size_t>((round_up(block, kKeys) - block) * wide) * sizeof(float));

    for (int64_t m0 = 0; m0 < rows; m0 += kPanel) {
      const int64_t row0 = task.row0 + m0, row1 = least(row0 + kPanel, task.row1);
      const Range of_first = visible(a, keys, row0 / G), of_last = visible(a, keys, (row1 - 1) / G);
      const int64_t begin = most(of_first.begin - s0, 0), end = least(of_last.end - s0, block);
      if (begin >= end) continue;
      for (int64_t s = begin / kKeys * kKeys; s < end; s += kKeys)
        score_tile(x.k + s * wide, wide, x.q + m0 * D, D, x.p + s * kPanel);
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
  // In the order of tokens, so that a thread has those that it projected and rotated; but the last of them, which see the
  // most keys of a causal call, first, so that no thread is left with a long task at the end.
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
#define FASTLLM_BODY(T) attend<decltype(T)>(a, task, scratch)
        FASTLLM_FOR_CACHE(a.kv_dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
      }
    }
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
