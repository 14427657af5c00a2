#pragma once

#include "../tensor.h"
#include "launch.h"

namespace fastllm::cuda {

// In elements, of tensors whose last dim has stride 1: (outer, head, token, D). `outer` is the sequence, or the page.
struct TokenStrides {
  int64_t outer, head, token;
};

struct AttentionArgs {
  const void *q, *k, *v;  // (B, H, T, D), (B, Hk, S, D) or in pages (num_pages, Hk, page, D)
  void* o;                // (B, H, T, D)
  DType dtype;            // of q and o, and of k and v where those are not int8
  TokenStrides q_strides, k_strides, v_strides, o_strides;
  const float *k_scale, *v_scale;  // one a token and head of k; null unless k and v are int8
  TokenStrides k_scale_strides, v_scale_strides;
  const void* kv_lens;  // (B) int32 or int64, or null
  DType lens_dtype;
  int64_t lens_stride;
  const void* sinks;  // (H) of fp32 or dtype, or null
  DType sinks_dtype;
  int64_t sinks_stride;
  const void* block_table;  // (B, max_pages) int32 or int64; null where each sequence's keys lie in one piece
  DType table_dtype;
  int64_t table_strides[2];
  int page;  // tokens of a page

  int B, H, Hk, T, S, D;
  bool causal;
  int window;  // 0: none
  // The weight of a score z = q . k is 2^(exponent f(z) - top), where f(z) is z; factor z, if scaled; or, if capped,
  // cap (1 - 2 / (1 + 2^(factor z))), which is cap tanh(x) at factor z = 2 x log2(e). exponent is above 0.
  bool scaled, capped;
  float factor, cap, exponent;

  // Decode only. A split is keys [i split_keys, (i + 1) split_keys) of a sequence and a key/value head. What it makes
  // of row r = t G + g of the T G rows that share the head lies at ((b Hk + head) T G + r) splits + i:
  float* part;           // D sums of weights times values,
  float2* part_softmax;  // and the largest exponent and the sum of the weights
  int splits, split_keys;
};

// Keys of a split: of the shapes and the GPU alone, so that a CUDA graph can hold the launch; not of B and T, so that a
// row has the same bits in every batch.
int attention_split_keys(int64_t S, int64_t Hk, int device);

void attention_decode(const AttentionArgs& args, Place place);
void attention_prefill(const AttentionArgs& args, Place place);
// False, and nothing is done, where the GPU or the call is not what it is made for.
bool attention_prefill_sm90(const AttentionArgs& args, Place place);

}  // namespace fastllm::cuda
