// gemm - out[M x N] (bf16) = (a[M x K] . b[N x K]^T, e4m3) * a_scale[m] * b_scale[n]: the pipeline that the real FP8 GEMMs are built of.
// Tiles of 128 x 128 x 128 bytes; a TMA producer warpgroup and two consumer warpgroups around a ring of stages; the accumulators of one stage
// are in flight while the next one's are issued; the epilogue goes through swizzled shared memory and TMA stores. Not tuned, not for use.
#include "hopper.cuh"
#include "wgmma.cuh"
using namespace hw;

namespace {
constexpr int TILE_M = 128, TILE_N = 128, TILE_K = 128, STAGES = 3;
constexpr int A_BYTES = TILE_M * TILE_K, B_BYTES = TILE_N * TILE_K, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int HALF_BYTES = TILE_M * 128;  // 64 columns of the output tile, 128-byte rows
}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1)
gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap out, const float* a_scale,
     const float* b_scale, int rows, int columns, int depth) {
  SHARED_DYNAMIC(memory, 1024);  // STAGES x (a, b), then the output tile
  SHARED_ARRAY(Barrier, full, [STAGES]);
  SHARED_ARRAY(Barrier, empty, [STAGES]);
  const int t = threadIdx.x, lane = t & 31, group = t >> 7;
  const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N, steps = (depth + TILE_K - 1) / TILE_K;
  if (t == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 8);
    }
    fence_mbarrier_init();
    tma_prefetch_descriptor(&a);
  }
  __syncthreads();  // the barriers are initialised
  griddep_wait();
  if (group == 2) {
    setmaxnreg_dec<40>();
    if (t == 256) {
      for (int k = 0; k < steps; k++) {
        const int s = k % STAGES, phase = k / STAGES & 1;
        mbarrier_wait(&empty[s], phase ^ 1);
        mbarrier_arrive_expect_tx(&full[s], STAGE_BYTES);
        tma_load_2d(memory + s * STAGE_BYTES, &a, &full[s], k * TILE_K, m0);
        tma_load_2d(memory + s * STAGE_BYTES + A_BYTES, &b, &full[s], k * TILE_K, n0);
      }
    }
  } else {
    setmaxnreg_inc<232>();
    float d[TILE_N / 2];
    for (int k = 0; k < steps; k++) {
      const int s = k % STAGES, phase = k / STAGES & 1;
      mbarrier_wait(&full[s], phase);
      const u64 da = wgmma_descriptor(memory + s * STAGE_BYTES + group * 64 * 128, 128, 1024);
      const u64 db = wgmma_descriptor(memory + s * STAGE_BYTES + A_BYTES, 128, 1024);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < TILE_K / 32; j++) wgmma_m64k32_e4m3<TILE_N>(d, da + j * 2, db + j * 2, k + j != 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (k && lane == 0) mbarrier_arrive(&empty[(k - 1) % STAGES]);  // this warp is done with the stage before
    }
    wgmma_wait<0>();

    const int row = group * 64 + (t >> 5 & 3) * 16 + (lane >> 2);
    unsigned char* tile = memory + STAGES * STAGE_BYTES;
    const float s0 = m0 + row < rows ? a_scale[m0 + row] : 0.f, s1 = m0 + row + 8 < rows ? a_scale[m0 + row + 8] : 0.f;
#pragma unroll
    for (int j = 0; j < TILE_N / 8; j++) {
      const int c = j * 8 + (lane & 3) * 2, n = n0 + c;
      const float b0 = n < columns ? b_scale[n] : 0.f, b1 = n + 1 < columns ? b_scale[n + 1] : 0.f;
      unsigned char* half = tile + (c >> 6) * HALF_BYTES;
      *(__nv_bfloat162*)(half + swizzle128(row * 128 + (c & 63) * 2)) = __floats2bfloat162_rn(d[j * 4] * s0 * b0, d[j * 4 + 1] * s0 * b1);
      *(__nv_bfloat162*)(half + swizzle128((row + 8) * 128 + (c & 63) * 2)) = __floats2bfloat162_rn(d[j * 4 + 2] * s1 * b0, d[j * 4 + 3] * s1 * b1);
    }
    fence_proxy_async();
    if (group == 0)
      bar_sync<1>(128);
    else
      bar_sync<2>(128);
    if ((t & 127) == 0) {
      for (int h = 0; h < 2; h++)
        if (n0 + h * 64 < columns) tma_store_2d(&out, tile + h * HALF_BYTES + group * 64 * 128, n0 + h * 64, m0 + group * 64);
      bulk_commit();
      bulk_wait<0>();
    }
  }
}
EXPORT_KERNEL(gemm)
