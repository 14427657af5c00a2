#include "attention.h"
#include "bindings.h"

namespace fastllm::cuda {
namespace {

TokenStrides strides_of(const TensorView& x) { return {x.strides[0], x.strides[1], x.strides[2]}; }

void attention(const TensorView& q, const TensorView& k, const TensorView& v, const std::optional<TensorView>& kv_lens,
               const std::optional<TensorView>& sinks, const std::optional<TensorView>& block_table,
               const std::optional<TensorView>& k_scale, const std::optional<TensorView>& v_scale, const TensorView& o,
               const std::optional<TensorView>& parts, bool causal, int window, bool scaled, bool capped, float factor,
               float cap, float exponent, int split_keys) {
  AttentionArgs a{};
  a.q = q.data;
  a.k = k.data;
  a.v = v.data;
  a.o = o.data;
  a.dtype = q.dtype;
  a.q_strides = strides_of(q);
  a.k_strides = strides_of(k);
  a.v_strides = strides_of(v);
  a.o_strides = strides_of(o);
  a.B = static_cast<int>(q.size(0));
  a.H = static_cast<int>(q.size(1));
  a.T = static_cast<int>(q.size(2));
  a.D = static_cast<int>(q.size(3));
  a.Hk = static_cast<int>(k.size(1));
  a.S = static_cast<int>(k.size(2));
  FASTLLM_CHECK(q.dtype == DType::bf16 || q.dtype == DType::f16, "attention: q has dtype ", name(q.dtype),
                ", expected bfloat16 or float16");
  FASTLLM_CHECK(k.dtype == v.dtype && k.dtype == (k_scale ? DType::i8 : q.dtype), "attention: k has dtype ",
                name(k.dtype), " with q of ", name(q.dtype));
  FASTLLM_CHECK(a.D == 64 || a.D == 80 || a.D == 96 || a.D == 128 || a.D == 256, "attention: q has head dim ", a.D,
                ", expected 64, 80, 96, 128 or 256");
  if (k_scale && v_scale) {
    a.k_scale = k_scale->as<const float>();
    a.v_scale = v_scale->as<const float>();
    a.k_scale_strides = strides_of(*k_scale);
    a.v_scale_strides = strides_of(*v_scale);
  }
  if (kv_lens) {
    a.kv_lens = kv_lens->data;
    a.lens_dtype = kv_lens->dtype;
    a.lens_stride = kv_lens->strides[0];
  }
  if (sinks) {
    a.sinks = sinks->data;
    a.sinks_dtype = sinks->dtype;
    a.sinks_stride = sinks->strides[0];
  }
  if (block_table) {
    a.block_table = block_table->data;
    a.table_dtype = block_table->dtype;
    a.table_strides[0] = block_table->strides[0];
    a.table_strides[1] = block_table->strides[1];
    a.page = a.S;
    a.S = static_cast<int>(block_table->size(1) * a.page);
  }
  a.causal = causal;
  a.window = window;
  a.scaled = scaled;
  a.capped = capped;
  a.factor = factor;
  a.cap = cap;
  a.exponent = exponent;
  if (!parts) return attention_prefill(a, place_of(q));
  a.split_keys = split_keys;
  a.splits = std::max(1, ceil_div(a.S, split_keys));
  const int64_t rows = static_cast<int64_t>(a.B) * a.H * a.T * a.splits;
  FASTLLM_CHECK(parts->dtype == DType::f32 && parts->numel() == rows * (a.D + 2),
                "attention: the scratch is not (B, H, T, splits, D + 2) float32");
  a.part = parts->as<float>();
  a.part_softmax = reinterpret_cast<float2*>(a.part + rows * a.D);
  attention_decode(a, place_of(q));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_split_keys", &attention_split_keys, "(S, Hk, device): keys of a split");
  m.def("attention", &attention,
        "(q, k, v, kv_lens, sinks, block_table, k_scale, v_scale, o, parts, causal, window, scaled, capped, "
        "factor, cap, exponent, split_keys): fills o; decode where it is given parts, its scratch, else prefill");
}

}  // namespace fastllm::cuda
