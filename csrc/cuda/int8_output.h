#pragma once

#include <cstdint>

namespace fastllm::cuda {

// Rows rounded to int8 with a scale for each group of columns; int8_groups.cuh draws them.
struct Int8Output {
  int8_t* data;   // (rows, K) contiguous; null where rows stay in their dtype
  float* groups;  // (rows, num_groups, 2): scale, sum of integers
  int num_groups;
  int group_log2;  // a group has 2^group_log2 columns: 32, 64 or 128
};

}  // namespace fastllm::cuda
