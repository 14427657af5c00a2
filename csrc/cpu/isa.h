// The rungs of the instruction-set ladder, and how an op's kernels are found on it.
//
// An op's source file is compiled once a rung, each time into a namespace of the rung's name; everything else in the
// file has internal linkage, so that the linker can never keep one rung's copy of a function for another.
// `FASTLLM_KERNEL(rms_norm, RmsNormArgs, avx512)` in the op's header declares the entries and builds the table;
// setup.py reads the same line and compiles the source for every rung up to the one named.
#pragma once

#include <cstdint>

namespace fastllm::cpu {

enum class Isa : int { scalar, avx2, avx512, avx512_vnni, avx512_bf16 };
inline constexpr int kNumIsa = 5;
inline constexpr const char* kIsaNames[kNumIsa] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

// The highest rung that the processor has and the operating system has enabled (cpuid and XCR0).
Isa detect_isa();
// The rung in use: detect_isa(), or lower if set_active_isa() said so.
Isa active_isa();
void set_active_isa(Isa isa);  // the caller checks that it is not above detect_isa()

// Whether dot products of bf16 do twice the multiply-adds of fp32 in a second. Intel's processors do half as many.
bool fast_bf16_dots();

// Whether a result's rows should be stored past the caches: they are whole lines, and the call moves so many bytes,
// read and written, that its last level would have lost the result before someone reads it. Memory is then spared
// reading what is written over.
bool past_caches(const void* y, int64_t row_bytes, int64_t moved);
// From how many bytes on, the last level's size by default; returns what it was. For tests.
int64_t set_past_caches(int64_t bytes);

template <typename Args>
struct KernelTable {
  void (*entries[kNumIsa])(const Args&);

  // Not every op gains from every rung: the nearest filled one at or below the active rung serves.
  Isa rung() const {
    int i = static_cast<int>(active_isa());
    while (entries[i] == nullptr) --i;
    return static_cast<Isa>(i);
  }
  void operator()(const Args& args) const { entries[static_cast<int>(rung())](args); }
};

}  // namespace fastllm::cpu

#define FASTLLM_DECLARE_IN(rung, name, Args) \
  namespace rung {                           \
  void name(const Args&);                    \
  }

#define FASTLLM_TABLE_scalar(name) {scalar::name, nullptr, nullptr, nullptr, nullptr}
#if defined(__x86_64__) || defined(_M_X64)
#define FASTLLM_TABLE_avx2(name) {scalar::name, avx2::name, nullptr, nullptr, nullptr}
#define FASTLLM_TABLE_avx512(name) {scalar::name, avx2::name, avx512::name, nullptr, nullptr}
#define FASTLLM_TABLE_avx512_vnni(name) {scalar::name, avx2::name, avx512::name, avx512_vnni::name, nullptr}
#define FASTLLM_TABLE_avx512_bf16(name) {scalar::name, avx2::name, avx512::name, avx512_vnni::name, avx512_bf16::name}
#else
#define FASTLLM_TABLE_avx2(name) FASTLLM_TABLE_scalar(name)
#define FASTLLM_TABLE_avx512(name) FASTLLM_TABLE_scalar(name)
#define FASTLLM_TABLE_avx512_vnni(name) FASTLLM_TABLE_scalar(name)
#define FASTLLM_TABLE_avx512_bf16(name) FASTLLM_TABLE_scalar(name)
#endif

#define FASTLLM_KERNEL(name, Args, highest_rung) \
  FASTLLM_DECLARE_IN(scalar, name, Args)         \
  FASTLLM_DECLARE_IN(avx2, name, Args)           \
  FASTLLM_DECLARE_IN(avx512, name, Args)         \
  FASTLLM_DECLARE_IN(avx512_vnni, name, Args)    \
  FASTLLM_DECLARE_IN(avx512_bf16, name, Args)    \
  inline constexpr KernelTable<Args> name##_kernel = {FASTLLM_TABLE_##highest_rung(name)};
