#include "workspace.h"

#include <cstdlib>
#include <new>

namespace fastllm::cpu {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kKept = size_t{16} << 20;

struct Buffer {
  float* data = nullptr;
  size_t bytes = 0;

  ~Buffer() { std::free(data); }
  float* of(size_t wanted) {
    wanted = (wanted + kLine) / kLine * kLine;
    if (wanted > bytes || (bytes > kKept && wanted <= kKept)) {
      std::free(data);
      bytes = 0;
      data = static_cast<float*>(std::aligned_alloc(kLine, wanted));
      if (data == nullptr) throw std::bad_alloc();
      bytes = wanted;
    }
    return data;
  }
};

}  // namespace

float* workspace(int64_t floats) {
  thread_local Buffer buffer;
  return buffer.of(static_cast<size_t>(floats) * sizeof(float));
}

}  // namespace fastllm::cpu
