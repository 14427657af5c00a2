// y = act(gate) * up, with silu(g) = g sigmoid(g) and gelu_tanh(g) = g sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)).
//
// Bytes an element: two read, one written. Flops: about 25 (an exponential, a division); about 15 in 16 bits, where
// both need fewer bits. In fp32 memory limits it, and a result that the caches would not keep goes past them; in 16
// bits arithmetic does, so several vectors are in flight at once to hide the latency of the polynomial.
//
// y may be rounded to int8 on the way (quantize.h): some columns of it at a time stand in L1, rounded to dtype first.
#include "gated_activation.h"

#include "parallel.h"
#include "quantize.h"
#include "simd/simd.h"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

struct Silu {};
struct GeluTanh {};

FASTLLM_INLINE vf exponent(Silu, vf g) { return g; }
// 2 sqrt(2/pi) g (1 + 0.044715 g^2)
FASTLLM_INLINE vf exponent(GeluTanh, vf g) {
  return g * fmadd(g * g, set1(0.07135481282553f), set1(1.5957691216057308f));
}

// T is what the result is rounded to.
template <typename Act, typename T>
FASTLLM_INLINE vf gated(vf gate, vf up) {
  const vf x = exponent(Act{}, gate);
  if constexpr (sizeof(T) == 4) {
    return gate * sigmoid(x) * up;
  } else {
    return gate * sigmoid_coarse(T{}, x) * up;
  }
}

template <typename Act, typename T, bool kPastCaches = false>
FASTLLM_INLINE void gated_row(const T* gate, const T* up, T* y, int64_t I) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= I; i += 4 * kWidth) {
    pair r[2];
    for (int j = 0; j < 2; ++j) {
      const pair g = load_pair(gate + i + 2 * j * kWidth), u = load_pair(up + i + 2 * j * kWidth);
      r[j] = {gated<Act, T>(g.first, u.first), gated<Act, T>(g.second, u.second)};
    }
    for (int j = 0; j < 2; ++j) {
      T* at = y + i + 2 * j * kWidth;
      kPastCaches ? store_past_caches(at, r[j]) : store_clean(at, r[j]);
    }
  }
  for (; i + kWidth <= I; i += kWidth) store(y + i, gated<Act, T>(load(gate + i), load(up + i)));
  if (i < I) store_n(y + i, gated<Act, T>(load_n(gate + i, I - i), load_n(up + i, I - i)), I - i);
}

template <typename Act, typename T>
FASTLLM_INLINE void gated_row_int8(const T* gate, const T* up, int8_t* y, float* groups, int64_t I,
                                   int64_t group_size) {
  constexpr int64_t kColumns = 1024;  // whole groups
  T values[kColumns];
  for (int64_t i = 0; i < I; i += kColumns) {
    const int64_t n = I - i < kColumns ? I - i : kColumns;
    gated_row<Act>(gate + i, up + i, values, n);
    quantize_groups(values, n, group_size, y + i, groups + 2 * (i / group_size));
  }
}

// A row is cut into pieces of this many lanes, so that the one wide row of a decode step can feed several threads.
constexpr int64_t kPiece = 8192;

template <typename Act, typename T>
void gated_pieces(const GatedActivationArgs& a, int64_t pieces_a_row, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / pieces_a_row, i = (piece - row * pieces_a_row) * kPiece;
    const T* gate = static_cast<const T*>(a.gate) + row_offset(a.gate_rows, row) + i;
    const T* up = static_cast<const T*>(a.up) + row_offset(a.up_rows, row) + i;
    const int64_t at = row * a.I + i, n = a.I - i < kPiece ? a.I - i : kPiece;
    if (a.groups) {
      float* groups = a.groups + 2 * (row * ((a.I + a.group_size - 1) / a.group_size) + i / a.group_size);
      gated_row_int8<Act>(gate, up, static_cast<int8_t*>(a.y) + at, groups, n, a.group_size);
    } else if (a.past_caches) {
      gated_row<Act, T, true>(gate, up, static_cast<T*>(a.y) + at, n);
    } else {
      gated_row<Act>(gate, up, static_cast<T*>(a.y) + at, n);
    }
  }
  if (a.past_caches) end_past_caches();
}

}  // namespace

void gated_activation(const GatedActivationArgs& a) {
  const int64_t pieces_a_row = (a.I + kPiece - 1) / kPiece;
  const int64_t pieces_a_chunk = 1 + kPiece / (a.I + 1);  // a chunk is worth waking a thread for: about 5 us
  parallel_for(a.rows * pieces_a_row, pieces_a_chunk, a.threads, [&](int64_t begin, int64_t end) {
#define FASTLLM_BODY(T)                                                                           \
  a.activation == Activation::silu ? gated_pieces<Silu, decltype(T)>(a, pieces_a_row, begin, end) \
                                   : gated_pieces<GeluTanh, decltype(T)>(a, pieces_a_row, begin, end)
    FASTLLM_FOR_FLOAT(a.dtype, FASTLLM_BODY)
#undef FASTLLM_BODY
  });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
