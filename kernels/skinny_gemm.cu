// skinny_gemm - y = x W^T for few rows of x (a decode step): streams the weights once, at the speed of memory.
//
//   sum  = x[m, :] . weight[n, :]
//   out[m, n] = (sum * x_scale[m]) * weight_scale[n]  (FP8 1)   or   sum  (FP8 0: BF16 operands, no scales)
//   RESIDUAL 1: + residual[m, n].   FLOAT_OUT 1: FP32, else BF16.
//
// NeMo, FP8, bytes of the weights, their floor at 4.3 TB/s, tiles x segments = blocks, all at once on 132 SMs (plan in skinny_gemm.py):
//   qkv     [ 6144,  5120]   31.5 MB    7.3 us    96 x 2 = 192         gate_up [28672,  5120]  146.8 MB   34.1 us   448 x 1 = 448
//   o       [ 5120,  4096]   21.0 MB    4.9 us    80 x 2 = 160         down    [ 5120, 14336]   73.4 MB   17.1 us    80 x 2 = 160
//   head, BF16 [131072, 5120] 1342.2 MB  312 us  2048 x 1              flops: 2 M N K, below the tensor cores' speed up to M = 174
//
// The operands change sides: 64 rows of *weights* fill the 64-row side of wgmma, the tokens its n side (8 to 128), so few tokens waste nothing.
// A block works on one tile of 64 outputs and one segment of K. The segments of a tile are one cluster: at the end each block leaves its
// FP32 sums in its own shared memory, and the cluster's threads add them up in the order of the segments, across the cluster, then scale and store.
// Weights do not depend on the kernel before: a whole ring of them is asked for before the dependency wait, x only after it.
//
//   warps 0-3  consumers: wgmma on a stage of the ring (128 bytes of K), then one arrival a warp to give the stage back
//   warp  4    producer: one thread issues the copies
//   in flight per SM (weights): 77 to 162 KB up to 16 tokens, 58 to 81 KB at 64, 38 to 54 KB at 128; 4.3 TB/s for 1 us are 33 KB
//
// Batch invariance: which products are added in which order depends on N and K alone. Inside 128 bytes of K the tensor core adds; FP8 sums are
// moved to FP32 registers after each such interval (Hopper keeps about 14 bits of an FP8 sum), intervals in order, segments in order; large_gemm adds the same. That an
// element of wgmma does not depend on the width of its n side is assumed, and to be verified on hardware.
// Limits: N a multiple of 64, K of 128 bytes x SEGMENTS, M at most 128 (the launcher picks TOKENS >= M). x and out have max_rows rows;
// those from *num_rows on are read (whatever they hold) and not written.
//
// History
//   1  ring of 4 stages, one warpgroup, cluster over K reduced through distributed shared memory        not yet run on hardware
//   2  at most 2 segments for NeMo (were 4 to 8), rings of 2 to 8 stages: large_gemm must add in the same order, and pays for
//      segments; fewer sums cross the cluster. At 128 tokens a SM with two blocks multiplies for 4.7 us of o's 4.9
//      no fence of the whole device before a block ends, which waited until its results had arrived       not yet run on hardware
#include "hopper.cuh"
#include "wgmma.cuh"

