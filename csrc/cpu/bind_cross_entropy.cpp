#include "bindings.h"
#include "cross_entropy.h"

namespace fastllm::cpu {

void bind_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy",
      [](const TensorView& logits, const TensorView& target, const TensorView& state,
         const std::optional<TensorView>& loss, int64_t first, float softcap, int64_t ignore_index, int threads) {
        FASTLLM_CHECK(logits.dtype == DType::f32 && logits.ndim == 2 && logits.contiguous_from(0),
                      "cross_entropy: logits must be contiguous float32 (rows, columns)");
        const int64_t rows = logits.size(0);
        FASTLLM_CHECK(target.dtype == DType::i64 && target.numel() == rows && target.contiguous_from(0),
                      "cross_entropy: target must be contiguous int64 (", rows, ",)");
        FASTLLM_CHECK(state.dtype == DType::f64 && state.numel() == 3 * rows && state.contiguous_from(0),
                      "cross_entropy: state must be contiguous float64 (", rows, ", 3)");
        FASTLLM_CHECK(!loss || (loss->dtype == DType::f32 && loss->numel() == rows && loss->contiguous_from(0)),
                      "cross_entropy: loss must be contiguous float32 (", rows, ",)");
        FASTLLM_CHECK(first >= 0, "cross_entropy: first is ", first, ", expected at least 0");
        CrossEntropyArgs a{};
        a.logits = logits.as<const float>();
        a.target = target.as<const int64_t>();
        a.state = state.as<CrossEntropyState>();
        a.loss = loss ? loss->as<float>() : nullptr;
        a.rows = rows;
        a.columns = logits.size(1);
        a.first = first;
        a.ignore_index = ignore_index;
        a.softcap = softcap;
        a.threads = threads;
        launch("cross_entropy", [a] { cross_entropy_kernel(a); });
      },
      "(logits, target, state, loss, first, softcap, ignore_index, threads): takes columns first and on of the "
      "vocabulary into state; fills loss, if given, once these were the last");
  declare_rungs(m, "cross_entropy", cross_entropy_kernel);
}

}  // namespace fastllm::cpu
