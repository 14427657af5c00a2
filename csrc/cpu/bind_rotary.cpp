#include "bindings.h"
#include "rotary.h"

namespace fastllm::cpu {
namespace {

RotaryArgs rotary_args(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
                       bool interleaved, int threads) {
  RotaryArgs a{};
  a.dtype = q.dtype;
  a.B = q.shape[0];
  a.T = q.shape[2];
  a.D = q.shape[3];
  a.R = cos.size(-1);
  FASTLLM_CHECK(k.dtype == q.dtype && sin.dtype == cos.dtype && (cos.dtype == DType::f32 || cos.dtype == q.dtype),
                "apply_rotary: cos has dtype ", name(cos.dtype), ", expected float32 or ", name(q.dtype));
  FASTLLM_CHECK(a.R <= a.D && a.R % 2 == 0, "apply_rotary: cos has ", a.R,
                " lanes, expected an even number of at most ", a.D);
  a.cos = cos.data;
  a.sin = sin.data;
  a.table_dtype = cos.dtype;
  if (cos.ndim == 3) {  // (B or 1, T, R): a row a token; else a table
    a.cos_strides[0] = cos.shape[0] == 1 ? 0 : cos.strides[0];
    a.sin_strides[0] = sin.shape[0] == 1 ? 0 : sin.strides[0];
  }
  a.cos_strides[1] = cos.stride(-2);
  a.sin_strides[1] = sin.stride(-2);
  a.interleaved = interleaved;
  a.threads = threads;
  return a;
}

// (T), (1, T) or (B, T) integers, each in [0, limit).
const int64_t* indices(const char* name, const TensorView& index, int64_t limit, const char* what, int64_t B, int64_t T,
                       int64_t* strides) {
  const auto* values = index.as<const int64_t>();
  strides[0] = index.ndim == 2 && index.shape[0] != 1 ? index.strides[0] : 0;
  strides[1] = index.stride(-1);
  const int64_t rows = strides[0] == 0 ? 1 : B;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      const int64_t value = values[b * strides[0] + t * strides[1]];
      FASTLLM_CHECK(value >= 0 && value < limit, "apply_rotary_cache: ", name, " holds ", value, " for token ", t,
                    ", expected 0 to ", limit - 1, ", the rows of ", what);
    }
  }
  return values;
}

void check_cache(const char* name, const TensorView& cache, int64_t rows) {
  for (int i = 0; i < cache.ndim; ++i) {
    FASTLLM_CHECK(cache.shape[i] == 1 || cache.strides[i] != 0 || rows == 0, "apply_rotary_cache: ", name,
                  " has stride 0 in dim ", i,
                  ", expected memory of its own for each element, because it is written to");
  }
}

// An int8 cache's scales, (B, Hk, max_tokens); no other cache has them.
void set_scale(const char* name, const TensorView& cache, const std::optional<TensorView>& scale, int64_t rows,
               RotaryTensor* tensor) {
  FASTLLM_CHECK((cache.dtype == DType::i8) == scale.has_value(), "apply_rotary_cache: an int8 cache needs ", name,
                ", others have none");
  if (!scale) return;
  FASTLLM_CHECK(scale->ndim == 3 && scale->dtype == DType::f32 && cache.size(3) <= kMaxInt8Row,
                "apply_rotary_cache: ", name, " must be float32 (B, Hk, max_tokens), and D at most ", kMaxInt8Row);
  check_cache(name, *scale, rows);
  tensor->set_scale(*scale);
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def(
      "apply_rotary",
      [](const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
         const TensorView& q_out, const TensorView& k_out, bool interleaved, int threads) {
        RotaryArgs a = rotary_args(q, k, cos, sin, interleaved, threads);
        a.tensors[0] = RotaryTensor::of(q, q_out, true, false);
        a.tensors[1] = RotaryTensor::of(k, k_out, true, false);
        a.num_tensors = 2;
        launch("rotary", [a] { rotary_kernel(a); });
      },
      "(q, k, cos, sin, q_out, k_out, interleaved, threads): fills q_out and k_out");
  m.def(
      "apply_rotary_cache",
      [](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cos, const TensorView& sin,
         const TensorView& q_out, const TensorView& k_cache, const TensorView& v_cache, const TensorView& positions,
         const std::optional<TensorView>& slots, const std::optional<TensorView>& k_scale,
         const std::optional<TensorView>& v_scale, bool interleaved, int threads) {
        RotaryArgs a = rotary_args(q, k, cos, sin, interleaved, threads);
        FASTLLM_CHECK(positions.dtype == DType::i64 && (!slots || slots->dtype == DType::i64),
                      "apply_rotary_cache: positions and slots must be int64");
        check_cache("k_cache", k_cache, a.B * a.T);
        check_cache("v_cache", v_cache, a.B * a.T);
        if (cos.ndim == 2) {
          a.positions = indices("positions", positions, cos.shape[0], "cos", a.B, a.T, a.positions_strides);
        }
        a.slots = indices(slots ? "slots" : "positions", slots ? *slots : positions, k_cache.shape[2], "k_cache", a.B,
                          a.T, a.slots_strides);
        a.tensors[0] = RotaryTensor::of(q, q_out, true, false);
        a.tensors[1] = RotaryTensor::of(k, k_cache, true, true);
        a.tensors[2] = RotaryTensor::of(v, v_cache, false, true);
        set_scale("k_scale", k_cache, k_scale, a.B * a.T, &a.tensors[1]);
        set_scale("v_scale", v_cache, v_scale, a.B * a.T, &a.tensors[2]);
        a.num_tensors = 3;
        launch("rotary", [a] { rotary_kernel(a); });
      },
      "(q, k, v, cos, sin, q_out, k_cache, v_cache, positions, slots, k_scale, v_scale, interleaved, threads): fills "
      "q_out, writes k and "
      "v to their slots");
  declare_rungs(m, "rotary", rotary_kernel);
}

}  // namespace fastllm::cpu
