// The honest twin: one lane, no intrinsics, any machine.
#pragma once

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kWidth = 1;

struct vf {
  float v;
};
struct pair {
  vf first, second;
};

FASTLLM_INLINE float float_from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
FASTLLM_INLINE uint32_t bits_from_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

FASTLLM_INLINE float to_float(float x) { return x; }
FASTLLM_INLINE float to_float(bf16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTLLM_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31,
                 mantissa = x.bits & 0x3ff;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return float_from_bits(sign | bits_from_float(magnitude));
  }
  return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

FASTLLM_INLINE float to_float(int8_t x) { return static_cast<float>(x); }

FASTLLM_INLINE void from_float(float x, float& out) { out = x; }
FASTLLM_INLINE void from_float(float x, bf16& out) {
  const uint32_t bits = bits_from_float(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits =
      nan ? static_cast<uint16_t>(bits >> 16 | 0x40) : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FASTLLM_INLINE void from_float(float x, f16& out) {
  const uint32_t bits = bits_from_float(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = sign | 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    out.bits = sign | 0x7c00;  // rounds to 2^16 or more: infinity
  } else if (magnitude < 0x38800000) {
    // Subnormal in f16: adding 0.5 makes the float adder itself round to a multiple of 2^-24.
    out.bits = sign | static_cast<uint16_t>(bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000);
  } else {
    const uint32_t odd = magnitude >> 13 & 1;
    out.bits = sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + odd) >> 13);
  }
}
// For |x| <= 127: to the nearest, ties to even.
FASTLLM_INLINE void from_float(float x, int8_t& out) {
  const volatile float shifted = x + 12582912.0f;  // volatile: the subtraction must not be folded away
  out = static_cast<int8_t>(shifted - 12582912.0f);
}

template <typename T>
FASTLLM_INLINE vf load(const T* p) {
  return {to_float(*p)};
}
template <typename T>
FASTLLM_INLINE vf load_n(const T* p, int64_t n) {
  return {n > 0 ? to_float(*p) : 0.0f};
}
template <typename T>
FASTLLM_INLINE void store(T* p, vf a) {
  from_float(a.v, *p);
}
template <typename T>
FASTLLM_INLINE void store_n(T* p, vf a, int64_t n) {
  if (n > 0) from_float(a.v, *p);
}

// Four vectors, one after the other.
FASTLLM_INLINE void store4(int8_t* p, vf a, vf b, vf c, vf d) {
  store(p, a);
  store(p + 1, b);
  store(p + 2, c);
  store(p + 3, d);
}

template <typename T>
FASTLLM_INLINE vf round_clean(T narrow, vf a) {
  from_float(a.v, narrow);
  return {to_float(narrow)};
}

FASTLLM_INLINE vf set1(float x) { return {x}; }
FASTLLM_INLINE vf zero() { return {0.0f}; }
FASTLLM_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
FASTLLM_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
FASTLLM_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
FASTLLM_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
FASTLLM_INLINE vf fmadd(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
FASTLLM_INLINE vf fnmadd(vf a, vf b, vf c) { return {c.v - a.v * b.v}; }
FASTLLM_INLINE vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
FASTLLM_INLINE vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
// The bits of magnitudes order like their values.
FASTLLM_INLINE vf max_magnitude(vf a, vf b) {
  const uint32_t bits = bits_from_float(a.v) & 0x7fffffff;
  return bits > bits_from_float(b.v) ? vf{float_from_bits(bits)} : b;
}
FASTLLM_INLINE float reduce_max_magnitude(vf a) { return a.v; }
FASTLLM_INLINE float reduce_add(vf a) { return a.v; }
// The four sums, one after the other.
FASTLLM_INLINE void reduce_add4(vf a, vf b, vf c, vf d, float* sums) {
  sums[0] = a.v;
  sums[1] = b.v;
  sums[2] = c.v;
  sums[3] = d.v;
}
FASTLLM_INLINE void reduce_add16(const vf* a, float* sums, int64_t apart) {
  for (int i = 0; i < 4; ++i) reduce_add4(a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], sums + i * apart);
}
FASTLLM_INLINE float reduce_max(vf a) { return a.v; }

// To the nearest integer, ties to even, for |a| < 2^22.
FASTLLM_INLINE vf round_nearest(vf a) {
  const volatile float shifted = a.v + 12582912.0f;  // volatile: the subtraction must not be folded away
  return {shifted - 12582912.0f};
}
// a * 2^n for integral n in [-252, 252]; two steps, so that results may be subnormal or infinite.
FASTLLM_INLINE vf scale_by_power(vf a, vf n) {
  const int whole = static_cast<int>(n.v), half = whole >> 1;
  return {a.v * float_from_bits(static_cast<uint32_t>(half + 127) << 23) *
          float_from_bits(static_cast<uint32_t>(whole - half + 127) << 23)};
}
// The lowest nine bits of a, as the sign and exponent of a float without mantissa.
FASTLLM_INLINE vf low_bits_to_exponent(vf a) { return {float_from_bits(bits_from_float(a.v) << 23)}; }
template <typename T>
FASTLLM_INLINE vf reciprocal_coarse(T, vf a) {
  return {1.0f / a.v};
}
// 2^n for integral n in [-127, 127], and 0 for -127.
FASTLLM_INLINE vf power_of_two(vf n) {
  if (n.v != n.v) return n;
  return {float_from_bits(static_cast<uint32_t>(static_cast<int>(n.v) + 127) << 23)};
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
