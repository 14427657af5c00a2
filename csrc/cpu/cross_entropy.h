#pragma once

#include "isa.h"

namespace fastllm::cpu {

// What is known of a row once some of its logits have been seen: their sum of exponentials is sum * e^top.
struct CrossEntropyState {
  double top, sum, picked;  // picked: the target's logit, NaN until it has come
};

struct CrossEntropyArgs {
  const float* logits;       // (rows, columns) contiguous: columns [first, first + columns) of the vocabulary
  const int64_t* target;     // (rows)
  CrossEntropyState* state;  // (rows), started where first is 0
  float* loss;               // (rows), filled with the last columns; null before
  int64_t rows, columns, first;
  int64_t ignore_index;
  float softcap;  // 0: none
  int threads;
};

FASTLLM_KERNEL(cross_entropy, CrossEntropyArgs, avx512)

}  // namespace fastllm::cpu
