// Elementary functions over vf, the same code on every rung.
#pragma once

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// e^x within about 1.5 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r (Cephes' expf), scaled by
// 2^n. Infinities and NaN behave as in C; below -104 the result is 0.
FASTLLM_INLINE vf exp(vf x) {
  // The constant stands first: min and max return their second operand where one is NaN.
  x = min(set1(89.0f), max(set1(-104.0f), x));
  const vf n = round_nearest(x * set1(1.44269504088896341f));
  // ln 2 in two parts; the first has few enough bits that n times it is exact.
  vf r = fnmadd(n, set1(0.693359375f), x);
  r = fnmadd(n, set1(-2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fmadd(p, r, set1(1.3981999507e-3f));
  p = fmadd(p, r, set1(8.3334519073e-3f));
  p = fmadd(p, r, set1(4.1665795894e-2f));
  p = fmadd(p, r, set1(1.6666665459e-1f));
  p = fmadd(p, r, set1(5.0000001201e-1f));
  p = fmadd(p, r * r, r) + set1(1.0f);
  return scale_by_power(p, n);
}

// 1 / (1 + e^-x) within about 2 ulp where that is a normal number, 0 below -89.
//
// As 0.5 / (0.5 + e^-x / 2), because half of the exponential needs no second scaling step: n = round(-x / ln 2) lands
// in the low bits of a float near 1.5 * 2^23, from where 2^(n - 1) is one shift away; it is 0 at n = -126, infinite at
// 129. The sign of x is folded into the constants: r = x + n ln 2 is minus exp()'s r.
FASTLLM_INLINE vf sigmoid(vf x) {
  // The constant stands first: min and max return their second operand where one is NaN.
  x = max(set1(-89.4f), min(set1(87.3f), x));
  const vf shifter = set1(12582912.0f + 126.0f);
  const vf t = fnmadd(x, set1(1.44269504088896341f), shifter);
  const vf n = t - shifter;
  vf r = fmadd(n, set1(0.693359375f), x);
  r = fmadd(n, set1(-2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fmadd(p, r, set1(-1.3981999507e-3f));
  p = fmadd(p, r, set1(8.3334519073e-3f));
  p = fmadd(p, r, set1(-4.1665795894e-2f));
  p = fmadd(p, r, set1(1.6666665459e-1f));
  p = fmadd(p, r, set1(-5.0000001201e-1f));
  p = set1(1.0f) - fmadd(p, r * r, r);
  const vf half = set1(0.5f);
  return half / fmadd(p, low_bits_to_exponent(t), half);
}

// 2^r by polynomials of least relative error, 2^-13.7 for bf16 and 2^-18.5 for f16. r is what a rung's way to whole
// numbers leaves: 0 to 1 on AVX-512, -1/2 to 1/2 below.
FASTLLM_INLINE vf exp2_coarse_of_rest(bf16, vf r) {
  constexpr bool kDown = FASTLLM_ISA_LEVEL >= 2;
  vf p = set1(kDown ? 7.80245215e-2f : 5.51716685e-2f);
  p = fmadd(p, r, set1(kDown ? 2.26067156e-1f : 2.42611125e-1f));
  p = fmadd(p, r, set1(kDown ? 6.95833564e-1f : 6.93260968e-1f));
  return fmadd(p, r, set1(kDown ? 9.99925196e-1f : 9.99928057e-1f));
}
FASTLLM_INLINE vf exp2_coarse_of_rest(f16, vf r) {
  constexpr bool kDown = FASTLLM_ISA_LEVEL >= 2;
  vf p = set1(kDown ? 1.35341678e-2f : 9.57010221e-3f);
  p = fmadd(p, r, set1(kDown ? 5.20114601e-2f : 5.59178591e-2f));
  p = fmadd(p, r, set1(kDown ? 2.41442755e-1f : 2.40247443e-1f));
  p = fmadd(p, r, set1(kDown ? 6.93003833e-1f : 6.93121791e-1f));
  return fmadd(p, r, set1(kDown ? 1.00000262f : 9.99999285e-1f));
}

// 1 / (1 + e^-x) for what is rounded to T afterwards, bf16 or f16: off by a small part of that rounding; 0 below -89.
template <typename T>
FASTLLM_INLINE vf sigmoid_coarse(T, vf x) {
  const vf z = x * set1(-1.44269504088896341f);
#if FASTLLM_ISA_LEVEL >= 2
  const vf power = scale_by_power_below(exp2_coarse_of_rest(T{}, rest_of_below(z)), z);
#else
  // As in sigmoid(): 2^n comes from the low bits, 0 at n = -127 and infinite at n = 128. The constant stands first: min
  // and max return their second operand where one is NaN.
  const vf inside = max(set1(-127.0f), min(set1(128.0f), z)), shifter = set1(12582912.0f + 127.0f);
  const vf t = inside + shifter;
  const vf power = exp2_coarse_of_rest(T{}, inside - (t - shifter)) * low_bits_to_exponent(t);
#endif
  return reciprocal_coarse(T{}, power + set1(1.0f));
}

// 2^x for x <= 127, within about 2 ulp; 0 where x < -126.5, so that 2^-inf is exactly 0. NaN stays NaN.
// x = n + r with |r| <= 1/2, a degree-6 polynomial in r (Cephes' exp2f).
FASTLLM_INLINE vf exp2(vf x) {
  x = max(set1(-127.0f), x);
  const vf n = round_nearest(x), r = x - n;
  vf p = set1(1.535336188319500e-4f);
  p = fmadd(p, r, set1(1.339887440266574e-3f));
  p = fmadd(p, r, set1(9.618437357674640e-3f));
  p = fmadd(p, r, set1(5.550332471162809e-2f));
  p = fmadd(p, r, set1(2.402264791363012e-1f));
  p = fmadd(p, r, set1(6.931472028550421e-1f));
  p = fmadd(p, r, set1(1.0f));
  return p * power_of_two(n);
}

// tanh(x) = E / (E + 2) with E = e^(2x) - 1, small to the last bit where x is: no cancellation at any x.
// With 2x = n ln 2 + r, E = 2^n (e^r - 1) + (2^n - 1).
FASTLLM_INLINE vf tanh(vf x) {
  x = min(set1(10.0f), max(set1(-10.0f), x));  // tanh(10) rounds to 1
  x = x + x;
  const vf n = round_nearest(x * set1(1.44269504088896341f));
  vf r = fnmadd(n, set1(0.693359375f), x);
  r = fnmadd(n, set1(-2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fmadd(p, r, set1(1.3981999507e-3f));
  p = fmadd(p, r, set1(8.3334519073e-3f));
  p = fmadd(p, r, set1(4.1665795894e-2f));
  p = fmadd(p, r, set1(1.6666665459e-1f));
  p = fmadd(p, r, set1(5.0000001201e-1f));
  p = fmadd(p, r * r, r);
  const vf power = power_of_two(n), e = fmadd(power, p, power - set1(1.0f));
  return e / (e + set1(2.0f));
}

}  // namespace
}  // namespace fastllm::cpu::FASTLLM_ISA
