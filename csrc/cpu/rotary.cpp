// Rotary position embedding: each pair (a, b) of lanes turns by its token's angle,
//
//   a' = a cos_a - b sin_a,   b' = b cos_b + a sin_b
//
// where the pair is lanes (i, i + R/2), or (2i, 2i + 1) when interleaved, and cos and sin hold a value for each lane.
// With caches, rotated k and untouched v go to their slots in the same pass; in an int8 cache as
//
//   scale = max|x| / 127, q = round_half_even(x (127 / max|x|)) over the D lanes of a head, from fp32, rounded once
//
// Bytes a token: (H + Hk) D read and written, (H + 2 Hk) D with caches, plus 2 R of cos and sin, which stay in L1 over
// the heads. Flops: 3 a lane, far below what memory allows: memory limits it, from L2 or beyond.
#include "rotary.h"

#include <type_traits>

#include "../rows.h"
#include "parallel.h"
#include "quantize.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <typename X, typename Y>
FASTLLM_INLINE void copy_lanes(const X* x, Y* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(x + i));
  if (i < n) store_n(y + i, load_n(x + i, n - i), n - i);
}
// Of one type: the very bits, signalling NaNs too.
template <typename X>
FASTLLM_INLINE void copy_lanes(const X* x, X* y, int64_t n) {
  std::memcpy(y, x, static_cast<size_t>(n) * sizeof(X));
}

// Of one token N heads, so many elements apart: cos and sin are loaded and widened once for them.
template <int N, typename X, typename C, typename Y>
FASTLLM_INLINE void rotate_halves(const X* x, int64_t x_apart, Y* y, int64_t y_apart, const C* cos, const C* sin,
                                  int64_t half) {
  int64_t i = 0;
  if constexpr (std::is_same_v<X, C> && std::is_same_v<X, Y>) {  // in the order of pairs, whatever it is
    for (; i + 2 * kWidth <= half; i += 2 * kWidth) {
      const pair cos_a = load_pair(cos + i), sin_a = load_pair(sin + i);
      const pair cos_b = load_pair(cos + half + i), sin_b = load_pair(sin + half + i);
      for (int h = 0; h < N; ++h) {
        const X* from = x + h * x_apart + i;
        Y* to = y + h * y_apart + i;
        const pair a = load_pair(from), b = load_pair(from + half);
        store_clean(to, pair{fnmadd(b.first, sin_a.first, a.first * cos_a.first),
                             fnmadd(b.second, sin_a.second, a.second * cos_a.second)});
        store_clean(to + half, pair{fmadd(a.first, sin_b.first, b.first * cos_b.first),
                                    fmadd(a.second, sin_b.second, b.second * cos_b.second)});
      }
    }
  }
  for (; i + kWidth <= half; i += kWidth) {
    const vf cos_a = load(cos + i), sin_a = load(sin + i), cos_b = load(cos + half + i), sin_b = load(sin + half + i);
    for (int h = 0; h < N; ++h) {
      const X* from = x + h * x_apart + i;
      Y* to = y + h * y_apart + i;
      const vf a = load(from), b = load(from + half);
      store(to, fnmadd(b, sin_a, a * cos_a));
      store(to + half, fmadd(a, sin_b, b * cos_b));
    }
  }
  if (i < half) {
    const int64_t n = half - i;
    const vf cos_a = load_n(cos + i, n), sin_a = load_n(sin + i, n);
    const vf cos_b = load_n(cos + half + i, n), sin_b = load_n(sin + half + i, n);
    for (int h = 0; h < N; ++h) {
      const X* from = x + h * x_apart + i;
      Y* to = y + h * y_apart + i;
      const vf a = load_n(from, n), b = load_n(from + half, n);
      store_n(to, fnmadd(b, sin_a, a * cos_a), n);
      store_n(to + half, fmadd(a, sin_b, b * cos_b), n);
    }
  }
}

template <typename X, typename C, typename Y>
FASTLLM_INLINE void rotate_pairs(const X* x, Y* y, const C* cos, const C* sin, int64_t R) {
#if FASTLLM_ISA_LEVEL == 0
  for (int64_t i = 0; i < R; i += 2) {
    const vf a = load(x + i), b = load(x + i + 1);
    store(y + i, fnmadd(b, load(sin + i), a * load(cos + i)));
    store(y + i + 1, fmadd(a, load(sin + i + 1), b * load(cos + i + 1)));
  }
#else
  int64_t i = 0;
  for (; i + kWidth <= R; i += kWidth) {
    const vf a = load(x + i);
    store(y + i, fmaddsub(a, load(cos + i), swap_pairs(a) * load(sin + i)));
  }
  if (i < R) {
    const int64_t n = R - i;
    const vf a = load_n(x + i, n);
    store_n(y + i, fmaddsub(a, load_n(cos + i, n), swap_pairs(a) * load_n(sin + i, n)), n);
  }
#endif
}

FASTLLM_INLINE int64_t index_at(const int64_t* indices, const int64_t* strides, int64_t b, int64_t t) {
  return indices ? indices[b * strides[0] + t * strides[1]] : t;
}

