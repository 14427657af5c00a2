#include "tensor_map.h"

#ifndef FASTLLM_SIMT
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#endif

namespace fastllm::cuda {

#ifdef FASTLLM_SIMT

bool make_tensor_map(TensorMap& map, const void* address, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                     const int (&box)[4]) {
  map.address = static_cast<const unsigned char*>(address);
  for (int i = 0; i < 4; ++i) {
    map.sizes[i] = sizes[i];
    map.strides[i] = i == 0 ? 2 : strides[i - 1];
    map.box[i] = box[i];
  }
  return true;
}

#else

namespace {

// By the driver's own name for it: the module is imported where there is no libcuda, and may not be linked with it.
PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kSinceVersion = 12000;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSinceVersion, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess) cudaGetLastError();
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

bool make_tensor_map(TensorMap& map, const void* address, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                     const int (&box)[4]) {
  static const auto encode = find_encode();
  if (encode == nullptr) return false;
  CUtensorMap made;
  static_assert(sizeof(made) == sizeof(map) && alignof(CUtensorMap) <= alignof(TensorMap));
  cuuint64_t dims[4], bytes[3];
  cuuint32_t boxes[4], steps[4];
  for (int i = 0; i < 4; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]);
  }
  // Elements are only moved: bf16 serves for fp16 too.
  const CUresult status = encode(&made, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(address), dims, bytes,
                                 boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  std::memcpy(&map, &made, sizeof(map));
  return status == CUDA_SUCCESS;
}

#endif

}  // namespace fastllm::cuda
