// Threads live behind this file and nowhere else.
#pragma once

#include <cstdint>

namespace fastllm::cpu {

// [0, count) in equal shares, one a thread. Each takes runs of its own share, and then of the others': what one call's
// thread wrote, the next call's same thread reads, from its own caches, and a thread that another process holds up
// delays the others by the run in its hand at most.
class Shares {
 public:
  Shares(int64_t count, int shares);
  // The next run for the thread of that number, of `least` to `most` indices, the long ones first. False where nothing
  // is left.
  bool take(int thread, int64_t least, int64_t most, int64_t* begin, int64_t* end);
  // The index as far from its share's other end: where the last ones have the most work, they then come first.
  int64_t mirrored(int64_t index) const;

 private:
  static constexpr int kMost = 64;  // threads beyond share shares
  struct alignas(64) Share {
    int64_t next, end;
  };
  bool take_of(Share& share, int64_t parts, int64_t least, int64_t most, int64_t* begin, int64_t* end);
  int64_t start(int share) const { return total_ * share / count_; }
  Share shares_[kMost];
  int64_t total_;
  int count_;
};

// Runs body(context, begin, end) over [0, count) in chunks of at least `grain`, taken from Shares of at most `threads`
// threads, and returns when all are done. The body must not throw. Results must not depend on which thread runs a
// chunk, nor on where chunks begin.
void run_chunks(int64_t count, int64_t grain, int threads, void (*body)(void* context, int64_t begin, int64_t end),
                void* context);

// While one of these lives, this thread's jobs run on our own pool: a recorded step is kernels alone, without PyTorch's
// parallel regions in between, and a pool that waits for nobody who holds no chunk keeps its pace beside other
// processes.
class OnPool {
 public:
  OnPool();
  ~OnPool();
  OnPool(const OnPool&) = delete;
  OnPool& operator=(const OnPool&) = delete;

 private:
  bool before_;
};

// Seconds that a cache line takes to another thread's core and back, the best of many trips in about `seconds`. Both
// threads spin: it needs two cores.
double round_trip(double seconds);

// Which threads serve: "openmp" (the OpenMP runtime that PyTorch has loaded) or "pool" (our own).
const char* thread_runtime();
// Chooses one by name; false if this process does not have it.
bool set_thread_runtime(const char* name);

}  // namespace fastllm::cpu

// A template whose argument is a lambda of an unnamed namespace has internal linkage itself, so rungs never share it.
template <typename Body>
static inline void parallel_for(int64_t count, int64_t grain, int threads, Body&& body) {
  if (count <= 0) return;
  if (threads <= 1 || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  fastllm::cpu::run_chunks(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}
