// large_gemm - y = x W^T for many rows of x (prefill): at the speed of the tensor cores, and with the bits of skinny_gemm.
//
//   sum  = x[m, :] . weight[n, :]
//   out[m, n] = (sum * x_scale[m]) * weight_scale[n]  (FP8 1)   or   sum  (FP8 0: BF16 operands, no scales)
//   RESIDUAL 1: + residual[m, n].   FLOAT_OUT 1: FP32, else BF16.
//
// NeMo, FP8: rows of a tile, share of the waves that is full, share of the tensor cores' peak if shared memory were never idle
// (plan in large_gemm.py; flops: 2 M N K):
//                                      M = 512          M = 2048         M = 8192
//   qkv     [ 6144,  5120]             128  73 % 54 %   192  97 % 82 %   192  97 % 82 %
//   o       [ 5120,  4096]             192  81 % 67 %   160  97 % 76 %   192  92 % 76 %
//   gate_up [28672,  5120]             128  97 % 76 %   192  95 % 86 %   192  99 % 89 %
//   down    [ 5120, 14336]             192  81 % 72 %   160  97 % 82 %   192  92 % 83 %
//
// Persistent: a cluster of two blocks, one on each of two SMs, computes tiles of 256 outputs x TOKENS tokens, one after the other. Each block has
// 128 of the outputs and loads their weights; each loads half of the tokens for both (multicast).
//
//   warps 0-3, 4-7  consumers: 64 outputs each on wgmma's 64-row side, as in skinny_gemm, TOKENS on its n side; 232 registers
//   warp  8         producer: one thread issues the copies, also of the next tile while this one is stored; warps 9-11 only lend registers
//
// The two consumers take turns without being told to: while one moves its sums, the tensor cores work for the other. Results go through
// shared memory, transposed by stmatrix, and out by TMA while the next tile is computed; the last rows, which share a box with rows from
// *num_rows on, are stored by threads.
//
// Sums. In skinny_gemm FP8 products are added by the tensor core inside 128 bytes of K, intervals in order inside a segment of K, segments in order;
// the number of segments depends on N and K alone. The same here takes up to three sets of TOKENS / 2 floats a thread: the interval and the
// segment in registers (192 at 192 tokens), the total, touched at the ends of segments only, in the area through which results leave. gate_up
// has one segment and no total, the others two. BF16 is added in the tensor core through a segment: at most two sets, both in registers.
//
// Shared memory moves 128 bytes a clock, and is the narrowest place. A stage (128 bytes of K) of a block, at n = TOKENS:
//   products   2 warpgroups x 4 wgmma x n / 2                             = 4 n clocks        768 at 192
//   operands   8 wgmma x (64 + n) x 32 bytes = 2 n + 128, copies in n + 128 = 3 n + 256 clocks    832      so at most 92 % (160: 87 %, 128: 80 %)
//   totals     8 n clocks a tile for each segment after the first: 5 % of a tile of qkv, 6 % of o, 2 % of down
//   L2         (128 + n / 2) x 128 bytes = 34 bytes a clock and SM at 192; without multicast 49
//   sums       n / 2 additions a warp, 96 of the 384 clocks in which the other warpgroup has the tensor cores
//
// Limits: N a multiple of 64; K of 128 bytes x SEGMENTS; any M. x and out have max_rows rows; those from *num_rows on are read (whatever they
// hold) and not written. Weights are not prefetched before the dependency wait: the first tile depends on *num_rows.
// That an element of wgmma does not depend on the width of its n side is assumed, and to be verified on hardware.
//
// History
//   1  cluster of two, multicast tokens, ring of 3 to 6 stages, totals in shared memory          not yet run on hardware
//      left out: releasing a stage with mbarrier.arrive.release.cluster (ptxas puts a fence of the whole GPU before it, in every interval);
//      tiles of 128 tokens with three sets in registers (80 % instead of 92 %); 8 segments as skinny_gemm had (o: 59 % instead of 76 %)
#include "hopper.cuh"
#include "wgmma.cuh"

