// Two sets of threads behind one function.
//
// "openmp": PyTorch's wheels carry a libgomp of their own, and its workers spin for a while after each of PyTorch's
// parallel regions. A second pool then fights them for the cores. So we start our chunks through the very library that
// PyTorch loaded, found among the process's loaded objects by name and called through its C entry point; no OpenMP is
// linked. "pool": our own threads, where no OpenMP runtime is loaded (and under ThreadSanitizer, which cannot see into
// libgomp). docs/architecture.md holds the measurements.
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastllm::cpu {
namespace {

struct Job {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t grain;
  Shares shares;

  // `thread`: 0 for the caller, and the same for one thread from call to call.
  void work(int thread) {
    int64_t begin, end;
    while (shares.take(thread, grain, INT64_MAX, &begin, &end)) body(context, begin, end);
  }
};

// ---------------------------------------------------------------- openmp

struct Gomp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
};

#if defined(__linux__)
Gomp find_gomp() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const char* name = info->dlpi_name;
        if (name == nullptr) return 0;
        const char* file = std::strrchr(name, '/');
        file = file ? file + 1 : name;
        const bool openmp = !std::strncmp(file, "libgomp", 7) || !std::strncmp(file, "libiomp5", 8);
        auto& path = *static_cast<std::string*>(out);
        // Two runtimes may be loaded; the one that PyTorch carries (torch/lib or torch.libs) is the one to share.
        if (openmp && (path.empty() || std::strstr(name, "/torch"))) path = name;
        return 0;
      },
      &path);
  Gomp found;
  if (void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.thread = reinterpret_cast<decltype(found.thread)>(dlsym(library, "omp_get_thread_num"));
  }
  return found.parallel != nullptr && found.thread != nullptr ? found : Gomp{};
}
#else
Gomp find_gomp() { return {}; }
#endif

const Gomp& gomp() {
  static const Gomp found = find_gomp();
  return found;
}

// ---------------------------------------------------------------- pool

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Workers join a job of their own accord, and only while it is open. The owner works too, closes the job when no chunk
// is left, and waits for those who joined: a worker that another process keeps from its core is never waited for unless
// it has a chunk in hand. One word holds everything that this takes: (generation << 32) | (free places << 16) | joined.
class Pool {
 public:
  void run(Job& job, int threads) {
    // One job at a time; a second Python thread does its work alone rather than wait for a core that is busy anyway.
    if (busy_.test_and_set(std::memory_order_acquire)) {
      job.work(0);
      return;
    }
    const int places = start_workers(threads - 1);
    job_ = &job;
    {
      std::lock_guard<std::mutex> lock(mutex_);  // else a worker could miss this between its look and its sleep
      // Releases job_ to whoever joins. Nobody has joined now, so that a plain store loses nothing.
      state_.store((static_cast<uint64_t>(++generation_) << 32) | (static_cast<uint64_t>(places) << 16),
                   std::memory_order_release);
    }
    wake_.notify_all();
    job.work(0);
    // The job lies on the caller's stack: first nobody may join any more, then everybody must have left.
    state_.fetch_and(~kPlaces, std::memory_order_relaxed);
    for (int i = 0; (state_.load(std::memory_order_acquire) & kJoined) != 0; ++i) {
      if (i < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // the one we wait for may need this very core
      }
    }
    busy_.clear(std::memory_order_release);
  }

 private:
  int start_workers(int wanted) {
    if (wanted > kMaxWorkers) wanted = kMaxWorkers;
    try {
      for (; workers_ < wanted; ++workers_) {
        // Detached: they sleep when the process ends; nothing of theirs needs closing.
        std::thread([this, number = workers_ + 1, seen = generation_] { loop(number, seen); }).detach();
      }
    } catch (const std::system_error&) {  // the system grants no more threads: those that we have will do
    }
    return workers_ < wanted ? workers_ : wanted;
  }

  void loop(int number, uint32_t seen) {
    for (;;) {
      // Kernels of one model follow each other within microseconds: spin that long, then sleep and leave the core to
      // others.
      for (int i = 0; i < kSpins && generation() == seen; ++i) pause();
      if (generation() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation() != seen; });
      }
      uint64_t state = state_.load(std::memory_order_relaxed);
      seen = static_cast<uint32_t>(state >> 32);
      while ((state & kPlaces) != 0 && static_cast<uint32_t>(state >> 32) == seen) {
        if (state_.compare_exchange_weak(state, state - kOnePlace + 1, std::memory_order_acquire,
                                         std::memory_order_relaxed)) {
          job_->work(number);
          state_.fetch_sub(1, std::memory_order_release);
          break;
        }
      }
    }
  }

  uint32_t generation() const { return static_cast<uint32_t>(state_.load(std::memory_order_relaxed) >> 32); }

  static constexpr uint64_t kJoined = 0xffff, kOnePlace = 0x10000, kPlaces = 0xffff0000;
  static constexpr int kMaxWorkers = 0xffff;
  static constexpr int kSpins = 2000;  // about 50 us with a 40-cycle pause
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  // The owner's:
  uint32_t generation_ = 0;
  int workers_ = 0;
  Job* job_ = nullptr;
};

