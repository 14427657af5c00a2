// Attention for few queries: K and V are read once for all query heads that share them, and never copied.
//
// The keys of one key/value head are cut into splits of kSplit keys, a task each, so that one sequence keeps many
// threads busy; the cut depends on positions alone. A task holds R = T * (H / Hk) rows, token-major:
//
//   scores  p[r][s] = q[r] . K[s]     d runs along the vector; up to kRows rows times 4 keys share their loads
//   weights p[r][s] = 2^((p - max) c) s runs along the vector
//   acc[r] = sum over s of p[r][s] V[s]
//
// and leaves maximum, sum and acc of each row. The last task of a head to finish adds the splits up, in their order:
// bits do not depend on threads.
//
// An int8 cache enters the products as it is: a key's scale multiplies its scores, a value's scale its weights.
//
// Where q, k and v are bf16 and the processor is fast at vdpbf16ps, scores take two steps of d at once, of which no bit
// is lost, and acc has the columns of V in the order of pairs (simd.h), which widens them sooner.
//
// Bytes: k and v once, 2 S D elements a key/value head; flops: 4 D R a key. At R = 4 in bf16 that is 4 flops a byte, so
// memory is the limit; from about R = 16 on, the FMAs are, and the prefill kernel has the better tiles.
#include "attention_decode.h"

#include "attention_common.h"
#include "parallel.h"
#include "workspace.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Rows at a time, and accumulators: rows times keys, or rows times vectors of V, 4 of either where they fit and else 2.
// With the operands they fill 16 (32) registers.
#if FASTLLM_ISA_LEVEL >= 2
constexpr int kRows = 6, kChains = 24;
#else
constexpr int kRows = 4, kChains = 12;
#endif
constexpr int64_t kSplit = 128;                 // 32 KiB of K and V at D = 64 in bf16
constexpr int64_t kWorkerFlops = 1 << 18;       // some microseconds
constexpr int64_t kAheadBytes = 8192;           // of keys, asked for before they are wanted
constexpr int kAsked = 4;                       // rows of values, asked for together
constexpr int64_t kLineFloats = 16;             // of a cache line
constexpr int64_t kRun = kWidth == 1 ? 8 : 32;  // one lane has no other lanes to share a sum with
constexpr int64_t kScoreRun = kWidth == 1 ? 8 : 16;

// Lanes of a key that one step takes, in the units of q: floats, or bf16 where dot products take it as it is.
template <typename T>
FASTLLM_INLINE vf key_lanes(const float*, const T* k) {
  return load(k);
}
FASTLLM_INLINE vf add_product(vf sum, vf key, const float* q) { return fmadd(key, load(q), sum); }
#if FASTLLM_ISA_LEVEL >= 4
FASTLLM_INLINE words key_lanes(const bf16*, const bf16* k) { return load_words(k); }
FASTLLM_INLINE vf add_product(vf sum, words key, const bf16* q) { return dot_words(sum, key, load_words(q)); }
#endif

// p[r][0 .. Keys) = q[r] . k[.] ; rows of q are padded with zeros to whole vectors. Runs of kScoreRun steps are summed
// by themselves and then added up: the error of a single chain grows with its length.
template <int Rows, int Keys, typename Q, typename T>
FASTLLM_INLINE void score_tile(const Q* q, int64_t wide, const T* k, int64_t k_stride, int64_t D, float* p) {
  constexpr int kStep = kWidth * 4 / static_cast<int>(sizeof(Q));
  // As many as are reduced together.
  constexpr int kSums = Rows * Keys > 8 && Rows * Keys < 16 && kWidth >= 16 ? 16 : (Rows * Keys + 3) / 4 * 4;
  constexpr int kBySixteen = kSums / 16 * 16;
  for (int64_t d = 0; d < D;) {
    vf acc[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) acc[i] = zero();
    const int64_t first = d, whole = least(d + kScoreRun * kStep, D / kStep * kStep);
    for (; d < whole; d += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < Keys; ++j) {
        const auto key = key_lanes(q, k + j * k_stride + d);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r * Keys + j] = add_product(acc[r * Keys + j], key, q + r * wide + d);
      }
    }
    if constexpr (sizeof(Q) == 4) {
      if (D - d < kStep && d < D) {
#pragma GCC unroll 4
        for (int j = 0; j < Keys; ++j) {
          const vf key = load_n(k + j * k_stride + d, D - d);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) acc[r * Keys + j] = add_product(acc[r * Keys + j], key, q + r * wide + d);
        }
        d = D;
      }
    }
    if (Rows == 4 && Keys == 4 && first == 0) {  // their sixteen sums need no adding up
      reduce_add16(acc, p, kSplit);
      continue;
    }
    float sums[kSums];
