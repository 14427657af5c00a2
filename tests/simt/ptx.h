// The executor's bodies of csrc/cuda/ptx.cuh: what the PTX ISA says of each instruction, computed lane by lane.
#pragma once

#include <stdexcept>

#include "simt.h"

namespace fastllm::cuda::ptx {

// ---------------------------------------------------------------- numbers

inline float f32_of_bf16(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

inline uint16_t bf16_of_f32(double exact) {
  // From double, so that the fused products below round once: a bf16 is the float of its upper half, and a float that
  // has been rounded to odd keeps what a second rounding has to know.
  float x = static_cast<float>(exact);
  if (std::isnan(x)) return 0x7fff;
  unsigned bits = __float_as_uint(x);
  if (static_cast<double>(x) != exact && std::isfinite(x)) {
    if (std::fabs(static_cast<double>(x)) > std::fabs(exact)) --bits;  // truncate
    bits |= 1;
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f32_of_f16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

inline uint16_t f16_of_f32(double exact) {
  const auto x = static_cast<_Float16>(exact);
  if (std::isnan(exact)) return 0x7fff;
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}

inline unsigned pair(uint16_t low, uint16_t high) { return low | static_cast<unsigned>(high) << 16; }
inline uint16_t low(unsigned x) { return static_cast<uint16_t>(x); }
inline uint16_t high(unsigned x) { return static_cast<uint16_t>(x >> 16); }

inline unsigned bf16x2_of_f32(float low, float high) { return pair(bf16_of_f32(low), bf16_of_f32(high)); }
inline unsigned f16x2_of_f32(float low, float high) { return pair(f16_of_f32(low), f16_of_f32(high)); }

// A product of halves is exact in double, and so is its sum with another unless they are 2^30 apart, where one rounding
// more changes nothing.
inline unsigned f16x2_fma(unsigned a, unsigned b, unsigned c) {
  const auto one = [](uint16_t x, uint16_t y, uint16_t z) {
    return f16_of_f32(static_cast<double>(f32_of_f16(x)) * f32_of_f16(y) + f32_of_f16(z));
  };
  return pair(one(low(a), low(b), low(c)), one(high(a), high(b), high(c)));
}
inline unsigned f16x2_sub(unsigned a, unsigned b) {
  return pair(f16_of_f32(f32_of_f16(low(a)) - f32_of_f16(low(b))),
              f16_of_f32(f32_of_f16(high(a)) - f32_of_f16(high(b))));
}
inline unsigned bf16x2_fma(unsigned a, unsigned b, unsigned c) {
  const auto one = [](uint16_t x, uint16_t y, uint16_t z) {
    return bf16_of_f32(static_cast<double>(f32_of_bf16(x)) * f32_of_bf16(y) + f32_of_bf16(z));
  };
  return pair(one(low(a), low(b), low(c)), one(high(a), high(b), high(c)));
}

template <int kTable>
inline unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const unsigned index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    result |= (static_cast<unsigned>(kTable) >> index & 1) << bit;
  }
  return result;
}

inline int byte(unsigned x, int i) { return static_cast<int8_t>(x >> 8 * i); }

inline float without_denormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2(float x) { return without_denormals(std::exp2(x)); }
inline float reciprocal(float x) { return without_denormals(1.0f / x); }

inline float largest(float a, float b) { return a >= b || std::isnan(a) ? a : b; }

inline void make_opaque(unsigned&) {}

// ---------------------------------------------------------------- memory

inline void copy_async_16(void* to, const void* from, int valid_bytes = 16) {
  simt::check_alignment(to, 16);
  if (valid_bytes > 0) simt::check_alignment(from, 16);
  simt::copy_async(to, from, 16, valid_bytes);
}
inline void copy_async_4(void* to, const void* from, int valid_bytes = 4) {
  simt::check_alignment(to, 4);
  simt::copy_async(to, from, 4, valid_bytes);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kGroupsLeft>
inline void wait_for_copies() {
  simt::wait_for_copies(kGroupsLeft);
}
inline void barrier(int id, int threads) { simt::barrier(id, threads); }

// ---------------------------------------------------------------- matrices

struct MatrixRow {
  const void* row;
  unsigned to[4];
};

template <bool kTransposed>
inline void load_matrices_in_order(unsigned (&to)[4], const void* row) {
  simt::check_alignment(row, 16);
  MatrixRow mine{row, {}};
  simt::meet(0xffffffffu, kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](void* const lanes[32], unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[2];
        for (int e = 0; e < 2; ++e) {
          const int major = lane / 4, minor = lane % 4 * 2 + e;
          const int at = kTransposed ? minor : major;
          const auto* from = static_cast<const uint16_t*>(static_cast<MatrixRow*>(lanes[matrix * 8 + at])->row);
          element[e] = from[kTransposed ? major : minor];
        }
        static_cast<MatrixRow*>(lanes[lane])->to[matrix] = pair(element[0], element[1]);
      }
    }
  });
  for (int i = 0; i < 4; ++i) to[i] = mine.to[i];
}
inline void load_matrices(unsigned (&to)[4], const void* row) { load_matrices_in_order<false>(to, row); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { load_matrices_in_order<true>(to, row); }

template <typename C>
struct MatrixProduct {
  C* c;
  const unsigned* a;
  unsigned b[2];
};

// kPerRegister elements of one register lie side by side along k.
template <int kPerRegister, typename C, typename Element>
inline void multiply(void* const lanes[32], Element element) {
  constexpr int kDepth = 8 * kPerRegister;
  static thread_local C a[16][kDepth], b[kDepth][8];
  const auto of = [&](int lane) { return static_cast<MatrixProduct<C>*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, k = lane % 4 * kPerRegister;
    for (int e = 0; e < kPerRegister; ++e) {
      for (int half = 0; half < 2; ++half) {
        const int at = k + e + half * 4 * kPerRegister;
        a[group][at] = element(of(lane)->a[2 * half], e);
        a[group + 8][at] = element(of(lane)->a[2 * half + 1], e);
        b[at][group] = element(of(lane)->b[half], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      C sum = of(lane)->c[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      of(lane)->c[i] = sum;
    }
  }
}

inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  MatrixProduct<float> mine{c, a, {b0, b1}};
  simt::meet(0xffffffffu, "mma bf16", &mine, [](void* const lanes[32], unsigned) {
    multiply<2, float>(lanes, [](unsigned x, int e) { return f32_of_bf16(e ? high(x) : low(x)); });
  });
}
inline void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  MatrixProduct<float> mine{c, a, {b0, b1}};
  simt::meet(0xffffffffu, "mma f16", &mine, [](void* const lanes[32], unsigned) {
    multiply<2, float>(lanes, [](unsigned x, int e) { return f32_of_f16(e ? high(x) : low(x)); });
  });
}
inline void mma_s8(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  MatrixProduct<int> mine{c, a, {b0, b1}};
  simt::meet(0xffffffffu, "mma s8", &mine, [](void* const lanes[32], unsigned) {
    multiply<4, int>(lanes, [](unsigned x, int e) { return byte(x, e); });
  });
}

// ---------------------------------------------------------------- Hopper

inline unsigned shared_address(const void* pointer) { return simt::shared_offset(pointer); }

inline void init_barrier(uint64_t* barrier, int arrivals) { simt::init_phases(barrier, arrivals); }
inline void fence_async_proxy() {}
inline void arrive(uint64_t* barrier) { simt::arrive(barrier, 0); }
inline void arrive_expecting(uint64_t* barrier, int bytes) { simt::arrive(barrier, bytes); }
inline void wait_for_phase(uint64_t* barrier, unsigned parity) { simt::wait_for_phase(barrier, parity); }
inline void copy_box(void* to, const void* tensor_map, uint64_t* barrier, int x0, int x1, int x2, int x3) {
  simt::copy_box(to, *static_cast<const simt::TensorMap*>(tensor_map), barrier, {x0, x1, x2, x3});
}

template <int kRegisters>
inline void give_up_registers() {}
template <int kRegisters>
inline void take_registers() {}

inline void fence_registers() { simt::fence_registers(); }
inline void commit_products() { simt::commit_products(); }
template <int kGroupsLeft, int kColumns>
inline void wait_for_products(float (&)[kColumns][4]) {
  simt::wait_for_products(kGroupsLeft);
}

// An element of a matrix that a descriptor describes, in 16-bit elements with the 128-byte swizzle: `outer` counts rows
// of a K-major matrix, or the columns of an N-major one; `k` the other direction. 9.7.15.5.1.2, the canonical layouts
// ((8, m), (T, 2 k)) : ((8 T, SBO), (1, T)) and ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)) with T = 8.
template <bool kTransposed>
inline uint16_t described_element(uint64_t matrix, int outer, int k) {
  const auto field = [&](int bit) { return static_cast<unsigned>(matrix >> bit & 0x3fff) << 4; };
  const unsigned start = field(0), leading = field(16), stride = field(32);
  unsigned offset;
  if (kTransposed) {
    offset = outer % 64 * 2 + outer / 64 * leading + k % 8 * 128 + k / 8 * stride;
  } else {
    offset = outer % 8 * 128 + outer / 8 * stride + k * 2;
  }
  const unsigned at = start + offset;  // of the address, not of the offset, the swizzle takes its bits
  uint16_t element;
  std::memcpy(&element, simt::shared_at(at ^ (at >> 7 & 7) << 4, 2), 2);
  return element;
}

template <float (*kWiden)(uint16_t), bool kTransposed>
inline void make_product(const simt::AsyncProduct* threads) {
  const simt::AsyncProduct& first = threads[0];
  static float a[64][16], b[16][256];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < first.columns; ++n) b[k][n] = kWiden(described_element<kTransposed>(first.b_matrix, n, k));
    for (int m = 0; m < 64; ++m) {
      if (first.a == nullptr) {
        a[m][k] = kWiden(described_element<false>(first.a_matrix, m, k));
      } else {  // as mma's: register k / 8 * 2 + (row / 8 of the warp's 16)
        const int row = m % 16, lane = row % 8 * 4 + k % 8 / 2;
        const unsigned two = threads[m / 16 * 32 + lane].a[k / 8 * 2 + row / 8];
        a[m][k] = kWiden(k % 2 ? high(two) : low(two));
      }
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    const int lane = thread % 32;
    for (int i = 0; i < first.columns / 2; ++i) {
      const int m = thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = first.add ? threads[thread].c[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
      threads[thread].c[i] = sum;
    }
  }
}

inline void check_matrix(uint64_t matrix) {
  if (matrix >> 62 != 1) throw std::runtime_error("wgmma: the executor knows matrices with the 128-byte swizzle only");
}

template <float (*kWiden)(uint16_t)>
inline void start_tiles(const char* name, float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
  check_matrix(a);
  check_matrix(b);
  simt::start_product({name, make_product<kWiden, false>, c[0], nullptr, a, b, 128, add});
}
inline void multiply_tiles_bf16(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
  start_tiles<f32_of_bf16>("wgmma bf16 of tiles", c, a, b, add);
}
inline void multiply_tiles_f16(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
  start_tiles<f32_of_f16>("wgmma f16 of tiles", c, a, b, add);
}

template <float (*kWiden)(uint16_t), int kColumns>
inline void start_weights(const char* name, float (&c)[kColumns][4], const unsigned (&a)[4], uint64_t b) {
  check_matrix(b);
  simt::start_product({name, make_product<kWiden, true>, c[0], a, 0, b, 8 * kColumns, true});
}
template <int kColumns>
inline void multiply_weights_bf16(float (&c)[kColumns][4], const unsigned (&a)[4], uint64_t b) {
  start_weights<f32_of_bf16>("wgmma bf16 of weights", c, a, b);
}
template <int kColumns>
inline void multiply_weights_f16(float (&c)[kColumns][4], const unsigned (&a)[4], uint64_t b) {
  start_weights<f32_of_f16>("wgmma f16 of weights", c, a, b);
}

}  // namespace fastllm::cuda::ptx