// ---------------------------------------------------------------- the choice

// Never destroyed: detached workers may outlive static destructors.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> use_openmp{true};

// A forked child has none of its parent's threads: it gets a pool of its own, and leaves OpenMP alone, because libgomp
// would wait for threads that are no longer there.
void in_forked_child() {
  the_pool.store(new Pool, std::memory_order_relaxed);
  use_openmp.store(false, std::memory_order_relaxed);
}

Pool& pool() { return *the_pool.load(std::memory_order_relaxed); }

thread_local bool on_pool = false;

bool openmp_serves() { return use_openmp.load(std::memory_order_relaxed) && !on_pool && gomp().parallel != nullptr; }

const bool ready = [] {
  the_pool.store(new Pool, std::memory_order_relaxed);
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, in_forked_child);
#endif
  return true;
}();

}  // namespace

Shares::Shares(int64_t count, int shares) : total_(count), count_(shares < 1 ? 1 : shares < kMost ? shares : kMost) {
  for (int i = 0; i < count_; ++i) shares_[i] = {start(i), start(i + 1)};
}

int64_t Shares::mirrored(int64_t index) const {
  int share = 0;
  while (index >= start(share + 1)) ++share;
  return start(share) + start(share + 1) - 1 - index;
}

bool Shares::take_of(Share& share, int64_t parts, int64_t least, int64_t most, int64_t* begin, int64_t* end) {
  int64_t from = __atomic_load_n(&share.next, __ATOMIC_RELAXED), size;
  do {
    const int64_t left = share.end - from;
    if (left <= 0) return false;
    size = left / parts > least ? left / parts : least;
    if (size > most) size = most;
    if (size > left) size = left;
  } while (!__atomic_compare_exchange_n(&share.next, &from, from + size, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  *begin = from;
  *end = from + size;
  return true;
}

bool Shares::take(int thread, int64_t least, int64_t most, int64_t* begin, int64_t* end) {
  for (int i = 0; i < count_; ++i) {
    // Half of its own share, so that the first runs are long runs of memory and the last ones small enough for all to
    // end together; of another's no more than it would get if all came for it.
    const int64_t parts = i == 0 ? 2 : 2 * count_;
    if (take_of(shares_[(thread + i) % count_], parts, least, most, begin, end)) return true;
  }
  return false;
}

void run_chunks(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (grain < 1) grain = 1;
  const int64_t chunks = (count + grain - 1) / grain;
  if (threads > chunks) threads = static_cast<int>(chunks);
  Job job{body, context, grain, Shares(count, threads)};
  if (threads <= 1) {
    job.work(0);
  } else if (openmp_serves()) {
    gomp().parallel([](void* job) { static_cast<Job*>(job)->work(gomp().thread()); }, &job,
                    static_cast<unsigned>(threads), 0);
  } else {
    pool().run(job, threads);
  }
}

namespace {

#if defined(__linux__)
int current_core() { return sched_getcpu(); }
// This thread goes to another core, where it is allowed one: left alone it may stay behind its maker for a while.
void leave_core(int core) {
  cpu_set_t allowed;
  if (core < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  CPU_CLR(core, &allowed);
  if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_core() { return 0; }
void leave_core(int) {}
#endif

}  // namespace

double round_trip(double seconds) {
  struct alignas(128) {
    std::atomic<int> ball{0};
  } line;
  constexpr int kStop = 2, kTrips = 500;
  std::thread partner([&, here = current_core()] {
    leave_core(here);
    for (int seen; (seen = line.ball.load(std::memory_order_acquire)) != kStop;) {
      if (seen == 1) line.ball.store(0, std::memory_order_release);
    }
  });
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best = seconds;
  for (auto start = Clock::now(); start < end;) {
    for (int i = 0; i < kTrips; ++i) {
      line.ball.store(1, std::memory_order_release);
      while (line.ball.load(std::memory_order_acquire) != 0) {
      }
    }
    const auto now = Clock::now();
    const double took = std::chrono::duration<double>(now - start).count() / kTrips;
    best = took < best ? took : best;
    start = now;
  }
  line.ball.store(kStop, std::memory_order_release);
  partner.join();
  return best;
}

OnPool::OnPool() : before_(on_pool) { on_pool = true; }
OnPool::~OnPool() { on_pool = before_; }

const char* thread_runtime() { return openmp_serves() ? "openmp" : "pool"; }

bool set_thread_runtime(const char* name) {
  const bool openmp = !std::strcmp(name, "openmp"), own = !std::strcmp(name, "pool");
  if (openmp ? gomp().parallel == nullptr : !own) return false;
  use_openmp.store(openmp, std::memory_order_relaxed);
  return true;
}

}  // namespace fastllm::cpu
