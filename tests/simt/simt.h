// A host SIMT executor: CUDA's vocabulary, so that the sources in csrc/cuda compile with a host compiler and run
// without a GPU.
//
// A block's threads are fibers of one OS thread; blocks run one after the other. A fiber runs until it meets others: at
// a barrier, in a shuffle, in a matrix instruction. Who runs next is drawn from a seeded generator, so an order that
// the source does not enforce goes wrong for some seed. Shared memory starts as NaN. Global and shared accesses are the
// host's own loads and stores: AddressSanitizer sees those that leave an allocation, UBSan those that are misaligned.
//
// It is a test tool: right, and slow; it has what the kernels use and no more.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Aligned as on a GPU, where a vector access to any other address is an error.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;

using std::max;
using std::min;

namespace simt {

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
};
// The fiber that runs now.
extern Thread self;

// Runs every block of a grid. Throws std::runtime_error for a deadlock and for lanes that meet in different
// instructions.
void run(const char* name, dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);
void seed(uint64_t value);

// Of each kernel's launches so far, by name: the most blocks, threads a block and bytes of shared memory.
struct Launches {
  int count = 0;
  unsigned blocks = 0, threads = 0;
  size_t shared_bytes = 0;
};
std::map<std::string, Launches>& launches();

unsigned char* shared_memory();
int lane();

// A barrier among `threads` of the block's threads.
void barrier(int id, int threads);

// Where the lanes of a warp meet: each brings its operands, and the last to come computes for all of them.
using Compute = void (*)(void* const lanes[32], unsigned mask);
void meet(unsigned mask, const char* instruction, void* operands, Compute compute);

// A copy into shared memory that may arrive at any time until its group is waited for: at once or as late as that.
void copy_async(void* to, const void* from, int bytes, int valid_bytes);
void commit_copies();
void wait_for_copies(int groups_left);

void check_alignment(const void* address, int bytes);

// Where something lies in this block's shared memory, and back: as many bytes from there on have to be in it.
unsigned shared_offset(const void* address);
unsigned char* shared_at(unsigned offset, unsigned bytes);

// A barrier in shared memory whose phase ends when `arrivals` threads and all bytes that they expect have arrived.
// Waiting for a phase is for the one of that parity: the one under way, or the one before it.
void init_phases(uint64_t* barrier, int arrivals);
void arrive(uint64_t* barrier, int bytes);
void wait_for_phase(uint64_t* barrier, unsigned parity);

// What cuTensorMapEncodeTiled is told, of 16-bit elements. Innermost first; strides in bytes.
struct TensorMap {
  const unsigned char* address;
  int64_t sizes[4], strides[4];
  int box[4];
};
// A box of a tensor, with the 128-byte swizzle and zeros for what is not in the tensor: it arrives at once, or as late
// as somebody waits for the barrier.
void copy_box(void* to, const TensorMap& map, uint64_t* barrier, const int (&at)[4]);

// wgmma: what a thread brings. Its registers are read and written when the product is made, at once or as late as its
// group is waited for; sums that it does not add to are NaN until then.
struct AsyncProduct {
  const char* instruction;
  void (*compute)(const AsyncProduct* threads);
  float* c;           // columns / 2
  const unsigned* a;  // 4, or null where a_matrix has it
  uint64_t a_matrix, b_matrix;
  int columns;
  bool add;
};
void start_product(const AsyncProduct& mine);
void fence_registers();
void commit_products();
void wait_for_products(int groups_left);

}  // namespace simt

#define threadIdx (::simt::self.thread)
#define blockIdx (::simt::self.block)
#define blockDim (::simt::self.block_dim)
#define gridDim (::simt::self.grid_dim)

inline void __syncthreads() { simt::barrier(0, static_cast<int>(simt::self.block_dim.x)); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::meet(mask, "__syncwarp", nullptr, [](void* const*, unsigned) {});
}

namespace simt {

template <typename T>
struct Shuffle {
  T value, result;
  int source;
};

template <typename T>
T shuffle(unsigned mask, const char* instruction, T value, int source) {
  Shuffle<T> mine{value, T{}, source};
  meet(mask, instruction, &mine, [](void* const lanes[32], unsigned present) {
    for (int i = 0; i < 32; ++i) {
      if (!(present >> i & 1)) continue;
      auto* to = static_cast<Shuffle<T>*>(lanes[i]);
      // A lane that is not there gives what no kernel may use.
      std::memset(&to->result, 0xff, sizeof(T));
      if (present >> to->source & 1) to->result = static_cast<Shuffle<T>*>(lanes[to->source])->value;
    }
  });
  return mine.result;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, "__shfl_sync", value, (simt::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return simt::shuffle(mask, "__shfl_xor_sync", value, simt::lane() ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  struct Vote {
    bool vote;
    unsigned all;
  } mine{vote, 0};
  simt::meet(mask, "__ballot_sync", &mine, [](void* const lanes[32], unsigned present) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) {
      if (present >> i & 1) all |= static_cast<unsigned>(static_cast<Vote*>(lanes[i])->vote) << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (present >> i & 1) static_cast<Vote*>(lanes[i])->all = all;
    }
  });
  return mine.all;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(__float_as_int(value)); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
// Rounded by itself: no compiler makes an fma of it and a sum. (The executor is compiled with -ffp-contract=off.)
inline float __fmul_rn(float x, float y) { return x * y; }
// c and the products of the four signed bytes of a and b.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
// Four of the eight bytes of y and x, x the lower four: `selector` has a nibble for each.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
