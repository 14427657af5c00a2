// What generation does around a step's kernels. A few PyTorch calls would compute the same, at tens of microseconds
// each: after a step's weights have gone through the caches, nothing of Python or PyTorch is left in them.
#include <cstring>

#include "bindings.h"

namespace fastllm::cpu {
namespace {

// GCC's and clang's own vectors: bindings are compiled at the baseline, for any processor.
using Lanes __attribute__((vector_size(16))) = float;

// The first of the largest of x[0 .. n), n > 0, as torch.argmax has it: a NaN counts as larger than all. Block by
// block, so that only the block of the largest is looked at again, while it is in L1.
int64_t argmax_row(const float* x, int64_t n) {
  constexpr int64_t kBlock = 4096;
  constexpr int kVectors = 4, kLanes = 4;
  float top = x[0];
  int64_t of_top = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Lanes most[kVectors], zeros[kVectors];  // what is finite leaves 0 in these, NaN and infinities leave NaN
    for (int j = 0; j < kVectors; ++j) {
      most[j] = Lanes{} + x[begin];
      zeros[j] = Lanes{};
    }
    int64_t i = begin;
    for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
      for (int j = 0; j < kVectors; ++j) {
        Lanes a;
        std::memcpy(&a, x + i + j * kLanes, sizeof a);
        most[j] = a > most[j] ? a : most[j];
        zeros[j] += a * 0.0f;
      }
    }
    float here = x[begin], zero = 0.0f;
    for (int j = 0; j < kVectors; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        here = most[j][lane] > here ? most[j][lane] : here;
        zero += zeros[j][lane];
      }
    }
    for (; i < end; ++i) {
      here = x[i] > here ? x[i] : here;
      zero += x[i] * 0.0f;
    }
    if (zero != 0.0f) {
      for (i = begin; i < end; ++i) {
        if (x[i] != x[i]) return i;
      }
    }
    if (here > top) {
      top = here;
      of_top = begin;
    }
  }
  while (x[of_top] != top) ++of_top;
  return of_top;
}

// The same of a 16-bit float, whose bits are told by what they have for infinity: signs and magnitudes, as integers,
// are in the order of the values, the two zeros alike.
template <typename Bits>
Bits ordered(Bits bits, Bits infinity) {
  const Bits magnitude = bits & 0x7fff, sign = bits >> 15;
  const Bits order = (magnitude ^ sign) - sign;
  return magnitude > infinity ? magnitude | 0x7fff : order;
}

int64_t argmax_row(const int16_t* x, int64_t n, int16_t infinity) {
  using Shorts __attribute__((vector_size(16))) = int16_t;
  constexpr int64_t kBlock = 4096;
  constexpr int kLanes = 8;
  const auto at = [&](int64_t i) { return ordered<int>(x[i], infinity); };
  int top = at(0);
  int64_t of_top = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Shorts most[2] = {Shorts{} - int16_t{0x7fff}, Shorts{} - int16_t{0x7fff}};  // the least there is
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      for (int j = 0; j < 2; ++j) {
        Shorts a;
        std::memcpy(&a, x + i + j * kLanes, sizeof a);
        a = ordered(a, Shorts{} + infinity);
        most[j] = a > most[j] ? a : most[j];
      }
    }
    int here = at(begin);
    for (int lane = 0; lane < kLanes; ++lane) {
      here = most[0][lane] > here ? most[0][lane] : here;
      here = most[1][lane] > here ? most[1][lane] : here;
    }
    for (; i < end; ++i) here = at(i) > here ? at(i) : here;
    if (here > top) {
      top = here;
      of_top = begin;
    }
  }
  while (at(of_top) != top) ++of_top;
  return of_top;
}

int64_t argmax_row(const TensorView& x, int64_t offset, int64_t n) {
  constexpr int16_t kInfinity[] = {0x7f80, 0x7c00};  // bf16, fp16
  if (x.dtype == DType::f32) return argmax_row(x.as<const float>() + offset, n);
  return argmax_row(x.as<const int16_t>() + offset, n, kInfinity[x.dtype == DType::f16]);
}

void place_tokens(const std::vector<int64_t>& tokens, const TensorView& lengths, const TensorView& last,
                  const TensorView& ids, const TensorView& positions, const TensorView& kv_lens) {
  const int64_t B = lengths.numel(), T = B > 0 ? ids.numel() / B : 0, runs = last.numel();
  for (const TensorView* t : {&lengths, &last, &ids, &positions, &kv_lens}) {
    FASTLLM_CHECK(t->dtype == DType::i64 && t->contiguous_from(0), "decode: a tensor is ", name(t->dtype),
                  ", expected contiguous int64");
  }
  FASTLLM_CHECK(ids.numel() == B * T && positions.numel() == B * T && kv_lens.numel() == B * runs,
                "decode: ids, positions and kv_lens do not belong to ", B, " sequences");
  FASTLLM_CHECK(static_cast<int64_t>(tokens.size()) == B * T, "decode: ids has ", tokens.size(), " tokens, expected ",
                B * T);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = lengths.as<const int64_t>()[b];
    for (int64_t t = 0; t < T; ++t) {
      ids.as<int64_t>()[b * T + t] = tokens[static_cast<size_t>(b * T + t)];
      positions.as<int64_t>()[b * T + t] = length + t;
    }
    for (int64_t r = 0; r < runs; ++r) kv_lens.as<int64_t>()[b * runs + r] = length + last.as<const int64_t>()[r];
  }
}

}  // namespace

void bind_generation(py::module_& m) {
  m.def(
      "place_tokens", &place_tokens,
      "(tokens, lengths (B,), last (R,), ids (B, T), positions (B, T), kv_lens (B, R)): fills the last three. "
      "Sequence b's tokens stand at lengths[b], lengths[b] + 1, ...; its run r ends after lengths[b] + last[r] keys.");
  m.def(
      "argmax",
      [](const TensorView& x) {
        FASTLLM_CHECK((x.dtype == DType::f32 || x.dtype == DType::bf16 || x.dtype == DType::f16) && x.ndim > 0 &&
                          x.size(-1) > 0 && x.contiguous_from(0),
                      "argmax: x is ", name(x.dtype),
                      ", expected contiguous float32, bfloat16 or float16 (..., columns)");
        const int64_t columns = x.size(-1);
        std::vector<int64_t> at;
        for (int64_t i = 0; i < x.numel(); i += columns) at.push_back(argmax_row(x, i, columns));
        return at;
      },
      "(x (..., columns) fp32|bf16|fp16) -> a list: each row's first largest column; a NaN is larger than all");
}

}  // namespace fastllm::cpu
