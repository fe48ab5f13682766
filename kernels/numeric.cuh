// numeric.cuh - BF16 and e4m3 in 16-byte pieces, and reductions over a thread block in a fixed order.
#pragma once
#include "hopper.cuh"

namespace numeric {
using hw::u32;

constexpr float E4M3_MAX = 448.f;
constexpr float AMAX_FLOOR = 1e-10f;  // a row of zeros gets scale AMAX_FLOOR / 448, and codes 0

struct alignas(16) bf16x8 {
  __nv_bfloat162 pairs[4];
};
struct alignas(16) f32x4 {
  float values[4];
};
struct alignas(8) e4m3x8 {
  unsigned short pairs[4];
};

HW void unpack(const bf16x8& from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __bfloat1622float2(from.pairs[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

HW bf16x8 pack_bf16(const float (&from)[8]) {
  bf16x8 to;
#pragma unroll
  for (int i = 0; i < 4; i++) to.pairs[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
  return to;
}

// Two values in a register, the first in its low half.
HW u32 pack_bf16(float low, float high) { return hw::from_bits<u32>(__floats2bfloat162_rn(low, high)); }
HW u32 pack_f16(float low, float high) { return hw::from_bits<u32>(__floats2half2_rn(low, high)); }

// The two e4m3 codes in the low half of a register -> FP16, which has them all.
HW u32 halves_of_e4m3(u32 pair) { return hw::from_bits<u32>(hw::e4m3x2_to_half2((hw::u16)pair)); }

// Nearest e4m3, ties to even, saturating at +-448; NaN stays NaN.
HW e4m3x8 pack_e4m3(const float (&from)[8], float inverse_scale) {
  e4m3x8 to;
#pragma unroll
  for (int i = 0; i < 4; i++) to.pairs[i] = hw::float2_to_e4m3x2(from[2 * i] * inverse_scale, from[2 * i + 1] * inverse_scale);
  return to;
}

// Sum over the block, the same in every thread: within a warp by halving distances, then warp after warp, so that it depends on
// NUM_WARPS and the addends only. `partials` [NUM_WARPS] must not be in use; one barrier.
template <int NUM_WARPS>
HW float block_sum(float x, float* partials) {
  x = hw::warp_sum(x);
  if ((threadIdx.x & 31) == 0) partials[threadIdx.x >> 5] = x;
  __syncthreads();
  float sum = partials[0];
#pragma unroll
  for (int i = 1; i < NUM_WARPS; i++) sum += partials[i];
  return sum;
}

template <int NUM_WARPS>
HW float block_max(float x, float* partials) {
  x = hw::warp_max(x);
  if ((threadIdx.x & 31) == 0) partials[threadIdx.x >> 5] = x;
  __syncthreads();
  float largest = partials[0];
#pragma unroll
  for (int i = 1; i < NUM_WARPS; i++) largest = fmaxf(largest, partials[i]);
  return largest;
}
}  // namespace numeric
