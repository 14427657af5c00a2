#include "bindings.h"
#include "rms_norm.h"

namespace fastllm::cuda {

namespace {

RmsNormArgs args_of(const TensorView& x, const std::optional<TensorView>& weight,
                    const std::optional<TensorView>& residual, const std::optional<TensorView>& sum, float eps,
                    float offset, bool round_before_weight) {
  RmsNormArgs a{};
  a.x = x.data;
  a.weight = weight ? weight->data : nullptr;
  a.residual = residual ? residual->data : nullptr;
  a.sum = sum ? sum->data : nullptr;
  a.dtype = x.dtype;
  a.K = x.size(-1);
  a.rows = a.K ? x.numel() / a.K : 0;
  a.x_rows = Rows::of(x);
  if (residual) a.residual_rows = Rows::of(*residual);
  a.eps = eps;
  a.offset = offset;
  a.round_before_weight = round_before_weight;
  return a;
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm",
      [](const TensorView& x, const std::optional<TensorView>& weight, const std::optional<TensorView>& residual,
         const TensorView& y, const std::optional<TensorView>& sum, float eps, float offset, bool round_before_weight) {
        FASTLLM_CHECK(y.numel() == x.numel() && y.contiguous_from(0),
                      "rms_norm: y must be contiguous and as large as x");
        RmsNormArgs a = args_of(x, weight, residual, sum, eps, offset, round_before_weight);
        a.y = y.data;
        rms_norm(a, place_of(x));
      },
      "(x, weight, residual, y, sum, eps, offset, round_before_weight): fills y, and sum if given");
  m.def(
      "rms_norm_int8",
      [](const TensorView& x, const std::optional<TensorView>& weight, const std::optional<TensorView>& residual,
         const TensorView& data, const TensorView& groups, const std::optional<TensorView>& sum, float eps,
         float offset, bool round_before_weight, int64_t group_size) {
        RmsNormArgs a = args_of(x, weight, residual, sum, eps, offset, round_before_weight);
        a.int8 = int8_output("rms_norm_int8", data, groups, a.rows, a.K, group_size);
        rms_norm(a, place_of(x));
      },
      "(x, weight, residual, data, groups, sum, eps, offset, round_before_weight, group_size): fills data and groups, "
      "and sum if given");
}

}  // namespace fastllm::cuda
