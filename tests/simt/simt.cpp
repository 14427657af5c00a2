// The executor: fibers, who runs next, and where they meet.
#include "simt.h"

#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Thread self;

namespace {

// Room for a kernel's registers, all of which the host compiler may keep on the stack, and for the sanitizer's red
// zones.
constexpr size_t kStackBytes = 256 << 10;
constexpr int kBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes;
};

struct Box {
  void* to;
  TensorMap map;
  int at[4];
};

// Of one mbarrier.
struct Phases {
  int arrivals, pending;
  int64_t bytes = 0;
  unsigned number = 0;  // of the phase under way
  std::vector<int> waiting;
  std::vector<Box> boxes;  // under way
};

struct Fiber {
  ucontext_t context;
  Thread who;
  const char* waits_for = nullptr;  // what it met others in; null if it can run
  bool done = false;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  size_t products = 0;                    // that it has started
  std::vector<size_t> product_groups;     // how many it had at each commit
  bool fenced = false;                    // since it last waited for products
  void* fake_stack = nullptr;
};

struct Warp {
  const char* instruction = nullptr;
  Compute compute = nullptr;
  unsigned mask = 0, present = 0;
  void* lanes[32] = {};
};

struct Barrier {
  int threads = 0;
  std::vector<int> waiting;
};

struct Warpgroup {
  std::array<AsyncProduct, 128> arrived;  // at the product that is being started
  AsyncProduct first;
  int present = 0;
  std::vector<std::array<AsyncProduct, 128>> products;
  size_t made = 0;
  bool late = false, new_group = true;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<const uint64_t*, Phases> phases;
  size_t shared_bytes;
  Barrier barriers[kBarriers];
  std::vector<int> ready, lingering;
};

std::mt19937_64 generator{1};
uint64_t next_seed = 1;
std::vector<std::unique_ptr<unsigned char[]>> stacks;
std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
Block* block = nullptr;
int running = 0;  // the fiber's number in its block
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::string failure;  // of a fiber: an exception must not leave its stack

size_t draw(size_t n) { return static_cast<size_t>(generator() % n); }

