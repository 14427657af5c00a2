#include "bindings.h"
#include "rms_norm.h"

namespace fastllm::cuda {

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm",
      [](const TensorView& x, const std::optional<TensorView>& weight, const std::optional<TensorView>& residual,
         const TensorView& y, const std::optional<TensorView>& sum, float eps, float offset, bool round_before_weight) {
        FASTLLM_CHECK(y.numel() == x.numel() && y.contiguous_from(0),
                      "rms_norm: y must be contiguous and as large as x");
        RmsNormArgs a{};
        a.x = x.data;
        a.weight = weight ? weight->data : nullptr;
        a.residual = residual ? residual->data : nullptr;
        a.y = y.data;
        a.sum = sum ? sum->data : nullptr;
        a.dtype = x.dtype;
        a.K = x.size(-1);
        a.rows = a.K ? x.numel() / a.K : 0;
        a.x_rows = Rows::of(x);
        if (residual) a.residual_rows = Rows::of(*residual);
        a.eps = eps;
        a.offset = offset;
        a.round_before_weight = round_before_weight;
        rms_norm(a, place_of(x));
      },
      "(x, weight, residual, y, sum, eps, offset, round_before_weight): fills y, and sum if given");
}

}  // namespace fastllm::cuda