#pragma GCC unroll 2
    for (int i = 0; i < kBySixteen; i += 16) reduce_add16(acc + i, sums + i, 4);
#pragma GCC unroll 8
    for (int i = kBySixteen; i < kSums; i += 4) reduce_add4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums + i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < Keys; ++j)
        p[r * kSplit + j] = first == 0 ? sums[r * Keys + j] : p[r * kSplit + j] + sums[r * Keys + j];
    }
  }
}

// What a split reads: its keys, then its values; then the next split's keys, which stand behind its own. Rows are asked
// for kAheadBytes before they are wanted, each once, so that memory is as busy in one half of the work as in the other.
template <typename T>
struct Streamed {
  const T *first, *then;  // `count` rows, and those that follow
  int64_t stride, then_stride, count, D, ahead;
};
template <int Count, typename T>
FASTLLM_INLINE void ask_ahead(const Streamed<T>& rows, int64_t row) {
  const int64_t at = row + rows.ahead;
  const bool then = at >= rows.count;
  const int64_t stride = then ? rows.then_stride : rows.stride;
  const T* from = then ? rows.then + (at - rows.count) * stride : rows.first + at * stride;
  for (int64_t d = 0; d < rows.D; d += 64 / static_cast<int64_t>(sizeof(T))) {
#pragma GCC unroll 4
    for (int j = 0; j < Count; ++j) __builtin_prefetch(from + j * stride + d);
  }
}

template <int Rows, typename Q, typename T>
void score_rows(const Q* q, int64_t wide, const Streamed<T>& k, bool ask, float* p) {
  int64_t s = 0;
  constexpr int kKeys = Rows * 4 <= kChains ? 4 : 2;
  for (; s + kKeys <= k.count; s += kKeys) {
    if (ask) ask_ahead<kKeys>(k, s);
    score_tile<Rows, kKeys>(q, wide, k.first + s * k.stride, k.stride, k.D, p + s);
  }
  for (; s < k.count; ++s) score_tile<Rows, 1>(q, wide, k.first + s * k.stride, k.stride, k.D, p + s);
}

// Vecs vectors of a row of V, in its order or in that of pairs.
template <int Vecs, bool Paired, typename T>
FASTLLM_INLINE void load_values(const T* at, vf (&values)[Vecs]) {
  if constexpr (Paired) {
    for (int j = 0; j < Vecs; j += 2) {
      const pair both = load_pair(at + j * kWidth);
      values[j] = both.first;
      values[j + 1] = both.second;
    }
  } else {
    for (int j = 0; j < Vecs; ++j) values[j] = load(at + j * kWidth);
  }
}

// out[r][0 .. Vecs) = sum over s of p[r][s] v[s]. Whole: all lanes count; else only the first `lanes`, of one vector.
// Runs of kRun products are summed by themselves and then added up: the error of a single chain grows with the keys.
template <int Rows, int Vecs, bool Whole, bool Paired, typename T>
FASTLLM_INLINE void output_tile(const float* p, const Streamed<T>& v, int64_t d, int64_t lanes, bool ask, float* out,
                                int64_t wide) {
  for (int64_t s0 = 0; s0 < v.count; s0 += kRun) {
    vf acc[Rows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[r][j] = zero();
    }
    const int64_t end = least(s0 + kRun, v.count);
    for (int64_t s = s0; s < end; ++s) {
      if (ask && s % kAsked == 0) ask_ahead<kAsked>(v, s);
      vf weight[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) weight[r] = set1(p[r * kSplit + s]);
      vf values[Vecs];
      const T* at = v.first + s * v.stride + d;
      if constexpr (Whole) {
        load_values<Vecs, Paired>(at, values);
      } else {
        values[0] = load_n(at, lanes);
      }
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r][j] = fmadd(weight[r], values[j], acc[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) {
        float* at = out + r * wide + j * kWidth;
        store(at, s0 == 0 ? acc[r][j] : load(at) + acc[r][j]);
      }
    }
  }
}

