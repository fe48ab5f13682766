// swiglu - SiLU of the gate times up, and FP8 quantisation, of one token per thread block.
//
//   y = gate / (1 + exp(-gate)) * up,   gate_up [M, 2F] BF16: F gates, then F ups                    in FP32
//   QUANT 0: out = bf16(y)     1: scale = max(amax |y|, 1e-10) / 448, out = e4m3(y / scale)     2: out = e4m3(y / scale given)
//
// NeMo, F = 14336, QUANT 1: a row reads 57,344 B and writes 14,340 B.
//   M = 1: 0.07 MB, launch-bound.   M = 64: 4.6 MB, 1.07 us.   M = 8192: 587 MB, 137 us           (at 4.3 TB/s)
//
// Thread map: F / 8 pieces of 16 bytes, piece t + j * NUM_THREADS of gate and of up belongs to thread t; all loads are issued
// before the first is used, and y stays in registers until the row's amax is known.
// exp and the division are the hardware's (error below 2^-20 of y, see the launcher); everything else is IEEE-rounded.
// Limits: F a multiple of 8 (the launcher: of 128), at most 32,768. NaN or infinity in a row reaches that row alone.
//
// History
//   1  one row per block, row in registers, two pieces per thread at F = 14336         not yet run on hardware
#include "numeric.cuh"
using namespace numeric;

namespace {
constexpr int PIECES = FFN / 8;
constexpr int PIECES_PER_THREAD = (PIECES + NUM_THREADS - 1) / NUM_THREADS;
constexpr int NUM_WARPS = NUM_THREADS / 32;
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
swiglu(const __nv_bfloat16* __restrict__ gate_up, unsigned char* __restrict__ out, float* __restrict__ scale,
       const float* __restrict__ static_scale, const int* __restrict__ num_rows) {
  SHARED_ARRAY(float, maxima, [NUM_WARPS]);
  const int t = threadIdx.x;
  const size_t row = blockIdx.x;
  hw::griddep_wait();
  hw::griddep_launch();
  if ((int)row >= *num_rows) return;

  bf16x8 gates[PIECES_PER_THREAD] = {}, ups[PIECES_PER_THREAD] = {};
#pragma unroll
  for (int j = 0; j < PIECES_PER_THREAD; j++) {
    const int piece = t + j * NUM_THREADS;
    if (piece >= PIECES) continue;
    gates[j] = hw::ld16<bf16x8>(gate_up + row * 2 * FFN + piece * 8);
    ups[j] = hw::ld16<bf16x8>(gate_up + row * 2 * FFN + FFN + piece * 8);
  }
  float y[PIECES_PER_THREAD][8];
  float amax = 0.f;
#pragma unroll
  for (int j = 0; j < PIECES_PER_THREAD; j++) {
    float up[8];
    unpack(gates[j], y[j]);
    unpack(ups[j], up);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      y[j][i] = __fdividef(y[j][i], 1.f + __expf(-y[j][i])) * up[i];
      amax = fmaxf(amax, fabsf(y[j][i]));
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
    if constexpr (QUANT == 0) hw::st16(out + (row * FFN + piece * 8) * 2, pack_bf16(y[j]));
    else hw::st8(out + row * FFN + piece * 8, pack_e4m3(y[j], inverse_scale));
  }
}
EXPORT_KERNEL(swiglu)
