// What launches depend on of a GPU.
#include <mutex>
#include <vector>

#include "launch.h"

namespace fastllm::cuda {

#ifdef FASTLLM_SIMT

const Gpu& gpu(int) {
  static const Gpu executor{80, 4};
  return executor;
}

#else

const Gpu& gpu(int device) {
  static std::mutex lock;
  static std::vector<Gpu> known;
  const std::lock_guard<std::mutex> guard(lock);
  known.reserve(64);  // a reference to one must stay valid
  while (static_cast<int>(known.size()) <= device) {
    int major = 0, minor = 0, multiprocessors = 0;
    const int next = static_cast<int>(known.size());
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, next);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, next);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, next);
    known.push_back({10 * major + minor, multiprocessors});
  }
  return known[device];
}

#endif

}  // namespace fastllm::cuda
