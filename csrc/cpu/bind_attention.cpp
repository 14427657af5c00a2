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

template <const KernelTable<AttentionArgs>& kernel>
void attention(const TensorView& q, const TensorView& k, const TensorView& v, const std::optional<TensorView>& mask,
               const std::optional<TensorView>& kv_lens, const std::optional<TensorView>& sinks, const TensorView& o,
               bool causal, float scale, int64_t window, float softcap, int threads) {
  for (const TensorView* x : {&q, &k, &v, &o}) {
    FASTLLM_CHECK(x->ndim == 4 && x->dtype == q.dtype, "attention: q, k, v and o must have 4 dims and one dtype");
    FASTLLM_CHECK(x->stride(3) == 1 || x->size(3) == 1 || x->numel() == 0,
                  "attention: q, k, v and o must have stride 1 in the last dim");
  }
  AttentionArgs a{};
  a.q = q.data;
  a.k = k.data;
  a.v = v.data;
  a.o = o.data;
  a.dtype = q.dtype;
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
  a.sinks = sinks ? sinks->as<float>() : nullptr;
  a.causal = causal;
  a.window = window < a.S + a.T ? window : 0;  // no two tokens are further apart
  a.scale = scale;
  a.softcap = softcap;
  a.threads = threads;
  launch([a] { kernel(a); });
}

}  // namespace

void bind_attention(py::module_& m) {
  const char* doc = "(q, k, v, mask, kv_lens, sinks, o, causal, scale, window, softcap, threads): fills o; 0 is none";
  m.def("attention_prefill", &attention<attention_prefill_kernel>, doc);
  m.def("attention_decode", &attention<attention_decode_kernel>, doc);
  declare_rungs(m, "attention_prefill", attention_prefill_kernel);
  declare_rungs(m, "attention_decode", attention_decode_kernel);
}

}  // namespace fastllm::cpu
