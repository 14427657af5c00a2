#include "attention_decode.h"
#include "attention_prefill.h"
#include "bindings.h"

namespace fastllm::cpu {
namespace {

void strides_of(const TensorView& x, int64_t (&strides)[3]) {
  for (int i = 0; i < 3; ++i) strides[i] = x.strides[i];
}

void check_kv_lens(const TensorView& lens, int64_t S) {
  for (int64_t b = 0; b < lens.shape[0]; ++b) {
    const int64_t at = b * lens.strides[0];
    const int64_t n = lens.dtype == DType::i32 ? lens.as<int32_t>()[at] : lens.as<int64_t>()[at];
    FASTLLM_CHECK(0 <= n && n <= S, "attention: kv_lens[", b, "] is ", n, ", expected 0 to ", S,
                  ", the number of keys in k");
  }
}

const float* scale_of(const TensorView& scale, int64_t S, int64_t (&strides)[2]) {
  FASTLLM_CHECK(scale.ndim == 3 && scale.dtype == DType::f32 && (scale.stride(2) == 1 || S <= 1),
                "attention: a scale must be float32 (B, Hk, S) with stride 1 in the last dim");
  for (int i = 0; i < 2; ++i) strides[i] = scale.strides[i];
  return scale.as<const float>();
}

template <const KernelTable<AttentionArgs>& kernel, bool prefill>
void attention(const TensorView& q, const TensorView& k, const TensorView& v, const std::optional<TensorView>& mask,
               const std::optional<TensorView>& kv_lens, const std::optional<TensorView>& sinks,
               const std::optional<TensorView>& k_scale, const std::optional<TensorView>& v_scale, const TensorView& o,
               bool causal, float scale, int64_t window, float softcap, int threads) {
  for (const TensorView* x : {&q, &k, &v, &o}) {
    FASTLLM_CHECK(x->ndim == 4, "attention: q, k, v and o must have 4 dims");
    FASTLLM_CHECK(x->stride(3) == 1 || x->size(3) == 1 || x->numel() == 0,
                  "attention: q, k, v and o must have stride 1 in the last dim");
  }
  FASTLLM_CHECK(o.dtype == q.dtype && v.dtype == k.dtype, "attention: q and o, and k and v, must have one dtype");
  FASTLLM_CHECK(k.dtype == q.dtype || k.dtype == DType::i8 || q.dtype == DType::f32, "attention: k has dtype ",
                name(k.dtype), " with q of ", name(q.dtype));
  AttentionArgs a{};
  a.q = q.data;
  a.k = k.data;
  a.v = v.data;
  a.o = o.data;
  a.dtype = q.dtype;
  a.kv_dtype = k.dtype;
  a.B = q.size(0);
  a.H = q.size(1);
  a.T = q.size(2);
  a.D = q.size(3);
  a.Hk = k.size(1);
  a.S = k.size(2);
  strides_of(q, a.q_strides);
  strides_of(k, a.k_strides);
  strides_of(v, a.v_strides);
  strides_of(o, a.o_strides);
  if (mask) {
    a.mask = mask->data;
    a.mask_dtype = mask->dtype;
    for (int i = 0; i < 4; ++i) a.mask_strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);  // broadcast
  }
  if (kv_lens) {
    check_kv_lens(*kv_lens, a.S);
    a.kv_lens = kv_lens->data;
    a.kv_lens_dtype = kv_lens->dtype;
    a.kv_lens_stride = kv_lens->stride(0);
  }
  FASTLLM_CHECK((k.dtype == DType::i8) == k_scale.has_value() && k_scale.has_value() == v_scale.has_value(),
                "attention: int8 keys and values need k_scale and v_scale, others have none");
  if (k_scale) {
    a.k_scale = scale_of(*k_scale, a.S, a.k_scale_strides);
    a.v_scale = scale_of(*v_scale, a.S, a.v_scale_strides);
  }
  a.sinks = sinks ? sinks->as<float>() : nullptr;
  a.causal = causal;
  a.window = window < a.S + a.T ? window : 0;  // no two tokens are further apart
  a.scale = scale;
  a.softcap = softcap;
  a.threads = threads;
  a.bf16_dots = fast_bf16_dots();
  launch(prefill ? "attention_prefill" : "attention_decode", [a] { kernel(a); });
}

}  // namespace

void bind_attention(py::module_& m) {
  const char* doc =
      "(q, k, v, mask, kv_lens, sinks, k_scale, v_scale, o, causal, scale, window, softcap, threads): fills o; 0 is "
      "none";
  m.def("attention_prefill", &attention<attention_prefill_kernel, true>, doc);
  m.def("attention_decode", &attention<attention_decode_kernel, false>, doc);
  declare_rungs(m, "attention_prefill", attention_prefill_kernel);
  declare_rungs(m, "attention_decode", attention_decode_kernel);
}

}  // namespace fastllm::cpu
