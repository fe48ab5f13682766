// rmsnorm - residual add, RMSNorm and FP8 quantisation of one token per thread block.
//
//   h = bf16(residual + x)          written back to residual (ADD 1; with ADD 0, h = residual and nothing is written)
//   y = (h / sqrt(mean(h^2) + eps)) * weight                                                        in FP32
//   QUANT 0: out = bf16(y)     1: scale = max(amax |y|, 1e-10) / 448, out = e4m3(y / scale)     2: out = e4m3(y / scale given)
//
// NeMo, E = 5120, ADD 1, QUANT 1: a row reads 20,480 B and writes 15,364 B; the weight's 10,240 B come from L2.
//   M = 1: 0.04 MB, launch-bound.   M = 64: 2.3 MB, 0.53 us.   M = 8192: 294 MB, 68 us            (at 4.3 TB/s)
//
// Thread map: HIDDEN / 8 pieces of 16 bytes, piece t + j * NUM_THREADS belongs to thread t. The row is read once and stays in
// registers. The weight is loaded before the dependency wait. Both reductions run in an order that only E decides.
// Every operation is IEEE-rounded, without contraction: the result is the same bits on any machine.
// Limits: E a multiple of 8 (the launcher: of 128), at most 16,384. NaN or infinity in a row reaches that row alone.
//
// History
//   1  one row per block, row in registers, one piece per thread up to E = 8192        not yet run on hardware
#include "numeric.cuh"
using namespace numeric;

namespace {
constexpr int PIECES = HIDDEN / 8;
constexpr int PIECES_PER_THREAD = (PIECES + NUM_THREADS - 1) / NUM_THREADS;
constexpr int NUM_WARPS = NUM_THREADS / 32;
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
rmsnorm(const __nv_bfloat16* __restrict__ x, __nv_bfloat16* __restrict__ residual, const __nv_bfloat16* __restrict__ weight,
        unsigned char* __restrict__ out, float* __restrict__ scale, const float* __restrict__ static_scale,
        const int* __restrict__ num_rows, float eps) {
  SHARED_ARRAY(float, sums, [NUM_WARPS]);
  SHARED_ARRAY(float, maxima, [NUM_WARPS]);
  const int t = threadIdx.x;
  const size_t row = blockIdx.x;
  bf16x8 weights[PIECES_PER_THREAD] = {};
#pragma unroll
  for (int j = 0; j < PIECES_PER_THREAD; j++) {
    const int piece = t + j * NUM_THREADS;
    if (piece < PIECES) weights[j] = hw::ld16<bf16x8>(weight + piece * 8);
  }
  hw::griddep_wait();
  hw::griddep_launch();
  if ((int)row >= *num_rows) return;

  float h[PIECES_PER_THREAD][8] = {};
  float square_sum = 0.f;
#pragma unroll
  for (int j = 0; j < PIECES_PER_THREAD; j++) {
    const int piece = t + j * NUM_THREADS;
    if (piece >= PIECES) continue;
    __nv_bfloat16* place = residual + row * HIDDEN + piece * 8;
    unpack(hw::ld16<bf16x8>(place), h[j]);
    if constexpr (ADD) {
      float addend[8];
      unpack(hw::ld16<bf16x8>(x + row * HIDDEN + piece * 8), addend);
#pragma unroll
      for (int i = 0; i < 8; i++) h[j][i] += addend[i];
      const bf16x8 rounded = pack_bf16(h[j]);
      hw::st16(place, rounded);
      unpack(rounded, h[j]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) square_sum += h[j][i] * h[j][i];
  }
  const float mean_square = block_sum<NUM_WARPS>(square_sum, sums) / (float)HIDDEN;
  const float inverse_rms = 1.f / sqrtf(mean_square + eps);

  float amax = 0.f;
#pragma unroll
  for (int j = 0; j < PIECES_PER_THREAD; j++) {
    float w[8];
    unpack(weights[j], w);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      h[j][i] = (h[j][i] * inverse_rms) * w[i];
      amax = fmaxf(amax, fabsf(h[j][i]));
    }
  }
  float inverse_scale = 1.f;
  if constexpr (QUANT == 1) {
    const float row_scale = fmaxf(block_max<NUM_WARPS>(amax, maxima), AMAX_FLOOR) / E4M3_MAX;
    if (t == 0) scale[row] = row_scale;
    inverse_scale = 1.f / row_scale;
  }
  if constexpr (QUANT == 2) inverse_scale = 1.f / *static_scale;
#pragma unroll
  for (int j = 0; j < PIECES_PER_THREAD; j++) {
    const int piece = t + j * NUM_THREADS;
    if (piece >= PIECES) continue;
    if constexpr (QUANT == 0) hw::st16(out + (row * HIDDEN + piece * 8) * 2, pack_bf16(h[j]));
    else hw::st8(out + row * HIDDEN + piece * 8, pack_e4m3(h[j], inverse_scale));
  }
}
EXPORT_KERNEL(rmsnorm)
