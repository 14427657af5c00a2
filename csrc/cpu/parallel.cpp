// Two sets of threads behind one function.
//
// "openmp": PyTorch's wheels carry a libgomp of their own, and its workers spin for a while after each of PyTorch's
// parallel regions. A second pool then fights them for the cores. So we start our chunks through the very library that
// PyTorch loaded, found among the process's loaded objects by name and called through its C entry point; no OpenMP is
// linked. "pool": our own threads, where no OpenMP runtime is loaded (and under ThreadSanitizer, which cannot see into
// libgomp). docs/architecture.md holds the measurements.
#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastllm::cpu {
namespace {

struct Job {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t count, grain;
  std::atomic<int64_t> next{0};

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, begin + grain < count ? begin + grain : count);
    }
  }
};

// ---------------------------------------------------------------- openmp

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
GompParallel find_gomp() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const char* name = info->dlpi_name;
        if (name == nullptr) return 0;
        const char* file = std::strrchr(name, '/');
        file = file ? file + 1 : name;
        const bool openmp = !std::strncmp(file, "libgomp", 7) || !std::strncmp(file, "libiomp5", 8);
        auto& path = *static_cast<std::string*>(out);
        // Two runtimes may be loaded; the one that PyTorch carries is the one to share.
        if (openmp && (path.empty() || std::strstr(name, "/torch/"))) path = name;
        return 0;
      },
      &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}
#else
GompParallel find_gomp() { return nullptr; }
#endif

GompParallel gomp() {
  static const GompParallel found = find_gomp();
  return found;
}

// ---------------------------------------------------------------- pool

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Pool {
 public:
  void run(Job& job, int threads) {
    // One job at a time; a second Python thread does its work alone rather than wait for a core that is busy anyway.
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) {
      job.work();
      return;
    }
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index, seen = generation_.load()] { loop(index, seen); });
      workers_.back().detach();  // they sleep when the process ends; nothing of theirs needs closing
    }
    job_ = &job;
    invited_ = threads - 1;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    while (running_.load(std::memory_order_acquire) != 0) pause();
  }

 private:
  void loop(int index, uint64_t seen) {
    for (;;) {
      // Kernels of one model follow each other within microseconds: spin that long, then sleep and leave the core to
      // others.
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;
      if (index < invited_) job_->work();
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  static constexpr int kSpins = 2000;  // about 50 us with a 40-cycle pause
  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
  Job* job_ = nullptr;
  int invited_ = 0;
};

// Never destroyed: detached workers may outlive static destructors. A forked child has none of its parent's threads, so
// it starts with a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool once = [] {
    the_pool.store(new Pool);
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(new Pool); });
#endif
    return true;
  }();
  (void)once;
  return *the_pool.load(std::memory_order_relaxed);
}

std::atomic<bool> use_openmp{true};

}  // namespace

void run_chunks(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (grain < 1) grain = 1;
  Job job{body, context, count, grain};
  const int64_t chunks = (count + grain - 1) / grain;
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads <= 1) {
    job.work();
  } else if (use_openmp.load(std::memory_order_relaxed) && gomp() != nullptr) {
    gomp()([](void* job) { static_cast<Job*>(job)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(job, threads);
  }
}

const char* thread_runtime() { return use_openmp.load() && gomp() != nullptr ? "openmp" : "pool"; }

bool set_thread_runtime(const char* name) {
  const bool openmp = !std::strcmp(name, "openmp");
  if (openmp && gomp() == nullptr) return false;
  use_openmp.store(openmp);
  return openmp || !std::strcmp(name, "pool");
}

}  // namespace fastllm::cpu
