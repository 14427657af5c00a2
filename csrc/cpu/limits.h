// What the machine can do at most, measured with loops that do nothing else: the yardstick of `fastllm bench`.
#pragma once

#include "isa.h"

namespace fastllm::cpu {

enum class Limit : int { read, copy, stream, fp32, int8, int4, bf16 };
inline constexpr int kNumLimits = 7;
inline constexpr const char* kLimitNames[kNumLimits] = {"read", "copy", "stream", "fp32", "int8", "int4", "bf16"};

struct LimitsArgs {
  Limit limit;
  const float* from;   // read, copy, stream: (threads, floats); each thread streams a row of its own
  float* to;           // copy, stream: (threads, floats)
  int64_t floats;      // a multiple of kStreamStep
  const float* tiles;  // fp32, int8, int4, bf16: kTileFloats floats that stay in L1
  float* sums;         // (threads): what the loops computed, written so that no compiler can drop them
  int64_t* work;       // (threads): operations done, or bytes moved; 0 where the rung lacks the instruction
  int64_t repeats;     // passes over the row, or steps of the arithmetic loop
  int threads;
};

inline constexpr int64_t kStreamStep = 128;   // floats a step of the streaming loops on the widest rung
inline constexpr int64_t kTileFloats = 1024;  // two operands, each more than 8 + 4 of the widest vectors

FASTLLM_KERNEL(limits, LimitsArgs, avx512_bf16)

}  // namespace fastllm::cpu
