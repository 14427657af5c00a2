#include "bindings.h"
#include "rms_norm.h"

namespace fastllm::cpu {

namespace {

RmsNormArgs args_of(const TensorView& x, const std::optional<TensorView>& weight,
                    const std::optional<TensorView>& residual, const TensorView& y,
                    const std::optional<TensorView>& sum, float eps, float offset, bool round_before_weight,
                    int threads) {
  const int64_t K = x.size(-1);
  FASTLLM_CHECK(x.stride(-1) == 1 || K == 1, "rms_norm: x has stride ", x.stride(-1), " in its last dim, expected 1");
  FASTLLM_CHECK(y.numel() == x.numel() && y.contiguous_from(0), "rms_norm: y must be contiguous and as large as x");
  RmsNormArgs a{};
  a.x = x.data;
  a.weight = weight ? weight->data : nullptr;
  a.residual = residual ? residual->data : nullptr;
  a.y = y.data;
  a.sum = sum ? sum->data : nullptr;
  a.dtype = x.dtype;
  a.K = K;
  a.rows = K ? x.numel() / K : 0;
  a.x_rows = Rows::of(x);
  if (residual) a.residual_rows = Rows::of(*residual);
  a.eps = eps;
  a.offset = offset;
  a.round_before_weight = round_before_weight;
  a.threads = threads;
  return a;
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm",
      [](const TensorView& x, const std::optional<TensorView>& weight, const std::optional<TensorView>& residual,
         const TensorView& y, const std::optional<TensorView>& sum, float eps, float offset, bool round_before_weight,
         int threads) {
        const RmsNormArgs a = args_of(x, weight, residual, y, sum, eps, offset, round_before_weight, threads);
        launch("rms_norm", [a] { rms_norm_kernel(a); });
      },
      "(x, weight, residual, y, sum, eps, offset, round_before_weight, threads): fills y, and sum if given");
  m.def(
      "rms_norm_int8",
      [](const TensorView& x, const std::optional<TensorView>& weight, const std::optional<TensorView>& residual,
         const TensorView& y, const TensorView& groups, const std::optional<TensorView>& sum, float eps, float offset,
         bool round_before_weight, int64_t group_size, int threads) {
        RmsNormArgs a = args_of(x, weight, residual, y, sum, eps, offset, round_before_weight, threads);
        a.groups = int8_groups("rms_norm", y, groups, group_size);
        a.group_size = group_size;
        launch("rms_norm", [a] { rms_norm_kernel(a); });
      },
      "(x, weight, residual, y, groups, sum, eps, offset, round_before_weight, group_size, threads): y is int8");
  declare_rungs(m, "rms_norm", rms_norm_kernel);
}

}  // namespace fastllm::cpu
