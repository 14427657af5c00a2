#include "bindings.h"
#include "rotary.h"

namespace fastllm::cuda {
namespace {

RotaryArgs rotary_args(const TensorView& q, const TensorView& cos, const TensorView& sin, bool interleaved) {
  RotaryArgs a{};
  a.dtype = q.dtype;
  a.B = q.shape[0];
  a.T = q.shape[2];
  a.D = static_cast<int>(q.shape[3]);
  a.R = static_cast<int>(cos.size(-1));
  a.cos = cos.data;
  a.sin = sin.data;
  a.table_dtype = cos.dtype;
  a.table_rows = cos.size(-2);
  if (cos.ndim == 3) {  // (B or 1, T, R): a row a token; else a table
    a.cos_strides[0] = cos.shape[0] == 1 ? 0 : cos.strides[0];
    a.sin_strides[0] = sin.shape[0] == 1 ? 0 : sin.strides[0];
  }
  a.cos_strides[1] = cos.stride(-2);
  a.sin_strides[1] = sin.stride(-2);
  a.interleaved = interleaved;
  return a;
}

// (T), (1, T) or (B, T).
const int64_t* indices(const TensorView& index, int64_t* strides) {
  strides[0] = index.ndim == 2 && index.shape[0] != 1 ? index.strides[0] : 0;
  strides[1] = index.stride(-1);
  return index.as<const int64_t>();
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def(
      "apply_rotary",
      [](const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
         const TensorView& q_out, const TensorView& k_out, bool interleaved) {
        RotaryArgs a = rotary_args(q, cos, sin, interleaved);
        a.tensors[0] = RotaryTensor::of(q, q_out, true, false);
        a.tensors[1] = RotaryTensor::of(k, k_out, true, false);
        a.num_tensors = 2;
        rotary(a, place_of(q));
      },
      "(q, k, cos, sin, q_out, k_out, interleaved): fills q_out and k_out");
  m.def(
      "apply_rotary_cache",
      [](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cos, const TensorView& sin,
         const TensorView& q_out, const TensorView& k_cache, const TensorView& v_cache, const TensorView& positions,
         const std::optional<TensorView>& slots, const std::optional<TensorView>& k_scale,
         const std::optional<TensorView>& v_scale, const std::optional<TensorView>& block_table, bool interleaved) {
        FASTLLM_CHECK((k_cache.dtype == DType::i8) == k_scale.has_value() && k_scale.has_value() == v_scale.has_value(),
                      "apply_rotary_cache: an int8 cache needs k_scale and v_scale, others have none");
        RotaryArgs a = rotary_args(q, cos, sin, interleaved);
        if (cos.ndim == 2) a.positions = indices(positions, a.positions_strides);
        a.slots = indices(slots ? *slots : positions, a.slots_strides);
        a.cache_rows = k_cache.shape[2];
        if (block_table) {
          a.page = k_cache.shape[2];
          a.num_pages = k_cache.shape[0];
          a.cache_rows = a.page * block_table->shape[1];
          a.block_table = block_table->data;
          a.block_table_dtype = block_table->dtype;
          a.block_table_strides[0] = block_table->strides[0];
          a.block_table_strides[1] = block_table->strides[1];
        }
        a.tensors[0] = RotaryTensor::of(q, q_out, true, false);
        a.tensors[1] = RotaryTensor::of(k, k_cache, true, true);
        a.tensors[2] = RotaryTensor::of(v, v_cache, false, true);
        if (k_scale) a.tensors[1].set_scale(*k_scale);
        if (v_scale) a.tensors[2].set_scale(*v_scale);
        a.num_tensors = 3;
        rotary(a, place_of(q));
      },
      "(q, k, v, cos, sin, q_out, k_cache, v_cache, positions, slots, k_scale, v_scale, block_table, interleaved): "
      "fills q_out, "
      "writes k "
      "and v to their slots");
}

}  // namespace fastllm::cuda
