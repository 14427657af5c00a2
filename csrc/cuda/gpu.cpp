// What launches depend on of a GPU.
#include <cstring>
#include <mutex>
#include <vector>

#include "launch.h"

namespace fastllm::cuda {

#ifdef FASTLLM_SIMT

static Gpu executor{80, 4, false};

const Gpu& gpu(int) { return executor; }
void use_capability(int capability) { executor = {capability, 4, capability == 90}; }

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
    const int capability = 10 * major + minor;
    const bool compiled = std::strstr(" " FASTLLM_CUDA_ARCHS, " 90a") != nullptr;
    known.push_back({capability, multiprocessors, capability == 90 && compiled});
  }
  return known[device];
}

#endif

}  // namespace fastllm::cuda
