#pragma once

#include "attention_args.h"
#include "isa.h"

namespace fastllm::cpu {

FASTLLM_KERNEL(attention_decode, AttentionArgs, avx512_bf16)

}  // namespace fastllm::cpu
