// What generation does around a step's kernels. A few PyTorch calls would compute the same, at tens of microseconds
// each: after a step's weights have gone through the caches, nothing of Python or PyTorch is left in them.
#include "bindings.h"

namespace fastllm::cpu {
namespace {

// The first of the largest of x[0 .. n), as torch.argmax has it: a NaN counts as larger than all.
int64_t argmax_row(const float* x, int64_t n) {
  constexpr int kLanes = 16;
  float most[kLanes];
  bool nan = false;
  for (int j = 0; j < kLanes; ++j) most[j] = x[0];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    int unordered = 0;
    for (int j = 0; j < kLanes; ++j) {
      most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
      unordered |= x[i + j] != x[i + j];
    }
    nan |= unordered != 0;
  }
  float top = x[0];
  for (int j = 0; j < kLanes; ++j) top = most[j] > top ? most[j] : top;
  for (; i < n; ++i) {
    top = x[i] > top ? x[i] : top;
    nan |= x[i] != x[i];
  }
  for (i = 0; i < n; ++i) {
    if (nan ? x[i] != x[i] : x[i] == top) break;
  }
  return i;
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
        FASTLLM_CHECK(x.dtype == DType::f32 && x.ndim > 0 && x.size(-1) > 0 && x.contiguous_from(0), "argmax: x is ",
                      name(x.dtype), ", expected contiguous float32 (..., columns)");
        const int64_t columns = x.size(-1);
        std::vector<int64_t> at;
        for (int64_t i = 0; i < x.numel(); i += columns) at.push_back(argmax_row(x.as<const float>() + i, columns));
        return at;
      },
      "(x (..., columns) fp32) -> a list: each row's first largest column; a NaN is larger than all");
}

}  // namespace fastllm::cpu