template <int Rows, bool Paired, typename T>
void output_rows(const float* p, const Streamed<T>& v, bool ask, float* out, int64_t wide) {
  int64_t d = 0;
  constexpr int kVecs = Rows * 4 <= kChains ? 4 : 2;
  for (; d + kVecs * kWidth <= v.D; d += kVecs * kWidth, ask = false)
    output_tile<Rows, kVecs, true, Paired>(p, v, d, kWidth, ask, out + d, wide);
  if constexpr (Paired) {
    if (d < v.D) output_tile<Rows, 2, true, true>(p, v, d, kWidth, ask, out + d, wide);
    return;
  }
  for (; d + kWidth <= v.D; d += kWidth, ask = false)
    output_tile<Rows, 1, true, false>(p, v, d, kWidth, ask, out + d, wide);
  if (d < v.D) output_tile<Rows, 1, false, false>(p, v, d, v.D - d, ask, out + d, wide);
}

// Calls body<Rows>(first row) for all rows, kRows at a time.
#if FASTLLM_ISA_LEVEL >= 2
#define FASTLLM_BY_ROWS(rows, body)             \
  for (int64_t r = 0; r < (rows); r += kRows) { \
    switch (least(kRows, (rows) - r)) {         \
      case 1:                                   \
        body(1);                                \
        break;                                  \
      case 2:                                   \
        body(2);                                \
        break;                                  \
      case 3:                                   \
        body(3);                                \
        break;                                  \
      case 4:                                   \
        body(4);                                \
        break;                                  \
      case 5:                                   \
        body(5);                                \
        break;                                  \
      default:                                  \
        body(6);                                \
        break;                                  \
    }                                           \
  }
#else
#define FASTLLM_BY_ROWS(rows, body)             \
  for (int64_t r = 0; r < (rows); r += kRows) { \
    switch (least(kRows, (rows) - r)) {         \
      case 1:                                   \
        body(1);                                \
        break;                                  \
      case 2:                                   \
        body(2);                                \
        break;                                  \
      case 3:                                   \
        body(3);                                \
        break;                                  \
      default:                                  \
        body(4);                                \
        break;                                  \
    }                                           \
  }
#endif

// One row's n scores become weights, zeros up to whole vectors; returns their sum, and the maximum through row_max.
FASTLLM_INLINE float softmax_row(float* p, int64_t n, float c, float* row_max) {
  for (int64_t s = n; s % kWidth; ++s) p[s] = -kInfinity;
  vf high = set1(-kInfinity);
  for (int64_t s = 0; s < n; s += kWidth) high = max(high, load(p + s));
  const float top = reduce_max(high);
  // Where no key is visible the maximum is minus infinity, and subtracting it would give NaN.
  const vf shift = set1(top > kLowest ? top : kLowest), exponent = set1(c);
  vf sum = zero();
  for (int64_t s = 0; s < n; s += kWidth) {
    const vf weight = exp2((load(p + s) - shift) * exponent);
    store(p + s, weight);
    sum = sum + weight;
  }
  *row_max = top;
  return reduce_add(sum);
}

// What the tasks leave for each of their rows: maximum, sum, and acc of `wide` floats.
struct Partials {
  float* memory;
  int64_t rows, wide;

  static int64_t floats(int64_t rows, int64_t wide) { return rows * (wide + 2); }
  float* max(int64_t task) const { return memory + task * floats(rows, wide); }
  float* sum(int64_t task) const { return max(task) + rows; }
  float* acc(int64_t task) const { return sum(task) + rows; }
};

// All splits of one sequence and one key/value head.
struct Head {
  int64_t b, kv_head, keys, begin, end;  // its queries see no key outside of [begin, end)
};

// A row of q as the scores want it.
FASTLLM_INLINE void query_row(const AttentionArgs& a, int64_t at, float* q) {
  const float factor = q_factor(a);
#define FASTLLM_BODY(T) widen_row(static_cast<const decltype(T)*>(a.q) + at, a.D, factor, q)
  FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
}
FASTLLM_INLINE void query_row(const AttentionArgs& a, int64_t at, bf16* q) {
  const bf16* x = static_cast<const bf16*>(a.q) + at;
  const uint16_t sign = q_factor(a) < 0 ? 0x8000 : 0;
  for (int64_t d = 0; d < a.D; ++d) q[d].bits = static_cast<uint16_t>(x[d].bits ^ sign);
}

