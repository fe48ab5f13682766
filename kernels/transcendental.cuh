// transcendental.cuh - exp and log from IEEE operations alone, so that a GPU, another GPU and the emulator give the same bits.
//
// The vendor's exp and log are as accurate but promise no bits, and a drawn id must not depend on the toolkit that built the kernel.
#pragma once
#include "hopper.cuh"

namespace transcendental {
constexpr double LN2_HIGH = 0x1.62e42fee00000p-1;  // 32 bits, so that k * LN2_HIGH is exact
constexpr double LN2_LOW = 0x1.a39ef35793c76p-33;
constexpr double LOG2_E = 0x1.71547652b82fep0;

HW double power_of_two(int exponent) { return hw::from_bits<double>((hw::u64)(exponent + 1023) << 52); }

// e^x for -700 <= x <= 700; 0 below (also for -infinity). Error below 1 ulp: x = k ln 2 + r, and 13 terms of the series in |r| <= 0.347 leave 4e-18.
HW double exp_f64(double x) {
  if (!(x >= -700.0)) return x != x ? x : 0.0;
  const double k = rint(x * LOG2_E);
  const double r = fma(-k, LN2_LOW, fma(-k, LN2_HIGH, x));
  double sum = 1.0 / 6227020800.0;
  sum = fma(sum, r, 1.0 / 479001600.0);
  sum = fma(sum, r, 1.0 / 39916800.0);
  sum = fma(sum, r, 1.0 / 3628800.0);
  sum = fma(sum, r, 1.0 / 362880.0);
  sum = fma(sum, r, 1.0 / 40320.0);
  sum = fma(sum, r, 1.0 / 5040.0);
  sum = fma(sum, r, 1.0 / 720.0);
  sum = fma(sum, r, 1.0 / 120.0);
  sum = fma(sum, r, 1.0 / 24.0);
  sum = fma(sum, r, 1.0 / 6.0);
  sum = fma(sum, r, 0.5);
  sum = fma(sum, r, 1.0);
  sum = fma(sum, r, 1.0);
  return sum * power_of_two((int)k);
}

// Natural logarithm of a positive normal number. Error below 1 ulp: x = 2^k (1 + f), s = f / (2 + f), and
// log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + R)), R = 2 (s^2 / 3 + s^4 / 5 + ...), the arrangement of fdlibm's e_log.c, with the series' own terms.
HW double log_f64(double x) {
  const hw::u64 bits = hw::from_bits<hw::u64>(x);
  int k = (int)(bits >> 52) - 1023;
  double m = hw::from_bits<double>((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    k += 1;
  }
  const double f = m - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double series = 2.0 / 25.0;
  series = fma(series, z, 2.0 / 23.0);
  series = fma(series, z, 2.0 / 21.0);
  series = fma(series, z, 2.0 / 19.0);
  series = fma(series, z, 2.0 / 17.0);
  series = fma(series, z, 2.0 / 15.0);
  series = fma(series, z, 2.0 / 13.0);
  series = fma(series, z, 2.0 / 11.0);
  series = fma(series, z, 2.0 / 9.0);
  series = fma(series, z, 2.0 / 7.0);
  series = fma(series, z, 2.0 / 5.0);
  series = fma(series, z, 2.0 / 3.0);
  const double r = series * z;
  const double half_square = 0.5 * f * f;
  const double kd = (double)k;
  return kd * LN2_HIGH - ((half_square - (s * (half_square + r) + kd * LN2_LOW)) - f);
}

// e^x of a float x <= 0, 0 below -87. Error below 1 ulp of FP32.
HW float exp_f32(float x) {
  if (!(x >= -87.f)) return x != x ? x : 0.f;
  const float k = rintf(x * 1.44269504f);
  const float r = fmaf(-k, -2.12194440e-4f, fmaf(-k, 0.693359375f, x));
  float sum = 1.f / 5040.f;
  sum = fmaf(sum, r, 1.f / 720.f);
  sum = fmaf(sum, r, 1.f / 120.f);
  sum = fmaf(sum, r, 1.f / 24.f);
  sum = fmaf(sum, r, 1.f / 6.f);
  sum = fmaf(sum, r, 0.5f);
  sum = fmaf(sum, r, 1.f);
  sum = fmaf(sum, r, 1.f);
  return sum * __uint_as_float((hw::u32)((int)k + 127) << 23);
}
}  // namespace transcendental
