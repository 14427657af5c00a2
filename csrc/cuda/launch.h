// How a kernel is started: on the tensors' device, on PyTorch's current stream there, with its arguments in one struct.
// Nothing here allocates or waits, so that a CUDA graph can hold a launch.
#pragma once

#ifdef FASTLLM_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include <sstream>
#include <stdexcept>

#include "../check.h"

namespace fastllm::cuda {

struct Place {
  int device = 0;
  cudaStream_t stream = nullptr;
};

struct Shape {
  dim3 grid;
  int threads;
  size_t shared_bytes = 0;  // all of it: kernels declare none of their own
};

// What launches depend on. Looked up once a device.
struct Gpu {
  int capability;  // 90 for 9.0
  int multiprocessors;
  bool sm90a;  // whether kernels with instructions of sm_90a alone were compiled, and run here
};
const Gpu& gpu(int device);
#ifdef FASTLLM_SIMT
void use_capability(int capability);  // what the executor says that it is: 80, or 90
#endif

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

#ifdef FASTLLM_SIMT

// This block's shared memory.
inline unsigned char* shared_memory() { return simt::shared_memory(); }

template <typename Args>
void launch(const char* name, void (*kernel)(Args), const Shape& shape, const Args& args, Place) {
  simt::run(name, shape.grid, static_cast<unsigned>(shape.threads), shape.shared_bytes, [&] { kernel(args); });
}

#else

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  return s_memory;
}
#endif

inline void check_launch(cudaError_t status, const char* kernel, const Shape& shape) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report this one's error
  std::ostringstream text;
  text << kernel << ": the launch of (" << shape.grid.x << ", " << shape.grid.y << ", " << shape.grid.z
       << ") blocks of " << shape.threads << " threads with " << shape.shared_bytes
       << " bytes of shared memory failed: " << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

// PyTorch's current device, whatever it is, stays so.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ != device) {
      changed_ = true;
      cudaSetDevice(device);
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename Args>
void launch(const char* name, void (*kernel)(Args), const Shape& shape, const Args& args, Place place) {
  const DeviceGuard guard(place.device);
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > (48 << 10)) {  // more has to be asked for
    check_launch(
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)),
        name, shape);
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  check_launch(cudaLaunchKernel(entry, shape.grid, dim3(shape.threads), arguments, shape.shared_bytes, place.stream),
               name, shape);
}

#endif

}  // namespace fastllm::cuda
