// rope_kv - rotates Q and K by their token's position, and writes Q out and K and V into their pages.
//
//   pair (a, b) at angle i: (a cos - b sin, b cos + a sin), in FP32, without contraction
//   INTERLEAVED 0: a, b = dimensions i, i + 64 (Hugging Face)      1: dimensions 2i, 2i + 1 (Mistral's consolidated files)
//   Q, K BF16: bf16(turned)     FP8_KV: e4m3(turned / k_scale), e4m3(v / v_scale); real value = stored x scale
//   page = page_tables[sequence][position / 64], row position % 64 of it, chunks swizzled (kv_layout.cuh)
//
// NeMo, H = 32, K = 8, D = 128: a token reads 12,288 B (+ 512 B of angles, L2) and writes 12,288 B in BF16, 10,240 B in FP8.
//   T = 1: launch-bound.   T = 64: 1.6 MB, 0.37 us.   T = 8192: 201 MB, 47 us                      (at 4.3 TB/s, BF16)
//
// Thread map: of each head, thread c of 8 holds the 16-byte chunks c and c + 8, which are whole pairs in either form (half-split:
// dimensions 8c..8c+7 with 64 more; interleaved: four pairs in each). Heads of a token in the order Q, K, V, as qkv has them.
// The two chunks of an e4m3 row that one thread makes are 8 bytes each.
// Limits: D = 128; H / K any; positions below the angles' and page tables' length. A token of position < 0 is skipped.
//
// History
//   1  one thread per 16 dimensions                                                    not yet run on hardware
#include "kv_layout.cuh"
#include "numeric.cuh"
using namespace numeric;
using namespace kv_layout;

namespace {
constexpr int THREADS_PER_HEAD = 8;
constexpr int HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;
constexpr int ROW_BYTES = FP8_KV ? HEAD_DIM : 2 * HEAD_DIM;

// Angles of the pairs of a thread's chunk: 8 of them half-split, 4 and 4 interleaved.
HW void load4(float* to, const float* from) {
  const f32x4 piece = hw::ld16<f32x4>(from);
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = piece.values[i];
}

HW void turn(float& a, float& b, float cosine, float sine) {
  const float turned = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = turned;
}

HW void store(unsigned char* tile, int row, int chunk, const float (&values)[8], float inverse_scale) {
  if constexpr (FP8_KV) hw::st8(tile + chunk_offset<ROW_BYTES>(row, chunk >> 1) + (chunk & 1) * 8, pack_e4m3(values, inverse_scale));
  else hw::st16(tile + chunk_offset<ROW_BYTES>(row, chunk), pack_bf16(values));
}
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
rope_kv(const __nv_bfloat16* __restrict__ qkv, const float* __restrict__ angles, const int* __restrict__ positions,
        const int* __restrict__ sequences, const int* __restrict__ page_tables, const float* __restrict__ k_scale,
        const float* __restrict__ v_scale, __nv_bfloat16* __restrict__ q, unsigned char* __restrict__ k_pages,
        unsigned char* __restrict__ v_pages, const int* __restrict__ num_tokens, int most_tokens, int max_pages) {
  const long long index = (long long)blockIdx.x * NUM_THREADS + threadIdx.x;
  const int chunk = (int)(index % THREADS_PER_HEAD);
  const int head = (int)(index / THREADS_PER_HEAD % HEADS);
  const long long token = index / (THREADS_PER_HEAD * HEADS);
  hw::griddep_wait();
  hw::griddep_launch();
  if (token >= min(*num_tokens, most_tokens)) return;  // the last block has threads of tokens that are none
  const int position = positions[token];
  if (position < 0) return;

  const __nv_bfloat16* from = qkv + (token * HEADS + head) * HEAD_DIM + chunk * 8;
  float low[8], high[8];
  unpack(hw::ld16<bf16x8>(from), low);
  unpack(hw::ld16<bf16x8>(from + HEAD_DIM / 2), high);
  if (head < NUM_HEADS + NUM_KV_HEADS) {
    const float* cosines = angles + (long long)position * HEAD_DIM;
    const float* sines = cosines + HEAD_DIM / 2;
    float cosine[8], sine[8];
    const int first = INTERLEAVED ? chunk * 4 : chunk * 8;
    const int second = INTERLEAVED ? 32 + chunk * 4 : chunk * 8 + 4;
    load4(cosine, cosines + first);
    load4(cosine + 4, cosines + second);
    load4(sine, sines + first);
    load4(sine + 4, sines + second);
    if constexpr (INTERLEAVED) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        turn(low[2 * i], low[2 * i + 1], cosine[i], sine[i]);
        turn(high[2 * i], high[2 * i + 1], cosine[4 + i], sine[4 + i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) turn(low[i], high[i], cosine[i], sine[i]);
    }
  }
  if (head < NUM_HEADS) {
    __nv_bfloat16* to = q + (token * NUM_HEADS + head) * HEAD_DIM + chunk * 8;
    hw::st16(to, pack_bf16(low));
    hw::st16(to + HEAD_DIM / 2, pack_bf16(high));
    return;
  }
  const bool is_key = head < NUM_HEADS + NUM_KV_HEADS;
  const int kv_head = head - NUM_HEADS - (is_key ? 0 : NUM_KV_HEADS);
  const int page = page_tables[(long long)sequences[token] * max_pages + position / PAGE_TOKENS];
  unsigned char* tile = (is_key ? k_pages : v_pages) + tile_offset<ROW_BYTES>(page, kv_head, NUM_KV_HEADS);
  const float inverse_scale = FP8_KV ? 1.f / (is_key ? *k_scale : *v_scale) : 1.f;
  const int row = position % PAGE_TOKENS;
  store(tile, row, chunk, low, inverse_scale);
  store(tile, row, chunk + 8, high, inverse_scale);
}
EXPORT_KERNEL(rope_kv)