// Fills the partials of the keys [s0, s1); q is [rows][wide], of floats or, for dot products, bf16; p is
// [rows][kSplit].
template <typename Cache, typename Q>
void attend(const AttentionArgs& a, const Head& head, int64_t s0, int64_t s1, Q* q, float* p, const Partials& out,
            int64_t task) {
  constexpr bool kPaired = sizeof(Q) == 2;
  const int64_t D = a.D, wide = out.wide, rows = out.rows, G = a.H / a.Hk, head0 = head.kv_head * G, n = s1 - s0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = head.b * a.q_strides[0] + (head0 + r % G) * a.q_strides[1] + r / G * a.q_strides[2];
    query_row(a, at, q + r * wide);
  }
  const Cache* k =
      static_cast<const Cache*>(a.k) + head.b * a.k_strides[0] + head.kv_head * a.k_strides[1] + s0 * a.k_strides[2];
  const Cache* v =
      static_cast<const Cache*>(a.v) + head.b * a.v_strides[0] + head.kv_head * a.v_strides[1] + s0 * a.v_strides[2];
  const int64_t ahead = kAheadBytes / (D * static_cast<int64_t>(sizeof(Cache)));
  const int64_t k_stride = a.k_strides[2], v_stride = a.v_strides[2];
  const Streamed<Cache> keys = {k, v, k_stride, v_stride, n, D, ahead};
  const Streamed<Cache> values = {v, k + n * k_stride, v_stride, k_stride, n, D, ahead};
#define FASTLLM_BODY(Rows) score_rows<Rows>(q + r * wide, wide, keys, r == 0, p + r * kSplit)
  FASTLLM_BY_ROWS(rows, FASTLLM_BODY)
#undef FASTLLM_BODY

  for (int64_t r = 0; r < rows; ++r) {
    float* row = p + r * kSplit;
    for (int64_t s = n; s % kWidth; ++s) row[s] = 0.0f;
    if (a.k_scale) multiply_row(row, scales_of(a.k_scale, a.k_scale_strides, head.b, head.kv_head) + s0, n);
    scale_scores(a, row, round_up(n, kWidth));
    const Range seen = visible(a, head.keys, r / G);
    const int64_t from = least(most(seen.begin - s0, 0), n), to = most(least(seen.end - s0, n), from);
    for (int64_t s = 0; s < from; ++s) row[s] = -kInfinity;
    for (int64_t s = to; s < n; ++s) row[s] = -kInfinity;
    if (a.mask) {
      float bias[kSplit];
      mask_row(a, head.b, head0 + r % G, r / G, s0 + from, to - from, bias);
      for (int64_t s = from; s < to; ++s) row[s] += bias[s - from];
    }
    out.sum(task)[r] = softmax_row(row, n, weight_exponent(a), out.max(task) + r);
    if (a.v_scale) multiply_row(row, scales_of(a.v_scale, a.v_scale_strides, head.b, head.kv_head) + s0, n);
  }

#define FASTLLM_BODY(Rows) output_rows<Rows, kPaired>(p + r * kSplit, values, r == 0, out.acc(task) + r * wide, wide)
  FASTLLM_BY_ROWS(rows, FASTLLM_BODY)
#undef FASTLLM_BODY
}

// Adds up the partials of tasks [begin, end) of one head, in order; acc is a row of scratch.
template <typename T>
void combine(const AttentionArgs& a, const Head& head, const Partials& in, int64_t begin, int64_t end, bool paired,
             float* acc) {
  const int64_t G = a.H / a.Hk, head0 = head.kv_head * G;
  const float c = weight_exponent(a);
  for (int64_t r = 0; r < in.rows; ++r) {
    // A sink is a key of value 0.
    const float sink = a.sinks ? a.sinks[head0 + r % G] : -kInfinity;
    float top = sink;
    for (int64_t task = begin; task < end; ++task) top = in.max(task)[r] > top ? in.max(task)[r] : top;
    const float shift = top > kLowest ? top : kLowest;
    float scale[kWidth];
    store(scale, exp2(set1((sink - shift) * c)));
    float sum = scale[0];
    for (int64_t d = 0; d < in.wide; d += kWidth) store(acc + d, zero());
    for (int64_t task = begin; task < end; ++task) {
      store(scale, exp2(set1((in.max(task)[r] - shift) * c)));
      sum += in.sum(task)[r] * scale[0];
      const float* part = in.acc(task) + r * in.wide;
      for (int64_t d = 0; d < in.wide; d += kWidth)
        store(acc + d, fmadd(load(part + d), set1(scale[0]), load(acc + d)));
    }
    T* o = static_cast<T*>(a.o) + head.b * a.o_strides[0] + (head0 + r % G) * a.o_strides[1] + r / G * a.o_strides[2];
    paired ? store_paired_row(acc, sum, a.D, o) : store_row(acc, sum, a.D, o);
  }
}

