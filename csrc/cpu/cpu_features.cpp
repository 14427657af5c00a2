// Which rung can this machine run? Compiled at the baseline: nothing here may need the answer.
#include <atomic>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastllm::cpu {

#if defined(__x86_64__)
namespace {

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{0, 0, 0, 0};
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// "AuthenticAMD"
bool by_amd(const Registers& zero) {
  return zero.ebx == 0x68747541 && zero.edx == 0x69746e65 && zero.ecx == 0x444d4163;
}

// Bytes of the last level that this core shares with others: sysconf() adds up all cores'.
int64_t last_level() {
  const uint32_t leaf = by_amd(cpuid(0, 0)) ? 0x8000001d : 4;
  int64_t size = 0;
  for (uint32_t index = 0; index < 8; ++index) {
    const Registers r = cpuid(leaf, index);
    if ((r.eax & 31) == 0) break;
    const int64_t lines = ((r.ebx >> 22) + 1) * (((r.ebx >> 12) & 1023) + 1), bytes = (r.ebx & 4095) + 1;
    size = lines * bytes * (static_cast<int64_t>(r.ecx) + 1);
  }
  return size;
}

}  // namespace
#else
namespace {
int64_t last_level() { return 0; }
}  // namespace
#endif

#if defined(FASTLLM_EMULATED)
// The tests' build, whose AVX-512 rungs are SIMDe's (tests/native/simde_avx512): every rung runs on any machine with
// AVX2.
Isa detect_isa() { return Isa::avx512_bf16; }
bool fast_bf16_dots() { return true; }
#elif defined(__x86_64__)
namespace {

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// XCR0 says which register files the operating system saves on a context switch. A processor may have AVX-512 while the
// system does not save its state; using it then traps.
uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

}  // namespace

Isa detect_isa() {
  static const Isa detected = [] {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    const bool osxsave = bit(one.ecx, 27);
    if (!osxsave) return Isa::scalar;
    const uint64_t states = enabled_states();
    const bool ymm = (states & 0x6) == 0x6;    // SSE and AVX state
    const bool zmm = (states & 0xe6) == 0xe6;  // and opmask, upper halves, upper sixteen
    const bool fma = bit(one.ecx, 12), f16c = bit(one.ecx, 29), avx2 = bit(seven.ebx, 5);
    if (!(ymm && fma && f16c && avx2)) return Isa::scalar;
    const bool f = bit(seven.ebx, 16), dq = bit(seven.ebx, 17), bw = bit(seven.ebx, 30), vl = bit(seven.ebx, 31);
    if (!(zmm && f && dq && bw && vl)) return Isa::avx2;
    const bool vnni = bit(seven.ecx, 11), bf16 = bit(seven_one.eax, 5);
    if (!vnni) return Isa::avx512;
    return bf16 ? Isa::avx512_bf16 : Isa::avx512_vnni;
  }();
  return detected;
}

bool fast_bf16_dots() {
  static const bool amd = by_amd(cpuid(0, 0));
  return amd;
}
#else
Isa detect_isa() { return Isa::scalar; }
bool fast_bf16_dots() { return false; }
#endif

namespace {
std::atomic<int> active{-1};

std::atomic<int64_t>& past_caches_from() {
  static std::atomic<int64_t> bytes{[] {
    const int64_t found = last_level();
    return found > 0 ? found : int64_t{32} << 20;
  }()};
  return bytes;
}
}  // namespace

Isa active_isa() {
  const int isa = active.load(std::memory_order_relaxed);
  return isa < 0 ? detect_isa() : static_cast<Isa>(isa);
}

bool past_caches(const void* y, int64_t row_bytes, int64_t moved) {
  constexpr int64_t kLine = 64;
  return (static_cast<int64_t>(reinterpret_cast<uintptr_t>(y)) | row_bytes) % kLine == 0 &&
         moved > past_caches_from().load(std::memory_order_relaxed);
}

int64_t set_past_caches(int64_t bytes) { return past_caches_from().exchange(bytes, std::memory_order_relaxed); }

void set_active_isa(Isa isa) { active.store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace fastllm::cpu
