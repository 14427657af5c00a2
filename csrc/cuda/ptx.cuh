// Every asm statement of the package, by a name of its own. tests/simt/ptx.h has the same names for the executor.
// Sections are those of the PTX ISA, version 8.5.
#pragma once

#ifdef FASTLLM_SIMT

#include "simt.h"
//
#include "ptx.h"

#else

#include <cuda_runtime.h>

#include <cstdint>

namespace fastllm::cuda::ptx {

// The 32-bit address that instructions on shared memory take. 9.7.9.21, cvta.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------- numbers

// Two floats, rounded to the nearest even, as a register of two bf16: one instruction in place of two and a shift.
// 9.7.9.22, cvt.rn.bf16x2.f32.
__device__ __forceinline__ unsigned bf16x2_of_f32(float low, float high) {
  unsigned result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// The same to fp16. 9.7.9.22, cvt.rn.f16x2.f32.
__device__ __forceinline__ unsigned f16x2_of_f32(float low, float high) {
  unsigned result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// An fp16 by its bits, without CUDA's header for the type. 9.7.9.22, cvt.f32.f16.
__device__ __forceinline__ float f32_of_f16(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

// Products and sums of two halves at once, each rounded once: weights become operands without passing through fp32.
// 9.7.4.5, fma.rn.f16x2; 9.7.4.2, sub.rn.f16x2.
__device__ __forceinline__ unsigned f16x2_fma(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
__device__ __forceinline__ unsigned f16x2_sub(unsigned a, unsigned b) {
  unsigned result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// The same for bf16. 9.7.4.5, fma.rn.bf16x2.
__device__ __forceinline__ unsigned bf16x2_fma(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Any function of three bits, on 32 at once: "take nibbles and put an exponent over them" is one instruction. The table
// is the function's value for a = 0xf0, b = 0xcc, c = 0xaa. 9.7.8.6, lop3.b32.
template <int kTable>
__device__ __forceinline__ unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
}

// 2^x to two roundings, as exp2f, in one instruction where that takes four: a result below 2^-126 is 0.
// 9.7.3.21, ex2.approx.ftz.f32.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x to one rounding; 0 for an x above 2^126. 9.7.3.14, rcp.approx.ftz.f32.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger of two, NaN where one is NaN. 9.7.3.12, max.NaN.f32.
__device__ __forceinline__ float largest(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// No instruction: from here on the compiler takes the register for a new value, and does not keep in further registers
// what it had made of the old one.
__device__ __forceinline__ void make_opaque(unsigned& x) { asm volatile("" : "+r"(x)); }

// ---------------------------------------------------------------- memory

// 16 bytes from global to shared memory without a register, of which the first valid_bytes are read and the rest are 0.
// 9.7.9.25.3, cp.async.cg.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(valid_bytes)
               : "memory");
}

// The same for 4 bytes: one scale of each token of a page. 9.7.9.25.3, cp.async.ca.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, int valid_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(valid_bytes)
               : "memory");
}

// Closes this thread's group of copies. 9.7.9.25.3, cp.async.commit_group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroupsLeft of this thread's newest groups are under way; other threads' copies need a barrier as
// well. 9.7.9.25.3, cp.async.wait_group.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// A barrier of some of the block's warps. 9.7.13.1, bar.sync.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---------------------------------------------------------------- matrices

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 (l
// % 4) and 2 (l % 4) + 1 of row l / 4 of each. 9.7.14.5.15, ldmatrix.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: lane l gets elements of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8) in bf16, sums in fp32. With g = lane / 4 and i = 2 (lane % 4): a holds (g, i),
// (g + 8, i), (g, i + 8), (g + 8, i + 8) and each one's right neighbour; b rows i, i + 1 and i + 8, i + 9 of column g;
// c (g, i), (g, i + 1), (g + 8, i), (g + 8, i + 1). 9.7.14.5.8, mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same in fp16.
__device__ __forceinline__ void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 32) b (32 x 8) in signed bytes, exact in int32. A register holds four neighbours along k: a
// rows g and g + 8 at k = 4 (lane % 4) and 16 more; b the same k of column g. 9.7.14.5.10, mma.m16n8k32.
__device__ __forceinline__ void mma_s8(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------- Hopper: barriers and copies of whole tiles

// How many threads arrive before a phase ends. 9.7.13.15.9, mbarrier.init.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// This thread's own writes to shared memory, barriers included, come before what the copy engine and the tensor cores
// do there after the next barrier of threads: without it those may not see them. 9.7.13.4, fence.proxy.async.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One of the arrivals that a phase waits for. 9.7.13.15.13, mbarrier.arrive.
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The same, and the phase waits for that many bytes of copies as well. 9.7.13.15.13, mbarrier.arrive.expect_tx.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of that parity has ended: the first phase's is 0, and the one before the first has. try_wait
// suspends the thread for a while, so that the loop takes few issue slots. 9.7.13.15.16, mbarrier.try_wait.
__device__ __forceinline__ void wait_for_phase(uint64_t* barrier, unsigned parity) {
  unsigned ended = 0;
  while (ended == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
}

// A box of a tensor of four dims into shared memory by the copy engine, zeros where it leaves the tensor; its bytes
// count on the barrier. Coordinates are those of the first element, innermost first. 9.7.9.25.5.2,
// cp.async.bulk.tensor.4d.
__device__ __forceinline__ void copy_box(void* to, const void* tensor_map, uint64_t* barrier, int x0, int x1, int x2,
                                         int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(tensor_map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// ---------------------------------------------------------------- Hopper: matrices of a warpgroup

// The compiler gives each thread of a kernel the same number of registers; a warpgroup that copies has no use for them,
// one that multiplies has. 9.7.19.5, setmaxnreg.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What this thread did to registers comes before the wgmma that follow and use them. 9.7.15.7.1, wgmma.fence.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes this warp's group of wgmma. 9.7.15.7.2, wgmma.commit_group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kGroupsLeft of this warp's newest groups are under way. The sums of those that are done are
// given, so that the compiler can't read them earlier. 9.7.15.7.3, wgmma.wait_group.
template <int kGroupsLeft, int kColumns>
__device__ __forceinline__ void wait_for_products(float (&c)[kColumns][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[j][e])::"memory");
  }
}

// c (64 x N) = or += a (64 x 16) b (16 x N) by a warpgroup, asynchronously; its warp w has rows 16 w .. 16 w + 15, as
// mma would lay them out: c[j] is columns 8 j .. 8 j + 7. 9.7.15.5.2, wgmma.mma_async.
//
// multiply_tiles: a and b from shared memory, by descriptor, both with k as their inner dim; c is new if !add.
// multiply_weights: a from registers, as mma's; b with n as its inner dim (the last 1); += always.
#define FASTLLM_SUMS_8(c, j)                                                                                           \
  "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3]), "+f"(c[j + 1][0]), "+f"(c[j + 1][1]), "+f"(c[j + 1][2]), \
      "+f"(c[j + 1][3])
#define FASTLLM_SUMS_32(c, j) \
  FASTLLM_SUMS_8(c, j), FASTLLM_SUMS_8(c, j + 2), FASTLLM_SUMS_8(c, j + 4), FASTLLM_SUMS_8(c, j + 6)
#define FASTLLM_NAMES_32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLLM_NAMES_64                                                                                             \
  FASTLLM_NAMES_32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, "                                                                                                            \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63"

#define FASTLLM_MULTIPLY(type)                                                                                     \
  __device__ __forceinline__ void multiply_tiles_##type(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {     \
    asm volatile(                                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.s32 p, %66, 0;\n"                                                               \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." #type "." #type " {" FASTLLM_NAMES_64                       \
        "}, %64, %65, p, 1, 1, 0, 0;\n\t}"                                                                         \
        : FASTLLM_SUMS_32(c, 0), FASTLLM_SUMS_32(c, 8)                                                             \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                             \
  }                                                                                                                \
  __device__ __forceinline__ void multiply_weights_##type(float (&c)[8][4], const unsigned (&a)[4], uint64_t b) {  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." #type "." #type " {" FASTLLM_NAMES_32               \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                       \
                 : FASTLLM_SUMS_32(c, 0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }                                                                                                                \
  __device__ __forceinline__ void multiply_weights_##type(float (&c)[16][4], const unsigned (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." #type "." #type " {" FASTLLM_NAMES_64              \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                       \
                 : FASTLLM_SUMS_32(c, 0), FASTLLM_SUMS_32(c, 8)                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }
FASTLLM_MULTIPLY(bf16)
FASTLLM_MULTIPLY(f16)
#undef FASTLLM_MULTIPLY
#undef FASTLLM_NAMES_64
#undef FASTLLM_NAMES_32
#undef FASTLLM_SUMS_32
#undef FASTLLM_SUMS_8

}  // namespace fastllm::cuda::ptx

#endif