// Whether q goes into dot products as it is.
bool by_dots(const AttentionArgs& a) {
#if FASTLLM_ISA_LEVEL >= 4
  return a.bf16_dots && a.dtype == DType::bf16 && a.kv_dtype == DType::bf16 && a.D % (2 * kWidth) == 0;
#else
  (void)a;
  return false;
#endif
}

}  // namespace

void attention_decode(const AttentionArgs& a) {
  const int64_t heads = a.B * a.Hk, rows = heads > 0 ? a.T * (a.H / a.Hk) : 0, wide = round_up(a.D, kWidth);
  if (rows == 0) return;
  const int64_t splits = most(1, (a.S + kSplit - 1) / kSplit), tasks = heads * splits;
  int64_t keys = 0;
  for (int64_t b = 0; b < a.B; ++b) keys += num_keys(a, b);
  // No more than have kWorkerFlops each: where there is less to do, waking a thread takes longer.
  const int64_t wanted = least(a.threads, 4 * a.D * rows * a.Hk * keys / kWorkerFlops);
  const int64_t workers = least(most(wanted, 1), tasks);
  // Scratch: q, p and a row for each worker; the partials; for each head how many of its tasks are done.
  const int64_t q_floats = rows * wide, scratch = round_up(q_floats + rows * kSplit + wide, kLineFloats);
  const int64_t partial_floats = round_up(tasks * Partials::floats(rows, wide), kLineFloats);
  float* memory = workspace(workers * scratch + partial_floats + heads * kLineFloats);
  const Partials partials = {memory + workers * scratch, rows, wide};
  const bool dots = by_dots(a);
  float* done = memory + workers * scratch + partial_floats;  // a line for each head: threads share none
  std::memset(done, 0, static_cast<size_t>(heads * kLineFloats) * sizeof(float));
  static_assert(sizeof(int) == sizeof(float), "counters lie among floats");

  // Neighbouring tasks go to one worker: what it asks for ahead of one is the next one's beginning.
  Shares shares(tasks, static_cast<int>(workers));
  // One chunk a worker, each with its own scratch.
  parallel_for(workers, 1, static_cast<int>(workers), [&](int64_t worker, int64_t last_worker) {
    for (; worker < last_worker; ++worker) {
      float *q = memory + worker * scratch, *p = q + q_floats, *row = p + rows * kSplit;
      int64_t task, after;
      while (shares.take(static_cast<int>(worker), 1, 1, &task, &after)) {
        const int64_t index = task / splits, b = index / a.Hk, keys = num_keys(a, b);
        const Head head = {b, index % a.Hk, keys, visible(a, keys, 0).begin, visible(a, keys, a.T - 1).end};
        const int64_t s0 = most(head.begin, task % splits * kSplit);
        const int64_t s1 = least(head.end, (task % splits + 1) * kSplit);
#define FASTLLM_BODY(T) attend<decltype(T)>(a, head, s0, s1, q, p, partials, task)
        if (s0 < s1 && dots) {
#if FASTLLM_ISA_LEVEL >= 4
          attend<bf16>(a, head, s0, s1, reinterpret_cast<bf16*>(q), p, partials, task);
#endif
        } else if (s0 < s1) {
          FASTLLM_FOR_CACHE(a.kv_dtype, FASTLLM_BODY)
        }
#undef FASTLLM_BODY
        if (__atomic_add_fetch(reinterpret_cast<int*>(done + index * kLineFloats), 1, __ATOMIC_ACQ_REL) != splits)
          continue;
        // Tasks of this head that had keys.
        const int64_t some = head.begin < head.end;
        const int64_t first = index * splits + (some ? head.begin / kSplit : 0);
        const int64_t end = some ? index * splits + (head.end - 1) / kSplit + 1 : first;
#define FASTLLM_BODY(T) combine<decltype(T)>(a, head, partials, first, end, dots, row)
        FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
      }
    }
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
