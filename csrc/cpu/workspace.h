// Scratch memory for kernels, allocated before their parallel_for.
#pragma once

#include <cstdint>

namespace fastllm::cpu {

// At least `floats` floats, aligned to a cache line, contents undefined; they belong to the calling thread until its
// next call. Up to 16 MiB are kept for the next call, because fresh pages cost more than many kernels. Throws
// std::bad_alloc.
float* workspace(int64_t floats);

}  // namespace fastllm::cpu
