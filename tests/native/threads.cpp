// Stresses csrc/cpu/parallel.cpp's own pool without Python, to be compiled with -fsanitize=thread:
// tests/test_threads.py.
//
// Every chunk adds its index to a plain (not atomic) cell of its own, so that a chunk that runs twice, not at all, or
// after run_chunks has returned is a wrong sum or a data race.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// One job of `count` cells: the caller's plain writes before and reads after are ordered with the workers' by
// run_chunks.
void job(int64_t count, int64_t grain, int threads) {
  std::vector<int64_t> cells(static_cast<size_t>(count), 1);
  parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) cells[static_cast<size_t>(i)] += i;
  });
  for (int64_t i = 0; i < count; ++i) {
    expect(cells[static_cast<size_t>(i)] == i + 1, "every index runs once before run_chunks returns");
  }
}

void many_jobs(int jobs, unsigned seed) {
  for (int i = 0; i < jobs; ++i) {
    seed = seed * 1664525u + 1013904223u;
    job(1 + (seed >> 8) % 40, 1 + (seed >> 16) % 3, 1 + static_cast<int>((seed >> 24) % 9));
    if (i % 512 == 0) usleep(300);  // longer than the workers spin: the next job finds them asleep
  }
}

// Threads that start together take every index once, and alone one first takes its own share.
void shares(int64_t count, int threads) {
  std::vector<int64_t> cells(static_cast<size_t>(count), 0);
  fastllm::cpu::Shares shared(count, threads);
  std::vector<std::thread> takers;
  for (int thread = 0; thread < threads; ++thread) {
    takers.emplace_back([&, thread] {
      int64_t begin, end;
      while (shared.take(thread, 1, thread % 2 ? 1 : count, &begin, &end)) {
        for (int64_t i = begin; i < end; ++i) ++cells[static_cast<size_t>(i)];
      }
    });
  }
  for (auto& taker : takers) taker.join();
  for (const int64_t cell : cells) expect(cell == 1, "every index is taken once");

  fastllm::cpu::Shares alone(count, threads);
  const int last = threads - 1;
  int64_t begin, end, expected = count * last / threads;
  while (expected < count && alone.take(last, 1, 3, &begin, &end)) {
    expect(begin == expected && end - begin <= 3, "a thread's own share comes first, in order");
    for (int64_t i = begin; i < end; ++i) {
      expect(alone.mirrored(i) == count * last / threads + count - 1 - i, "mirrored within a share");
    }
    expected = end;
  }
  expect(alone.take(last, 1, 1, &begin, &end) == (threads > 1 && count >= threads), "then the others'");
}

}  // namespace

int main(int argc, char** argv) {
  const int jobs = argc > 1 ? std::atoi(argv[1]) : 20000;
  expect(fastllm::cpu::set_thread_runtime("pool"), "the pool is always there");
  expect(!fastllm::cpu::set_thread_runtime("no such"), "an unknown name is refused");
  expect(!std::strcmp(fastllm::cpu::thread_runtime(), "pool"), "a refused name changes nothing");

  many_jobs(jobs, 1);

  std::vector<std::thread> callers;  // several callers at once: one gets the workers, the others work alone
  for (unsigned i = 0; i < 4; ++i) callers.emplace_back([=] { many_jobs(jobs / 4, i + 2); });
  for (auto& caller : callers) caller.join();

  int64_t inner = 0;  // a job within a job runs where it is
  parallel_for(3, 1, 4, [&](int64_t begin, int64_t) {
    parallel_for(5, 1, 4, [&, begin](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) __atomic_fetch_add(&inner, begin * 10 + i, __ATOMIC_RELAXED);
    });
  });
  expect(inner == 180, "jobs nest");

  for (const int64_t count : {1, 2, 7, 64, 1000}) {
    for (const int threads : {1, 2, 3, 8, 100}) {
      if (threads <= count) shares(count, threads < 64 ? threads : 64);
    }
  }
  expect(fastllm::cpu::round_trip(1e-3) > 0, "a trip takes time");
  std::puts("ok");
}
