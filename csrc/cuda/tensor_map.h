// What the copy engine of sm_90 has to know of a tensor to copy boxes of it.
#pragma once

#include <cstdint>

#ifdef FASTLLM_SIMT
#include "simt.h"
#endif

namespace fastllm::cuda {

#ifdef FASTLLM_SIMT
using TensorMap = simt::TensorMap;
#else
// CUDA's CUtensorMap, whose header the kernels have no use for.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
#endif

// Of a tensor of 16-bit elements with four dims, innermost first: sizes in elements, strides of the outer three in
// bytes. A box is box[i] elements along dim i, with box[0] 64 or fewer, and lies in shared memory row after row, each
// of 128 bytes, in which 16-byte chunk c of row r is at chunk c ^ r % 8. False where the driver makes no such map.
bool make_tensor_map(TensorMap& map, const void* address, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                     const int (&box)[4]);

}  // namespace fastllm::cuda