// x, N heads of a token, turned by the token's angle or as they are, goes to y.
template <int N, typename X, typename C, typename Y>
FASTLLM_INLINE void turn_rows(const RotaryArgs& a, bool rotated, const X* x, int64_t x_apart, Y* y, int64_t y_apart,
                              int64_t b, int64_t t) {
  if (!rotated) {
    for (int h = 0; h < N; ++h) copy_lanes(x + h * x_apart, y + h * y_apart, a.D);
    return;
  }
  const int64_t angle = index_at(a.positions, a.positions_strides, b, t);
  const C* cos = static_cast<const C*>(a.cos) + b * a.cos_strides[0] + angle * a.cos_strides[1];
  const C* sin = static_cast<const C*>(a.sin) + b * a.sin_strides[0] + angle * a.sin_strides[1];
  if (a.interleaved) {
    for (int h = 0; h < N; ++h) rotate_pairs(x + h * x_apart, y + h * y_apart, cos, sin, a.R);
  } else {
    rotate_halves<N>(x, x_apart, y, y_apart, cos, sin, a.R / 2);
  }
  if (a.R < a.D) {
    for (int h = 0; h < N; ++h) copy_lanes(x + h * x_apart + a.R, y + h * y_apart + a.R, a.D - a.R);
  }
}

// N heads of one token, from head h.
template <int N, typename X, typename C, typename Y>
FASTLLM_INLINE void rotary_rows(const RotaryArgs& a, const RotaryTensor& tensor, int64_t b, int64_t h, int64_t t) {
  const int64_t row = tensor.slotted ? index_at(a.slots, a.slots_strides, b, t) : t;
  const int64_t *in = tensor.in_strides, *out = tensor.out_strides;
  const X* x = static_cast<const X*>(tensor.in) + b * in[0] + h * in[1] + t * in[2];
  Y* y = static_cast<Y*>(tensor.out) + b * out[0] + h * out[1] + row * out[2];
  if constexpr (sizeof(Y) == 1) {
    static_assert(N == 1);
    float wide[kMaxInt8Row];
    turn_rows<1, X, C>(a, tensor.rotated, x, 0, wide, 0, b, t);
    const int64_t* at = tensor.scale_strides;
    tensor.scale[b * at[0] + h * at[1] + row * at[2]] = quantize_group(wide, a.D, y).scale;
  } else {
    turn_rows<N, X, C>(a, tensor.rotated, x, in[1], y, out[1], b, t);
  }
}

// Tokens [t0, t1) of N heads.
template <int N, typename X, typename C, typename Y>
FASTLLM_INLINE void rotary_heads(const RotaryArgs& a, const RotaryTensor& tensor, int64_t b, int64_t h, int64_t t0,
                                 int64_t t1) {
  for (int64_t t = t0; t < t1; ++t) rotary_rows<N, X, C, Y>(a, tensor, b, h, t);
}

// Tokens [t0, t1) of batch b.
template <typename X, typename C, typename Y>
void rotary_tokens(const RotaryArgs& args, const RotaryTensor& of, int64_t b, int64_t t0, int64_t t1) {
  // Copies, because a vector's store may change whatever has an address, for all that the compiler knows.
  const RotaryArgs a = args;
  const RotaryTensor tensor = of;
  // That share a token's cos and sin, widened: a third of the instructions otherwise. In fp32, where nothing is
  // widened, rows one after the other suit the prefetcher better.
  constexpr int kHeads = sizeof(X) == 2 && sizeof(Y) == 2 ? 4 : 1;
  // In the order in which the rows stand in memory: a token's heads, or a head's tokens.
  const int64_t run = tensor.in_strides[1] < tensor.in_strides[2] ? 1 : t1 - t0;
  for (int64_t t = t0; t < t1; t += run) {
    int64_t h = 0;
    for (; h + kHeads <= tensor.heads; h += kHeads) rotary_heads<kHeads, X, C, Y>(a, tensor, b, h, t, t + run);
    for (; h < tensor.heads; ++h) rotary_heads<1, X, C, Y>(a, tensor, b, h, t, t + run);
  }
}

template <typename X, typename C>
void rotary_tokens_by(const RotaryArgs& a, const RotaryTensor& tensor, int64_t b, int64_t t0, int64_t t1) {
  if (tensor.out_dtype == DType::i8) {
    rotary_tokens<X, C, int8_t>(a, tensor, b, t0, t1);
  } else {
    rotary_tokens<X, C, X>(a, tensor, b, t0, t1);
  }
}

// cos and sin are of X or float; the result of X, or shorter where it goes into a cache of int8 or a float one into
// halves.
template <typename X>
void rotary_tokens_of(const RotaryArgs& a, const RotaryTensor& tensor, int64_t b, int64_t t0, int64_t t1) {
  if (a.table_dtype == DType::f32) {
    rotary_tokens_by<X, float>(a, tensor, b, t0, t1);
  } else {
    rotary_tokens_by<X, X>(a, tensor, b, t0, t1);
  }
}
template <>
void rotary_tokens_of<float>(const RotaryArgs& a, const RotaryTensor& tensor, int64_t b, int64_t t0, int64_t t1) {
#define FASTLLM_BODY(T) rotary_tokens<float, float, decltype(T)>(a, tensor, b, t0, t1)
  FASTLLM_FOR_CACHE(tensor.out_dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
}

constexpr int64_t kTokens = 32;  // whose cos and sin stay in L1 over the heads

}  // namespace

void rotary(const RotaryArgs& a) {
  int64_t lanes = 1;
  for (int i = 0; i < a.num_tensors; ++i) lanes += a.tensors[i].heads * a.D;
  const int64_t tokens_a_chunk = 1 + 16384 / lanes;  // a chunk is worth waking a thread for: about 5 us
  parallel_for(a.B * a.T, tokens_a_chunk, a.threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / a.T, t0 = begin - b * a.T;
      int64_t t1 = t0 + (end - begin < kTokens ? end - begin : kTokens);
      if (t1 > a.T) t1 = a.T;
      for (int i = 0; i < a.num_tensors; ++i) {
#define FASTLLM_BODY(T) rotary_tokens_of<decltype(T)>(a, a.tensors[i], b, t0, t1)
        FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
      }
      begin += t1 - t0;
    }
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
