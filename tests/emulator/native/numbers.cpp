// numbers.cpp - number formats by their definitions (not by CUDA's headers, which the kernels use).
#include <cmath>
#include <cstring>

#include "machine.h"

namespace emu {

float decode_bf16(u16 bits) { return __builtin_bit_cast(float, u32(bits) << 16); }

// 1 sign, 5 exponent (bias 15), 10 mantissa bits.
float decode_f16(u16 bits) {
  const u32 exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const u32 sign = u32(bits >> 15) << 31;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | mantissa << 13);
  if (exponent) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | mantissa << 13);
  const float value = float(mantissa) * 0x1p-24f;
  return sign ? -value : value;
}

// OCP FP8 E4M3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, all ones is NaN.
static float e4m3_value(u8 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value = exponent ? std::ldexp(1.0f + float(mantissa) / 8.0f, exponent - 7) : std::ldexp(float(mantissa), -9);
  if ((bits & 127) == 127) value = NAN;
  return bits & 128 ? -value : value;
}
static const struct E4m3Table {
  float value[256];
  E4m3Table() {
    for (int i = 0; i < 256; i++) value[i] = e4m3_value(u8(i));
  }
} e4m3_table;
float decode_e4m3(u8 bits) { return e4m3_table.value[bits]; }

static u16 f16_of_e4m3(u8 bits) {
  if ((bits & 127) == 127) return 0x7fff;  // the canonical NaN
  const u32 sign = u32(bits >> 7) << 15;
  const float magnitude = decode_e4m3(bits & 127);
  if (magnitude == 0) return u16(sign);
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  return u16(sign | u32(exponent - 1 + 15) << 10 | u32((fraction * 2 - 1) * 1024));
}

u32 e4m3x2_to_f16x2(u16 pair) { return u32(f16_of_e4m3(u8(pair))) | u32(f16_of_e4m3(u8(pair >> 8))) << 16; }

static u8 e4m3_of(float x) {
  if (std::isnan(x)) return 0x7f;
  const u8 sign = std::signbit(x) ? 128 : 0;
  const float a = std::fabs(x);
  if (a >= 448.0f) return u8(sign | 0x7e);
  const int exponent = a < 0x1p-6f ? -6 : std::ilogb(a);
  const float steps = std::nearbyintf(std::ldexp(a, 3 - exponent));  // to nearest even
  const float rounded = std::ldexp(steps, exponent - 3);
  if (rounded < 0x1p-6f) return u8(sign | u8(std::ldexp(rounded, 9)));
  const int e = std::ilogb(rounded);
  return u8(sign | (e + 7) << 3 | (u8(std::ldexp(rounded, 3 - e)) & 7));
}

u16 float2_to_e4m3x2(float low, float high) { return u16(e4m3_of(low) | e4m3_of(high) << 8); }

static float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float exp2_flushed(float x) { return flush(exp2f(flush(x))); }
float log2_flushed(float x) { return log2f(flush(x)); }

}  // namespace emu