namespace {
constexpr int CLUSTER = 2;         // blocks that share their tokens
constexpr int NUM_GROUPS = 2;      // consumer warpgroups of a block
constexpr int GROUP_OUTPUTS = 64;  // of a warpgroup: wgmma's 64-row side
constexpr int BLOCK_OUTPUTS = NUM_GROUPS * GROUP_OUTPUTS;
constexpr int TILE_OUTPUTS = CLUSTER * BLOCK_OUTPUTS;
constexpr int NUM_OUTPUT_TILES = (OUTPUTS + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
constexpr int STAGE_BYTES_OF_K = 128;  // one 128-byte swizzle span
constexpr int STAGE_K = FP8 ? STAGE_BYTES_OF_K : STAGE_BYTES_OF_K / 2;
constexpr int SEGMENT_INTERVALS = INPUTS / STAGE_K / SEGMENTS;
constexpr int WEIGHT_BYTES = BLOCK_OUTPUTS * STAGE_BYTES_OF_K;
constexpr int TOKEN_BYTES = TOKENS * STAGE_BYTES_OF_K;
constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr int SHARED_TOKENS = TOKENS / CLUSTER;  // that one block of the cluster loads for all
constexpr int NUM_THREADS = 128 * (NUM_GROUPS + 1);
constexpr int NUM_RELEASES = CLUSTER * NUM_GROUPS * 4;  // of a stage: every consumer warp of both blocks
constexpr int NUM_SUMS = TOKENS / 2;                    // of a thread
constexpr bool HAS_TOTALS = FP8 && SEGMENTS > 1;        // a third set of sums, in the staging area
constexpr int OUT_BYTES = FLOAT_OUT ? 4 : 2;
constexpr int SPAN_OUTPUTS = 128 / OUT_BYTES;  // of a row of 128 bytes in the staging area
constexpr int SPAN_BYTES = TOKENS * 128;
constexpr int STAGING_BYTES = TOKENS * GROUP_OUTPUTS * (HAS_TOTALS ? 4 : OUT_BYTES);  // of a warpgroup
constexpr int SCALES_PER_THREAD = (TOKENS + 127) / 128;
static_assert(INPUTS % (STAGE_K * SEGMENTS) == 0 && OUTPUTS % GROUP_OUTPUTS == 0 && TOKENS % (8 * CLUSTER) == 0);

// A tile of the cluster, named by its first output and its first token.
struct Tile {
  int output, token;
};
// RASTER_TOKENS tiles of tokens by all outputs, tokens first; then the next ones.
HW Tile tile_at(int index, int num_token_tiles) {
  const int first = index / (RASTER_TOKENS * NUM_OUTPUT_TILES) * RASTER_TOKENS, inside = index % (RASTER_TOKENS * NUM_OUTPUT_TILES);
  const int width = min(RASTER_TOKENS, num_token_tiles - first);
  return {inside / width * TILE_OUTPUTS, (first + inside % width) * TOKENS};
}

// A place in the ring with the parity of the round.
struct Place {
  int stage = 0;
  hw::u32 parity = 0;
  HW void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

HW void group_sync(int group) {
  if (group == 0) hw::bar_sync<1>(128);
  else hw::bar_sync<2>(128);
}

// One stage: d += (or =) 64 weight rows x TOKENS, over 128 bytes of K.
HW void multiply_stage(float (&d)[NUM_SUMS], hw::u64 weights, hw::u64 tokens, int accumulates) {
#pragma unroll
  for (int step = 0; step < 4; step++) {  // of 32 bytes of K; descriptors count in 16 bytes
    const int accumulates_here = step > 0 || accumulates;
    if constexpr (FP8) hw::wgmma_m64k32_e4m3<TOKENS>(d, weights + 2 * step, tokens + 2 * step, accumulates_here);
    else hw::wgmma_m64k16_bf16<TOKENS>(d, weights + 2 * step, tokens + 2 * step, accumulates_here);
  }
}

// Both blocks write this block's tokens, and this block writes half of the other's: a stage is given back to both producers.
HW void release(hw::Barrier* empty, int lane) {
  if (lane < CLUSTER) hw::mbarrier_arrive_cluster_reader(empty, lane);
}

// sum (+)= x_k w_k over one segment of K, promoted as skinny_gemm does: FP8 after every interval, BF16 at the end of the segment.
HW void sum_segment(float (&sum)[NUM_SUMS], float (&interval)[NUM_SUMS], unsigned char* ring, hw::Barrier* full, hw::Barrier* empty,
                    Place& place, int group, int lane) {
  for (int i = 0; i < SEGMENT_INTERVALS; i++) {
    const int stage = place.stage;
    hw::mbarrier_wait(&full[stage], place.parity);
    place.advance();
    unsigned char* const weights = ring + stage * STAGE_BYTES;
    const hw::u64 a = hw::wgmma_descriptor(weights + group * GROUP_OUTPUTS * STAGE_BYTES_OF_K, 128, 1024);
    const hw::u64 b = hw::wgmma_descriptor(weights + WEIGHT_BYTES, 128, 1024);
    hw::wgmma_fence();
    multiply_stage(interval, a, b, !FP8 && i > 0);
    hw::wgmma_commit();
    if constexpr (FP8) {
      hw::wgmma_wait<0>();
      release(&empty[stage], lane);
#pragma unroll
      for (int j = 0; j < NUM_SUMS; j++) sum[j] += interval[j];
    } else {  // the next interval is issued while this one runs
      hw::wgmma_wait<1>();
      if (i > 0) release(&empty[stage == 0 ? STAGES - 1 : stage - 1], lane);
    }
  }
  if constexpr (!FP8) {
    hw::wgmma_wait<0>();
    release(&empty[place.stage == 0 ? STAGES - 1 : place.stage - 1], lane);
  }
}
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
large_gemm(const __grid_constant__ hw::TensorMap weight_map, const __grid_constant__ hw::TensorMap x_map,
           const __grid_constant__ hw::TensorMap out_map, const float* __restrict__ weight_scale, const float* __restrict__ x_scale,
           const __nv_bfloat16* __restrict__ residual, void* __restrict__ out, const int* __restrict__ num_rows, int max_rows) {
  SHARED_DYNAMIC(ring, 1024);  // STAGES x (weights, tokens), then a staging area for each consumer warpgroup
  SHARED_ARRAY(hw::Barrier, full, [STAGES]);
  SHARED_ARRAY(hw::Barrier, empty, [STAGES]);
  SHARED_ARRAY(float, token_scales, [NUM_GROUPS][SCALES_PER_THREAD * 128]);
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int rank = hw::cluster_rank(), cluster = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      hw::mbarrier_init(&full[stage], 1);
      hw::mbarrier_init(&empty[stage], NUM_RELEASES);
    }
    hw::fence_mbarrier_init();
    hw::tma_prefetch_descriptor(&weight_map);
    hw::tma_prefetch_descriptor(&x_map);
    hw::tma_prefetch_descriptor(&out_map);
  }
  hw::cluster_sync();
  hw::griddep_wait();
  const int rows = min(*num_rows, max_rows);
  const int num_token_tiles = (rows + TOKENS - 1) / TOKENS, num_tiles = num_token_tiles * NUM_OUTPUT_TILES;

  if (group == NUM_GROUPS) {
    hw::setmaxnreg_dec<40>();
    if (threadIdx.x / 32 == 4 * NUM_GROUPS && hw::elect_one()) {
      Place place;
      for (int index = cluster; index < num_tiles; index += num_clusters) {
        const Tile tile = tile_at(index, num_token_tiles);
        for (int i = 0; i < SEGMENTS * SEGMENT_INTERVALS; i++) {
          unsigned char* const weights = ring + place.stage * STAGE_BYTES;
          unsigned char* const tokens = weights + WEIGHT_BYTES + rank * (TOKEN_BYTES / CLUSTER);
          hw::mbarrier_wait(&empty[place.stage], place.parity ^ 1);
          hw::mbarrier_arrive_expect_tx(&full[place.stage], STAGE_BYTES);
          hw::tma_load_2d(weights, &weight_map, &full[place.stage], i * STAGE_K, tile.output + rank * BLOCK_OUTPUTS);
          hw::tma_load_2d_multicast(tokens, &x_map, &full[place.stage], i * STAGE_K, tile.token + rank * SHARED_TOKENS,
                                    (1 << CLUSTER) - 1);
          place.advance();
        }
      }
    }
    __syncwarp();
  } else {
    hw::setmaxnreg_inc<232>();
    const int t = threadIdx.x % 128, warp = t / 32;
    unsigned char* const staging = ring + STAGES * STAGE_BYTES + group * STAGING_BYTES;
    Place place;
    for (int index = cluster; index < num_tiles; index += num_clusters) {
      const Tile tile = tile_at(index, num_token_tiles);
      const int first_output = tile.output + rank * BLOCK_OUTPUTS + group * GROUP_OUTPUTS;
      const bool is_inside = OUTPUTS % TILE_OUTPUTS == 0 || first_output < OUTPUTS;

      // What the epilogue needs is asked for now.
      float output_scale[2] = {}, token_scale[SCALES_PER_THREAD] = {};
      if constexpr (FP8) {
        if (is_inside) {
#pragma unroll
          for (int half = 0; half < 2; half++) output_scale[half] = weight_scale[first_output + 16 * warp + lane / 4 + 8 * half];
        }
#pragma unroll
        for (int i = 0; i < SCALES_PER_THREAD; i++)
          if (tile.token + 128 * i + t < rows) token_scale[i] = x_scale[tile.token + 128 * i + t];
      }

      float sum[NUM_SUMS] = {}, interval[NUM_SUMS];
      for (int segment = 0; segment < SEGMENTS; segment++) {
        if constexpr (FP8) {
#pragma unroll
          for (int j = 0; j < NUM_SUMS; j++) sum[j] = 0.f;
        }
        sum_segment(sum, interval, ring, full, empty, place, group, lane);
        if constexpr (!FP8) {
#pragma unroll
          for (int j = 0; j < NUM_SUMS; j++) sum[j] = segment == 0 ? interval[j] : sum[j] + interval[j];
        }
        if (segment == 0) {  // from here on the staging area is written: the last tile's stores must have read it
          if constexpr (FP8) {
#pragma unroll
            for (int i = 0; i < SCALES_PER_THREAD; i++) token_scales[group][128 * i + t] = token_scale[i];
          }
          if (t == 0) hw::bulk_wait_read<0>();
          group_sync(group);
        }
        if constexpr (HAS_TOTALS) {
#pragma unroll
          for (int j = 0; j < NUM_SUMS; j += 4) {
            float4* const place_of_total = (float4*)staging + (j / 4 * 128 + t);
            float4 total = {sum[j], sum[j + 1], sum[j + 2], sum[j + 3]};
            if (segment > 0) {
              const float4 before = hw::ld16<float4>(place_of_total);
              total = {before.x + total.x, before.y + total.y, before.z + total.z, before.w + total.w};
            }
            if (segment < SEGMENTS - 1) hw::st16(place_of_total, total);
            sum[j] = total.x, sum[j + 1] = total.y, sum[j + 2] = total.z, sum[j + 3] = total.w;
          }
        }
      }
      if (!is_inside) continue;
      if constexpr (HAS_TOTALS) group_sync(group);  // all have read their totals: the results may take their place

      // sum[4 j + i] is output 16 warp + lane / 4 + 8 (i / 2) of token 8 j + 2 (lane % 4) + i % 2.
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
        if constexpr (FP8) {
          const float2 scale = hw::ld8<float2>(&token_scales[group][8 * j + 2 * (lane % 4)]);
#pragma unroll
          for (int i = 0; i < 4; i++) sum[4 * j + i] = sum[4 * j + i] * (i % 2 ? scale.y : scale.x) * output_scale[i / 2];
        }
        if constexpr (RESIDUAL) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int token = tile.token + 8 * j + 2 * (lane % 4) + i % 2;
            if (token < rows)
              sum[4 * j + i] += __bfloat162float(residual[(size_t)token * OUTPUTS + first_output + 16 * warp + lane / 4 + 8 * (i / 2)]);
          }
        }
        if constexpr (FLOAT_OUT) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int output = 16 * warp + lane / 4 + 8 * (i / 2), token = 8 * j + 2 * (lane % 4) + i % 2;
            *(float*)(staging + output / SPAN_OUTPUTS * SPAN_BYTES + hw::swizzle128(token * 128 + output % SPAN_OUTPUTS * 4)) = sum[4 * j + i];
          }
        } else if (j % 2 == 1) {  // 16 outputs x 16 tokens of the warp, transposed: rows of tokens
          const __nv_bfloat162 pairs[4] = {
              __floats2bfloat162_rn(sum[4 * j - 4], sum[4 * j - 3]), __floats2bfloat162_rn(sum[4 * j - 2], sum[4 * j - 1]),
              __floats2bfloat162_rn(sum[4 * j], sum[4 * j + 1]), __floats2bfloat162_rn(sum[4 * j + 2], sum[4 * j + 3])};
          const hw::u32 matrices[4] = {hw::from_bits<hw::u32>(pairs[0]), hw::from_bits<hw::u32>(pairs[1]), hw::from_bits<hw::u32>(pairs[2]),
                                       hw::from_bits<hw::u32>(pairs[3])};
          const int token = 8 * (j - 1) + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
          hw::stmatrix_x4_trans(staging + hw::swizzle128(token * 128 + chunk * 16), matrices);
        }
      }
      hw::fence_proxy_async();
      group_sync(group);
      if (tile.token + TOKENS <= rows) {
        if (t == 0) {
#pragma unroll
          for (int span = 0; span < GROUP_OUTPUTS / SPAN_OUTPUTS; span++)
            hw::tma_store_2d(&out_map, staging + span * SPAN_BYTES, first_output + span * SPAN_OUTPUTS, tile.token);
          hw::bulk_commit();
        }
      } else {  // the last rows: a box would write those behind *num_rows too
        constexpr int CHUNKS = GROUP_OUTPUTS * OUT_BYTES / 16;
        for (int c = t; c < (rows - tile.token) * CHUNKS; c += 128) {
          const int row = c / CHUNKS, chunk = c % CHUNKS;
          unsigned char* const to = (unsigned char*)out + ((size_t)(tile.token + row) * OUTPUTS + first_output) * OUT_BYTES + chunk * 16;
          hw::st16(to, hw::ld16<uint4>(staging + chunk / 8 * SPAN_BYTES + hw::swizzle128(row * 128 + chunk % 8 * 16)));
        }
      }
    }
    if (t == 0) hw::bulk_wait<0>();
  }
  hw::griddep_launch();
  hw::cluster_sync();  // no block ends while the other still writes into it
}
EXPORT_KERNEL(large_gemm)