// AddressSanitizer has to be told which stack comes next. `save` is null for a fiber that does not come back.
void leave_for([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
const void* scheduler_stack = nullptr;
size_t scheduler_bytes = 0;
void arrived([[maybe_unused]] void* saved, [[maybe_unused]] bool from_scheduler) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(saved, &stack, &bytes);
  if (from_scheduler) scheduler_stack = stack, scheduler_bytes = bytes;
#endif
}

void yield() {
  Fiber& fiber = block->fibers[running];
  leave_for(&fiber.fake_stack, scheduler_stack, scheduler_bytes);
  swapcontext(&fiber.context, &scheduler);
  arrived(fiber.fake_stack, true);
  if (!failure.empty()) throw std::runtime_error(failure);  // another fiber failed: unwind this one too
}

void fail(const std::string& text) {
  if (failure.empty()) failure = text;
  throw std::runtime_error(text);
}

void start() {
  arrived(nullptr, true);
  try {
    (*body)();
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
  Fiber& fiber = block->fibers[running];
  fiber.done = true;
  leave_for(nullptr, scheduler_stack, scheduler_bytes);
  swapcontext(&fiber.context, &scheduler);
}

void wake(int fiber) {
  block->fibers[fiber].waits_for = nullptr;
  block->ready.push_back(fiber);
}

// What is asynchronous may take so long that everybody else comes to where they wait.
void linger(const char* what) {
  block->fibers[running].waits_for = what;
  block->lingering.push_back(running);
  yield();
}

std::string name(const Fiber& fiber) {
  std::ostringstream text;
  text << "thread " << fiber.who.thread.x << " of block (" << fiber.who.block.x << ", " << fiber.who.block.y << ", "
       << fiber.who.block.z << ")";
  return text.str();
}

void resume(int fiber) {
  running = fiber;
  self = block->fibers[fiber].who;
  void* fake_stack = nullptr;
  leave_for(&fake_stack, stacks[fiber].get(), kStackBytes);
  swapcontext(&scheduler, &block->fibers[fiber].context);
  arrived(fake_stack, false);
}

void prepare(ucontext_t& context, void* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}

void run_block(dim3 at, dim3 grid, unsigned threads, size_t shared_bytes) {
  Block here;
  block = &here;
  here.fibers.resize(threads);
  here.warps.resize((threads + 31) / 32);
  here.warpgroups.resize((threads + 127) / 128);
  here.shared_bytes = shared_bytes;
  // Of exactly the size asked for, so that an access past its end is one past an allocation. 1024: the largest
  // alignment of a tile.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
  shared.reset(static_cast<unsigned char*>(memory));
  if (shared_bytes > 0) std::memset(shared.get(), 0xff, shared_bytes);
  while (stacks.size() < threads) stacks.emplace_back(new unsigned char[kStackBytes]);
  for (unsigned i = 0; i < threads; ++i) {
    here.fibers[i].who = {dim3(i, 0, 0), at, dim3(threads), grid};
    prepare(here.fibers[i].context, stacks[i].get());
    here.ready.push_back(static_cast<int>(i));
  }
  for (unsigned done = 0; done < threads;) {
    if (here.ready.empty()) {
      for (const int fiber : std::exchange(here.lingering, {})) wake(fiber);
    }
    if (here.ready.empty()) {
      for (int i = 0; i < static_cast<int>(threads) && failure.empty(); ++i) {
        const Fiber& fiber = here.fibers[i];
        if (!fiber.done)
          failure = "deadlock: " + name(fiber) + " waits in " + fiber.waits_for + " for threads that never come";
      }
      for (int i = 0; i < static_cast<int>(threads); ++i) {
        if (!here.fibers[i].done) wake(i);  // to unwind
      }
    }
    const size_t chosen = draw(here.ready.size());
    std::swap(here.ready[chosen], here.ready.back());
    const int fiber = here.ready.back();
    here.ready.pop_back();
    resume(fiber);
    done += here.fibers[fiber].done;
  }
  for (const auto& [_, phases] : here.phases) {
    if (failure.empty() && !phases.boxes.empty()) failure = "a block ends while copies of boxes are under way";
  }
  for (const Warpgroup& group : here.warpgroups) {
    if (failure.empty() && group.made < group.products.size()) failure = "a block ends while products are under way";
  }
  block = nullptr;
}

// ---------------------------------------------------------------- barriers with phases, and boxes

Phases& phases_of(uint64_t* barrier) {
  const auto found = block->phases.find(barrier);
  if (found == block->phases.end()) fail(name(block->fibers[running]) + " uses a barrier that was not initialised");
  return found->second;
}

void end_phase_if_complete(Phases& phases) {
  if (phases.pending > 0 || phases.bytes > 0) return;
  if (phases.bytes < 0) fail("a phase of a barrier gets more bytes than it expects");
  ++phases.number;
  phases.pending = phases.arrivals;
  for (const int fiber : phases.waiting) wake(fiber);
  phases.waiting.clear();
}

int64_t box_bytes(const TensorMap& map) { return int64_t{2} * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

void arrive(const Box& box) {
  const TensorMap& map = box.map;
  const unsigned first = shared_offset(box.to);
  unsigned offset = first;
  const auto inside = [&](int dim, int i) { return box.at[dim] + i >= 0 && box.at[dim] + i < map.sizes[dim]; };
  for (int i3 = 0; i3 < map.box[3]; ++i3) {
    for (int i2 = 0; i2 < map.box[2]; ++i2) {
      for (int i1 = 0; i1 < map.box[1]; ++i1) {
        for (int i0 = 0; i0 < map.box[0]; ++i0, offset += 2) {
          // The 128-byte swizzle: bits 4 to 6 of the address by bits 7 to 9.
          unsigned char* const to = shared_at(offset ^ (offset >> 7 & 7) << 4, 2);
          if (inside(0, i0) && inside(1, i1) && inside(2, i2) && inside(3, i3)) {
            std::memcpy(to,
                        map.address + (box.at[0] + i0) * map.strides[0] + (box.at[1] + i1) * map.strides[1] +
                            (box.at[2] + i2) * map.strides[2] + (box.at[3] + i3) * map.strides[3],
                        2);
          } else {
            std::memset(to, 0, 2);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- products of warpgroups

void make_products(Warpgroup& group, size_t until) {
  for (; group.made < until; ++group.made) {
    const auto& threads = group.products[group.made];
    threads[0].compute(threads.data());
  }
}

void arrive(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid_bytes);
  std::memset(static_cast<char*>(copy.to) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}

}  // namespace

void seed(uint64_t value) { next_seed = value; }

std::map<std::string, Launches>& launches() {
  static std::map<std::string, Launches> known;
  return known;
}

void run(const char* kernel_name, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& kernel) {
  Launches& seen = launches()[kernel_name];
  ++seen.count;
  seen.blocks = std::max(seen.blocks, grid.x * grid.y * grid.z);
  seen.threads = std::max(seen.threads, threads);
  seen.shared_bytes = std::max(seen.shared_bytes, shared_bytes);
  generator.seed(next_seed);
  body = &kernel;
  failure.clear();
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), generator);
  for (const dim3& at : blocks) {
    run_block(at, grid, threads, shared_bytes);
    if (!failure.empty()) throw std::runtime_error(std::string(kernel_name) + ": " + failure);
  }
}

unsigned char* shared_memory() { return shared.get(); }
int lane() { return static_cast<int>(self.thread.x % 32); }

void barrier(int id, int threads) {
  Barrier& here = block->barriers[id];
  if (here.waiting.empty()) here.threads = threads;
  if (here.threads != threads) fail(name(block->fibers[running]) + " comes to a barrier of another number of threads");
  if (static_cast<int>(here.waiting.size()) + 1 == threads) {
    for (const int fiber : here.waiting) wake(fiber);
    here.waiting.clear();
    return;
  }
  here.waiting.push_back(running);
  block->fibers[running].waits_for = "a barrier";
  yield();
}

void meet(unsigned mask, const char* instruction, void* operands, Compute compute) {
  Warp& warp = block->warps[running / 32];
  if (warp.present == 0) {
    warp.instruction = instruction;
    warp.compute = compute;
    warp.mask = mask;
  }
  if (warp.instruction != instruction || warp.mask != mask) {
    fail(name(block->fibers[running]) + " comes to " + instruction + " while lanes of its warp wait in " +
         warp.instruction);
  }
  if (!(mask >> lane() & 1)) fail(name(block->fibers[running]) + " is not in the mask of its own " + instruction);
  warp.lanes[lane()] = operands;
  warp.present |= 1u << lane();
  const int first = running / 32 * 32;
  if (warp.present == warp.mask) {
    compute(warp.lanes, warp.mask);
    const int me = running;
    for (int i = 0; i < 32; ++i) {
      if (warp.mask >> i & 1 && first + i != me) wake(first + i);
    }
    warp.present = 0;
    return;
  }
  block->fibers[running].waits_for = instruction;
  yield();
}

void copy_async(void* to, const void* from, int bytes, int valid_bytes) {
  const Copy copy{to, from, bytes, valid_bytes};
  if (draw(2) == 0) {
    arrive(copy);
  } else {
    std::memset(to, 0xff, bytes);  // what was there is gone from now on
    block->fibers[running].open_group.push_back(copy);
  }
}

void check_alignment(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(name(block->fibers[running]) + " gives an address that is no multiple of " + std::to_string(bytes));
  }
}

void commit_copies() {
  Fiber& fiber = block->fibers[running];
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void wait_for_copies(int groups_left) {
  Fiber& fiber = block->fibers[running];
  while (static_cast<int>(fiber.groups.size()) > groups_left) {
    for (const Copy& copy : fiber.groups.front()) arrive(copy);
    fiber.groups.erase(fiber.groups.begin());
  }
}

unsigned shared_offset(const void* address) {
  const auto offset = static_cast<const unsigned char*>(address) - shared.get();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(block->shared_bytes)) {
    fail(name(block->fibers[running]) + " gives an address that is not in shared memory");
  }
  return static_cast<unsigned>(offset);
}

unsigned char* shared_at(unsigned offset, unsigned bytes) {
  if (offset + bytes > block->shared_bytes) fail("an instruction leaves shared memory");
  return shared.get() + offset;
}

void init_phases(uint64_t* barrier, int arrivals) {
  check_alignment(barrier, 8);
  shared_offset(barrier);
  if (!block->phases.emplace(barrier, Phases{arrivals, arrivals, 0, 0, {}, {}}).second) {
    fail("a barrier is initialised twice");
  }
}

void arrive(uint64_t* barrier, int bytes) {
  Phases& phases = phases_of(barrier);
  phases.bytes += bytes;
  --phases.pending;
  if (phases.pending < 0) fail(name(block->fibers[running]) + " is one arrival more than a phase has");
  end_phase_if_complete(phases);
}

void wait_for_phase(uint64_t* barrier, unsigned parity) {
  Phases& phases = phases_of(barrier);
  if (!phases.boxes.empty() && draw(2) == 0) linger("a phase of a barrier");
  while (true) {
    for (const Box& box : std::exchange(phases.boxes, {})) {
      arrive(box);
      phases.bytes -= box_bytes(box.map);
      end_phase_if_complete(phases);
    }
    if (phases.number % 2 != parity) return;
    phases.waiting.push_back(running);
    block->fibers[running].waits_for = "a phase of a barrier";
    yield();
  }
}

void copy_box(void* to, const TensorMap& map, uint64_t* barrier, const int (&at)[4]) {
  check_alignment(to, 128);
  Phases& phases = phases_of(barrier);
  const Box box{to, map, {at[0], at[1], at[2], at[3]}};
  if (draw(2) == 0) {
    arrive(box);
    phases.bytes -= box_bytes(map);
    end_phase_if_complete(phases);
    return;
  }
  std::memset(to, 0xff, box_bytes(map));  // what was there is gone from now on
  phases.boxes.push_back(box);
  for (const int fiber : std::exchange(phases.waiting, {})) wake(fiber);  // whoever waits makes it arrive
}

void start_product(const AsyncProduct& mine) {
  Fiber& fiber = block->fibers[running];
  Warpgroup& group = block->warpgroups[running / 128];
  if (!fiber.fenced) fail(name(fiber) + " starts a product without a fence for its registers");
  if (group.present == 0) group.first = mine;
  if (group.first.instruction != mine.instruction || group.first.a_matrix != mine.a_matrix ||
      group.first.b_matrix != mine.b_matrix || group.first.add != mine.add) {
    fail(name(fiber) + " starts another product than its warpgroup");
  }
  ++fiber.products;
  group.arrived[running % 128] = mine;
  if (++group.present < 128) {
    fiber.waits_for = mine.instruction;
    return yield();
  }
  group.present = 0;
  if (std::exchange(group.new_group, false)) group.late = draw(2) == 0;
  group.products.push_back(group.arrived);
  const int me = running, start = running / 128 * 128;
  if (!group.late) {
    make_products(group, group.products.size());
  } else if (!mine.add) {
    for (const AsyncProduct& thread : group.arrived) std::fill_n(thread.c, thread.columns / 2, NAN);
  }
  for (int i = start; i < start + 128; ++i) {
    if (i != me) wake(i);
  }
}

void fence_registers() { block->fibers[running].fenced = true; }

void commit_products() {
  Fiber& fiber = block->fibers[running];
  fiber.product_groups.push_back(fiber.products);
  block->warpgroups[running / 128].new_group = true;
}

void wait_for_products(int groups_left) {
  Fiber& fiber = block->fibers[running];
  fiber.fenced = false;
  const int done = static_cast<int>(fiber.product_groups.size()) - groups_left;
  if (done <= 0) return;
  Warpgroup& group = block->warpgroups[running / 128];
  if (group.made < fiber.product_groups[done - 1]) linger("wgmma.wait_group");
  make_products(group, fiber.product_groups[done - 1]);
}

}  // namespace simt