namespace {
constexpr int TILE_OUTPUTS = 64;
constexpr int STAGE_BYTES_OF_K = 128;  // one 128-byte swizzle span
constexpr int STAGE_K = FP8 ? STAGE_BYTES_OF_K : STAGE_BYTES_OF_K / 2;
constexpr int WEIGHT_BYTES = TILE_OUTPUTS * STAGE_BYTES_OF_K;
constexpr int TOKEN_BYTES = TOKENS * STAGE_BYTES_OF_K;
constexpr int NUM_INTERVALS = INPUTS / STAGE_K / SEGMENTS;  // of this block's segment
constexpr int FIRST_STAGES = NUM_INTERVALS < STAGES ? NUM_INTERVALS : STAGES;
constexpr int NUM_CONSUMER_WARPS = 4;
constexpr int NUM_THREADS = 32 * (NUM_CONSUMER_WARPS + 1);
constexpr int SUM_STRIDE = TILE_OUTPUTS + 4;  // floats between two tokens' sums: the writes of a warp then meet all banks
constexpr int NUM_PAIRS = TILE_OUTPUTS / 2;
static_assert(INPUTS % (STAGE_K * SEGMENTS) == 0 && OUTPUTS % TILE_OUTPUTS == 0);

// One stage: d += (or =) 64 weights rows x TOKENS, over 128 bytes of K.
HW void multiply_stage(float (&d)[TOKENS / 2], hw::u64 weights, hw::u64 tokens, int accumulates) {
#pragma unroll
  for (int step = 0; step < 4; step++) {  // of 32 bytes of K; descriptors count in 16 bytes
    const int accumulates_here = step > 0 || accumulates;
    if constexpr (FP8) hw::wgmma_m64k32_e4m3<TOKENS>(d, weights + 2 * step, tokens + 2 * step, accumulates_here);
    else hw::wgmma_m64k16_bf16<TOKENS>(d, weights + 2 * step, tokens + 2 * step, accumulates_here);
  }
}
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
skinny_gemm(const __grid_constant__ hw::TensorMap weight_map, const __grid_constant__ hw::TensorMap x_map,
            const float* __restrict__ weight_scale, const float* __restrict__ x_scale, const __nv_bfloat16* __restrict__ residual,
            void* __restrict__ out, const int* __restrict__ num_rows, int max_rows) {
  SHARED_DYNAMIC(ring, 1024);
  SHARED_ARRAY(hw::Barrier, full, [STAGES]);
  SHARED_ARRAY(hw::Barrier, empty, [STAGES]);
  unsigned char* const weights = ring;
  unsigned char* const tokens = ring + STAGES * WEIGHT_BYTES;
  float* const sums = (float*)ring;  // [TOKENS][SUM_STRIDE], when the ring is done with
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int segment = SEGMENTS > 1 ? (int)hw::cluster_rank() : 0;
  const int first_output = blockIdx.y * TILE_OUTPUTS;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      hw::mbarrier_init(&full[stage], 1);
      hw::mbarrier_init(&empty[stage], NUM_CONSUMER_WARPS);
    }
    hw::fence_mbarrier_init();
  }
  __syncthreads();

  if (warp == NUM_CONSUMER_WARPS) {
    if (hw::elect_one()) {
      const hw::u64 read_once = hw::l2_evict_first();
      const int first_k = segment * NUM_INTERVALS * STAGE_K;
      for (int i = 0; i < FIRST_STAGES; i++) {
        hw::mbarrier_arrive_expect_tx(&full[i], WEIGHT_BYTES + TOKEN_BYTES);
        hw::tma_load_2d_hint(weights + i * WEIGHT_BYTES, &weight_map, &full[i], first_k + i * STAGE_K, first_output, read_once);
      }
      hw::griddep_wait();
      for (int i = 0; i < FIRST_STAGES; i++)
        hw::tma_load_2d(tokens + i * TOKEN_BYTES, &x_map, &full[i], first_k + i * STAGE_K, 0);
      for (int i = FIRST_STAGES; i < NUM_INTERVALS; i++) {
        const int stage = i % STAGES;
        hw::mbarrier_wait(&empty[stage], (i / STAGES - 1) & 1);
        hw::mbarrier_arrive_expect_tx(&full[stage], WEIGHT_BYTES + TOKEN_BYTES);
        hw::tma_load_2d_hint(weights + stage * WEIGHT_BYTES, &weight_map, &full[stage], first_k + i * STAGE_K, first_output, read_once);
        hw::tma_load_2d(tokens + stage * TOKEN_BYTES, &x_map, &full[stage], first_k + i * STAGE_K, 0);
      }
    }
    __syncwarp();
    hw::griddep_wait();
  } else {
    hw::griddep_wait();
    float sum[TOKENS / 2] = {}, interval[TOKENS / 2];
    for (int i = 0; i < NUM_INTERVALS; i++) {
      const int stage = i % STAGES;
      hw::mbarrier_wait(&full[stage], (i / STAGES) & 1);
      const hw::u64 a = hw::wgmma_descriptor(weights + stage * WEIGHT_BYTES, 128, 1024);
      const hw::u64 b = hw::wgmma_descriptor(tokens + stage * TOKEN_BYTES, 128, 1024);
      hw::wgmma_fence();
      multiply_stage(interval, a, b, !FP8 && i > 0);
      hw::wgmma_commit();
      hw::wgmma_wait<0>();
      if (lane == 0) hw::mbarrier_arrive(&empty[stage]);
      if constexpr (FP8) {
#pragma unroll
        for (int j = 0; j < TOKENS / 2; j++) sum[j] += interval[j];
      }
    }
    hw::bar_sync<1>(32 * NUM_CONSUMER_WARPS);  // no warp's wgmma reads the ring any more: the sums may take its place
    const float(&result)[TOKENS / 2] = FP8 ? sum : interval;
#pragma unroll
    for (int j = 0; j < TOKENS / 2; j++) {
      const int output = 16 * warp + lane / 4 + 8 * (j % 4 / 2), token = 8 * (j / 4) + 2 * (lane % 4) + j % 2;
      sums[token * SUM_STRIDE + output] = result[j];
    }
  }
  hw::griddep_launch();
  if constexpr (SEGMENTS > 1) hw::cluster_sync();
  else __syncthreads();

  // Pairs of neighbouring outputs; the cluster's threads share them out.
  const int num_pairs = min(*num_rows, max_rows) * NUM_PAIRS;
  for (int p = segment * NUM_THREADS + threadIdx.x; p < num_pairs; p += SEGMENTS * NUM_THREADS) {
    const int token = p / NUM_PAIRS, output = p % NUM_PAIRS * 2;
    float* const place = sums + token * SUM_STRIDE + output;
    float2 total = hw::ld8<float2>(SEGMENTS > 1 ? hw::cluster_map(place, 0) : place);
#pragma unroll
    for (int s = 1; s < SEGMENTS; s++) {
      const float2 part = hw::ld8<float2>(hw::cluster_map(place, s));
      total.x += part.x;
      total.y += part.y;
    }
    if constexpr (FP8) {
      const float2 scale = hw::ld8<float2>(weight_scale + first_output + output);
      total.x = total.x * x_scale[token] * scale.x;
      total.y = total.y * x_scale[token] * scale.y;
    }
    const size_t target = (size_t)token * OUTPUTS + first_output + output;
    if constexpr (RESIDUAL) {
      total.x += __bfloat162float(residual[target]);
      total.y += __bfloat162float(residual[target + 1]);
    }
    if constexpr (FLOAT_OUT) hw::st8((float*)out + target, total);
    else *(__nv_bfloat162*)((__nv_bfloat16*)out + target) = __floats2bfloat162_rn(total.x, total.y);
  }
  if constexpr (SEGMENTS > 1) hw::cluster_sync_readers();  // no block ends while another still reads its sums
}
EXPORT_KERNEL(skinny_gemm)
