// prefill_attention - causal softmax attention of many query tokens over paged K and V, with grouped query heads.
//
//   out[t, h] = sum_p w[p] v[p] / sum_p w[p],   w[p] = exp(q[t, h] . k[p] / sqrt(128)),   p = 0 .. position of t
//   Pages BF16 or, FP8_KV 1, e4m3 with one scale each for K and V. OUTPUT 0: out BF16   1: e4m3 and a scale per token   2: e4m3, scale given
//
// A tile: the tokens of a chunk between one multiple of TILE_TOKENS and the next, times the query heads of a KV head, up to 128 rows; NeMo: 32 x 4.
// Persistent blocks take (tile, KV head) after (tile, KV head), the longest first, in a fixed order.
//
//   warps 0-3, 4-7  math: 64 rows each, K and V by 128 tokens (two pages), from the tile's own back to the sequence's first; 224 registers
//   warp  8         producer: asks for tiles of K and V into a ring, in the order in which they are used: K, K V, K V, ..., V
//   warps 9-11      FP8_KV 1: converters, from the ring of codes (4 x 16 KB) into FP16 tiles (4 x 32 KB; BF16: 6 x 32 KB, no converters)
//
// A step of math: S = Q K^T of this tile and O += P V of the tile before are issued together; as soon as S is there it becomes weights, while O
// is still summed. The two warpgroups issue in turns (named barriers 1 and 2), so that one makes weights while the tensor cores work for the other.
// S, O and P are registers: 64 + 64 + 32. A page and KV head is stored as wgmma wants it in shared memory, 128 bytes of each row at a time.
// prefill_quantise, OUTPUT 1: a row's scale needs all its heads, so that they go through memory in BF16 once more.
//
// A row's result depends, bit for bit, on its own query and position, and on keys and values up to there: tiles of queries and of K and V are cut at
// multiples of their size, whatever the chunk, so that even a row's place in its tile is the same. All tokens of a query tile end in one tile of K, the
// first: no other needs a mask. Weights behind a row's position are 0, and V behind the chunk's end, which may be anything, is replaced by zeros.
// These are not the bits of decode_attention, which cuts a row's keys into many more partial sums, by its length.
//
// NeMo, H = 32, K = 8, one sequence, causal: 16,384 flops per query token and key; at 989 TFLOP/s (dense BF16, NVIDIA's datasheet)
//   4K  137 GFLOP  139 us     8K  550 GFLOP  556 us     32K  8.8 TFLOP  8.9 ms     128K  141 TFLOP  142 ms
// Clocks of an SM for one step of both warpgroups (128 rows x 128 tokens):
//   tensor cores   2 x 2 x 128 x 128 x 128 flops at 4096 a clock                     = 2048
//   weights        128 x 128 at 16 exp2 a clock                                      = 1024, in turns beside the tensor cores
//   shared memory  64 KB of K and V twice, 32 KB of Q = 1280 clocks, copies in 512   = 1792 in BF16; in FP8 copies in 256, out 256, FP16 in 512: 2304,
//                  so that FP8 reaches 89 % at most
//   L2             64 KB = 32 bytes a clock and SM in BF16, 16 in FP8
// Limits: D = 128, at most 8 query heads per KV head. Keys are not shared out to several blocks: fewer than 512 query tokens in all give NeMo fewer
// items than there are SMs. A sequence whose own V holds NaN or infinity may be NaN up to 127 tokens before that, too.
// To be verified on hardware: products with a weight of 0 leave a sum as it is, whatever finite V they have (what lies behind a row in its tile differs
// between a prompt as a whole and in chunks).
//
// History
//   1  two math warpgroups in turns, weights of a tile made while the one before is summed     not yet run on hardware
#include "kv_layout.cuh"
#include "numeric.cuh"
#include "query_tiles.cuh"
#include "wgmma.cuh"
using namespace kv_layout;
using namespace query_tiles;
using hw::u32;
using numeric::halves_of_e4m3;
using numeric::pack_bf16;
using numeric::pack_f16;

namespace {
constexpr int NUM_GROUPS = 2;              // math warpgroups of a block, 64 rows of a tile each
constexpr int KV_PAGES = KV_TOKENS / PAGE_TOKENS;
constexpr int NUM_WARPS = 4 * NUM_GROUPS;  // of math
constexpr int NUM_THREADS = 128 * (NUM_GROUPS + 1);
constexpr int SPAN_BYTES = 128 * 128;  // 128 rows of 64 dimensions: one swizzle span wide
constexpr int SLOT_BYTES = 2 * SPAN_BYTES;
constexpr int SLOTS = FP8_KV ? 4 : 6;
constexpr int COPY_SLOTS = FP8_KV ? 4 : SLOTS;  // of the ring that copies go to: codes with FP8_KV 1, else the slots themselves
constexpr int COPY_BYTES = FP8_KV ? SPAN_BYTES : SLOT_BYTES;
constexpr int NUM_CONVERTERS = 3;  // warps that make FP16 of codes
constexpr int OUT_BYTES = OUTPUT == 2 ? 1 : 2;
constexpr int QUANTISE_THREADS = 256;
constexpr float LOG2_E = 1.44269504f;

// A place in a ring of slots with the parity of the round.
template <int SIZE>
struct Place {
  int slot = 0;
  u32 parity = 0;
  HW void advance() {
    if (++slot == SIZE) {
      slot = 0;
      parity ^= 1;
    }
  }
};

HW void wait_for_turn(int group) {
  if (group == 0) hw::bar_sync<1>(128 * NUM_GROUPS);
  else hw::bar_sync<2>(128 * NUM_GROUPS);
}
HW void pass_turn(int group) {
  if (group == 0) hw::bar_arrive<2>(128 * NUM_GROUPS);
  else hw::bar_arrive<1>(128 * NUM_GROUPS);
}

HW void group_sync(int group) {
  if (group == 0) hw::bar_sync<3>(128);
  else hw::bar_sync<4>(128);
}

HW u32 pack_weights(float low, float high) { return FP8_KV ? pack_f16(low, high) : pack_bf16(low, high); }

// Eight BF16 -> eight FP16.
HW uint4 halves_of_bf16(const uint4& from) {
  const u32 pairs[4] = {from.x, from.y, from.z, from.w};
  u32 to[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __bfloat1622float2(hw::from_bits<__nv_bfloat162>(pairs[i]));
    to[i] = pack_f16(pair.x, pair.y);
  }
  return make_uint4(to[0], to[1], to[2], to[3]);
}
// Eight e4m3 -> eight FP16.
HW uint4 halves_of_codes(u32 low, u32 high) {
  return make_uint4(halves_of_e4m3(low), halves_of_e4m3(low >> 16), halves_of_e4m3(high), halves_of_e4m3(high >> 16));
}

// s = Q K^T of 64 rows and 128 tokens, by steps of 16 dimensions (32 bytes; descriptors count in 16).
HW void issue_scores(float (&s)[64], const unsigned char* q, const unsigned char* keys) {
  const hw::u64 a = hw::wgmma_descriptor(q, 128, 1024), b = hw::wgmma_descriptor(keys, 128, 1024);
#pragma unroll
  for (int step = 0; step < 8; step++) {
    const int offset = step / 4 * (SPAN_BYTES / 16) + step % 4 * 2;
    if constexpr (FP8_KV) hw::wgmma_m64k16_f16<KV_TOKENS>(s, a + offset, b + offset, step > 0);
    else hw::wgmma_m64k16_bf16<KV_TOKENS>(s, a + offset, b + offset, step > 0);
  }
}

// o += P V, by steps of 16 tokens.
HW void issue_sums(float (&o)[64], const u32 (&p)[8][4], const unsigned char* values) {
  const hw::u64 b = hw::wgmma_descriptor(values, 128, 1024, SPAN_BYTES);
#pragma unroll
  for (int step = 0; step < 8; step++) {
    if constexpr (FP8_KV) hw::wgmma_m64k16_f16_ra<HEAD_DIM, 1>(o, p[step], b + step * (16 * 128 / 16), 1);
    else hw::wgmma_m64k16_bf16_ra<HEAD_DIM, 1>(o, p[step], b + step * (16 * 128 / 16), 1);
  }
}

// What a thread knows of its two rows: lane / 4 of its warp's 16, and eight further.
struct Rows {
  float most[2] = {-INFINITY, -INFINITY};  // largest score so far, as a power of two
  float total[2] = {};                     // of the weights of this thread's columns
  float correction[2];                     // of what was summed before the last tile

  // Scores become weights.
  HW void weigh(float (&s)[64], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float largest = s[2 * r];
#pragma unroll
      for (int j = 0; j < 16; j++) largest = fmaxf(largest, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float now = fmaxf(most[r], largest * scale);
      correction[r] = hw::exp2_approx(most[r] - now);
      most[r] = now;
      total[r] *= correction[r];
#pragma unroll
      for (int j = 0; j < 16; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) s[4 * j + 2 * r + e] = hw::exp2_approx(__fmaf_rn(s[4 * j + 2 * r + e], scale, -now));
        total[r] += s[4 * j + 2 * r] + s[4 * j + 2 * r + 1];
      }
    }
  }
};

HW void as_operand(u32 (&p)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int step = 0; step < 8; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) p[step][i] = pack_weights(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
  }
}

// Of four lanes with four words each, lane i gets word i of all, in the order of the lanes.
HW void transpose(u32 (&x)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const u32 other = __shfl_xor_sync(~0u, lane & bit ? x[i] : x[i + bit], bit);
      if (lane & bit) x[i] = other;
      else x[i + bit] = other;
    }
  }
}
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
prefill_attention(const __grid_constant__ hw::TensorMap q_map, const __grid_constant__ hw::TensorMap k_map,
                  const __grid_constant__ hw::TensorMap v_map, const float* __restrict__ k_scale, const float* __restrict__ v_scale,
                  const int* __restrict__ page_tables, const int* __restrict__ tiles, const int* __restrict__ num_tiles,
                  const float* __restrict__ static_scale, unsigned char* __restrict__ out, int most_tiles, int max_pages) {
  SHARED_DYNAMIC(memory, 1024);  // queries, SLOTS tiles of K or V, with FP8_KV 1 COPY_SLOTS tiles of codes
  SHARED_ARRAY(hw::Barrier, full, [SLOTS]);
  SHARED_ARRAY(hw::Barrier, empty, [SLOTS]);
  SHARED_ARRAY(hw::Barrier, codes_full, [COPY_SLOTS]);
  SHARED_ARRAY(hw::Barrier, codes_empty, [COPY_SLOTS]);
  SHARED_ARRAY(hw::Barrier, queries_full, [1]);
  SHARED_ARRAY(hw::Barrier, queries_empty, [1]);
  SHARED_ARRAY(hw::Barrier, uncleaned, [1]);  // a tile of V has come whose end is to be zeroed
  unsigned char* const slots = memory + SLOT_BYTES;
  unsigned char* const codes = slots + SLOTS * SLOT_BYTES;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < SLOTS; slot++) {
      hw::mbarrier_init(&full[slot], FP8_KV ? NUM_CONVERTERS : 1);
      hw::mbarrier_init(&empty[slot], NUM_WARPS);
    }
    for (int slot = 0; slot < COPY_SLOTS; slot++) {
      hw::mbarrier_init(&codes_full[slot], 1);
      hw::mbarrier_init(&codes_empty[slot], NUM_CONVERTERS);
    }
    hw::mbarrier_init(queries_full, 1);
    hw::mbarrier_init(queries_empty, NUM_WARPS);
    hw::mbarrier_init(uncleaned, 1);
    hw::fence_mbarrier_init();
    hw::tma_prefetch_descriptor(&q_map);
    hw::tma_prefetch_descriptor(&k_map);
    hw::tma_prefetch_descriptor(&v_map);
  }
  if constexpr (QUERY_ROWS < TILE_ROWS) {  // no query fills the others
    for (int i = QUERY_ROWS * 8 + threadIdx.x; i < TILE_ROWS * 8; i += NUM_THREADS) {
      hw::st16(memory + i * 16, make_uint4(0, 0, 0, 0));
      hw::st16(memory + SPAN_BYTES + i * 16, make_uint4(0, 0, 0, 0));
    }
    hw::fence_proxy_async();
  }
  __syncthreads();
  hw::griddep_wait();
  const int num_items = min(*num_tiles, most_tiles) * NUM_KV_HEADS;

  if (group == NUM_GROUPS) {
    hw::setmaxnreg_dec<56>();
    if (warp == NUM_WARPS) {
      unsigned char* const copies = FP8_KV ? codes : slots;
      hw::Barrier* const copied = FP8_KV ? codes_full : full;
      hw::Barrier* const given_back = FP8_KV ? codes_empty : empty;
      Place<COPY_SLOTS> place;
      u32 query_parity = 0, cleaned_parity = 0;
      for_each_item(tiles, num_items, [&](const Tile& tile, int kv_head) {
        const int* const table = page_tables + (long long)tile.sequence * max_pages;
        const int last_page = (tile.length - 1) / PAGE_TOKENS;
        bool has_queries = false;
        for_each_kv_tile(tile, [&](bool is_value, int kv_tile, int num_valid) {
          unsigned char* const slot = copies + place.slot * COPY_BYTES;
          const bool is_cleaned = !FP8_KV && num_valid < KV_TOKENS;  // codes are when they are converted
          if (lane == 0) {  // who alone waits: another lane might come so late that it finds the phase after the next
            hw::mbarrier_wait(&given_back[place.slot], place.parity ^ 1);
            hw::Barrier* const barrier = is_cleaned ? uncleaned : &copied[place.slot];
            hw::mbarrier_arrive_expect_tx(barrier, COPY_BYTES);
#pragma unroll
            for (int i = 0; i < KV_PAGES; i++) {
              const int page = table[min(kv_tile * KV_PAGES + i, last_page)];  // those behind the last are that one again
#pragma unroll
              for (int span = 0; span < COPY_BYTES / SPAN_BYTES; span++)
                hw::tma_load_2d(slot + span * SPAN_BYTES + i * PAGE_TOKENS * 128, is_value ? &v_map : &k_map, barrier,
                                span * (HEAD_DIM / 2), (page * NUM_KV_HEADS + kv_head) * PAGE_TOKENS);
            }
          }
          if (is_cleaned) {
            hw::mbarrier_wait(uncleaned, cleaned_parity);
            cleaned_parity ^= 1;
            const int num_chunks = (KV_TOKENS - num_valid) * 8;
            for (int i = lane; i < 2 * num_chunks; i += 32)
              hw::st16(slot + i / num_chunks * SPAN_BYTES + num_valid * 128 + i % num_chunks * 16, make_uint4(0, 0, 0, 0));
            hw::fence_proxy_async();
            __syncwarp();
            if (lane == 0) hw::mbarrier_arrive(&copied[place.slot]);
          }
          place.advance();
          if (has_queries) return;
          has_queries = true;  // behind the first tile of K, which does not have to wait for the queries before
          if (lane == 0) {
            hw::mbarrier_wait(queries_empty, query_parity ^ 1);
            hw::mbarrier_arrive_expect_tx(queries_full, 2 * QUERY_ROWS * 128);
#pragma unroll
            for (int span = 0; span < 2; span++)
              hw::tma_load_3d(memory + span * SPAN_BYTES, &q_map, queries_full, span * (HEAD_DIM / 2), kv_head * GROUP,
                              tile.row_of_position_0 + tile.first());
          }
          query_parity ^= 1;
        });
      });
    } else if constexpr (FP8_KV) {
      Place<COPY_SLOTS> from;
      Place<SLOTS> to;
      for_each_item(tiles, num_items, [&](const Tile& tile, int) {
        for_each_kv_tile(tile, [&](bool, int, int num_valid) {
          hw::mbarrier_wait(&codes_full[from.slot], from.parity);
          hw::mbarrier_wait(&empty[to.slot], to.parity ^ 1);
          const unsigned char* const its_codes = codes + from.slot * COPY_BYTES;
          unsigned char* const slot = slots + to.slot * SLOT_BYTES;
#pragma unroll 4
          for (int i = threadIdx.x - 32 * (NUM_WARPS + 1); i < KV_TOKENS * 8; i += 32 * NUM_CONVERTERS) {
            const int token = i / 8, chunk = (i ^ token) & 7;  // of 16 dimensions
            const uint4 sixteen = token < num_valid ? hw::ld16<uint4>(its_codes + i * 16) : make_uint4(0, 0, 0, 0);
            const uint4 low = halves_of_codes(sixteen.x, sixteen.y), high = halves_of_codes(sixteen.z, sixteen.w);
            // Of eight lanes, four write to each span: one half of them the odd chunks first, so that their banks differ.
            const int span = chunk / 4, place = token * 128 + chunk % 4 * 32;
            hw::st16(slot + span * SPAN_BYTES + hw::swizzle128(place + 16 * span), span ? high : low);
            hw::st16(slot + span * SPAN_BYTES + hw::swizzle128(place + 16 - 16 * span), span ? low : high);
          }
          hw::fence_proxy_async();
          __syncwarp();
          if (lane == 0) {
            hw::mbarrier_arrive(&full[to.slot]);
            hw::mbarrier_arrive(&codes_empty[from.slot]);
          }
          from.advance();
          to.advance();
        });
      });
    }
  } else {
    hw::setmaxnreg_inc<224>();
    const float scale = LOG2_E * 0.08838834764f * (FP8_KV ? *k_scale : 1.f);  // 1 / sqrt(128), for powers of two
    unsigned char* const q = memory + group * 64 * 128;
    const int first_row = 16 * warp + lane / 4;  // of the tile, as is first_row + 8
    Place<SLOTS> place;
    u32 query_parity = 0;
    const auto next = [&] {
      const int slot = place.slot;
      hw::mbarrier_wait(&full[slot], place.parity);
      place.advance();
      return slot;
    };
    const auto release = [&](hw::Barrier* barrier) {
      if (lane == 0) hw::mbarrier_arrive(barrier);
    };
    if (group == 1) pass_turn(group);

    for_each_item(tiles, num_items, [&](const Tile& tile, int kv_head) {
      const int num_kv_tiles = tile.num_kv_tiles();
      float o[64] = {}, s[64];
      u32 p[8][4];
      Rows rows;

      hw::mbarrier_wait(queries_full, query_parity);
      query_parity ^= 1;
      if constexpr (FP8_KV) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          unsigned char* const chunk = q + i / 4 * SPAN_BYTES + (i % 4 * 128 + threadIdx.x % 128) * 16;
          hw::st16(chunk, halves_of_bf16(hw::ld16<uint4>(chunk)));
        }
        hw::fence_proxy_async();
        group_sync(group);
      }
      const int diagonal = next();
      hw::wgmma_fence();
      issue_scores(s, q, slots + diagonal * SLOT_BYTES);
      hw::wgmma_commit();
      hw::wgmma_wait<0>();
      release(&empty[diagonal]);
      if (num_kv_tiles == 1) release(queries_empty);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int num_seen = tile.first() % KV_TOKENS + (first_row + 8 * r) / GROUP + 1;
#pragma unroll
        for (int j = 0; j < 16; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& score = s[4 * j + 2 * r + e];
            score = 8 * j + 2 * (lane % 4) + e < num_seen ? score : -INFINITY;
          }
        }
      }
      rows.weigh(s, scale);
      as_operand(p, s);

      for (int i = 1; i < num_kv_tiles; i++) {
        const int keys = next();
        wait_for_turn(group);
        hw::wgmma_fence();
        issue_scores(s, q, slots + keys * SLOT_BYTES);
        hw::wgmma_commit();
        const int values = next();
        hw::wgmma_fence();
        issue_sums(o, p, slots + values * SLOT_BYTES);
        hw::wgmma_commit();
        pass_turn(group);
        hw::wgmma_wait<1>();
        release(&empty[keys]);
        if (i == num_kv_tiles - 1) release(queries_empty);
        rows.weigh(s, scale);
        hw::wgmma_wait<0>();
        release(&empty[values]);
#pragma unroll
        for (int j = 0; j < 64; j++) o[j] *= rows.correction[j / 2 % 2];
        as_operand(p, s);
      }

      const int values = next();
      hw::wgmma_fence();
      issue_sums(o, p, slots + values * SLOT_BYTES);
      hw::wgmma_commit();
      hw::wgmma_wait<0>();
      release(&empty[values]);

      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float total = rows.total[r];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[r] = (FP8_KV ? *v_scale : 1.f) / total;
      }
      // After the exchange, lanes 4 i and 4 i + 1 have 16 bytes each of row i, lanes 4 i + 2 and 4 i + 3 of row i + 8.
      const int row = first_row + lane / 2 % 2 * 8, token = row / GROUP, position = tile.first() + token;
      const bool is_real = token < TILE_TOKENS && position >= tile.position && position < tile.length;
      unsigned char* const to =
          out + (((long long)(tile.row_of_position_0 + position) * NUM_HEADS + kv_head * GROUP + row % GROUP) * HEAD_DIM) * OUT_BYTES;
      constexpr int COLUMNS = 32 / OUT_BYTES;  // that two lanes store
      const float inverse_scale = OUTPUT == 2 ? 1.f / *static_scale : 1.f;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / COLUMNS; n++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* const sums = &o[COLUMNS / 2 * n + i % 2 * (COLUMNS / 4) + i / 2 * 2];
          const float by = factor[i / 2];
          if constexpr (OUTPUT == 2) {
            x[i] = hw::float2_to_e4m3x2(sums[0] * by * inverse_scale, sums[1] * by * inverse_scale) |
                   (u32)hw::float2_to_e4m3x2(sums[4] * by * inverse_scale, sums[5] * by * inverse_scale) << 16;
          } else {
            x[i] = pack_bf16(sums[0] * by, sums[1] * by);
          }
        }
        transpose(x, lane);
        if constexpr (OUTPUT == 2) {  // low halves are eight columns, high halves the next eight
          const u32 y[4] = {(x[0] & 0xFFFF) | x[1] << 16, (x[2] & 0xFFFF) | x[3] << 16, x[0] >> 16 | (x[1] & 0xFFFF0000u),
                            x[2] >> 16 | (x[3] & 0xFFFF0000u)};
          if (is_real) hw::st16(to + 32 * n + lane % 2 * 16, make_uint4(y[0], y[1], y[2], y[3]));
        } else {
          if (is_real) hw::st16(to + 32 * n + lane % 2 * 16, make_uint4(x[0], x[1], x[2], x[3]));
        }
      }
    });
    if (group == 0) wait_for_turn(group);  // the turn passed last
  }
  hw::griddep_launch();
}
EXPORT_KERNEL(prefill_attention)

// One token of one tile per block: e4m3 codes of its outputs, with their scale.
extern "C" __global__ void __launch_bounds__(QUANTISE_THREADS)
prefill_quantise(const __nv_bfloat16* __restrict__ unscaled, const int* __restrict__ tiles, const int* __restrict__ num_tiles,
                 unsigned char* __restrict__ out, float* __restrict__ scale, int most_tiles) {
  constexpr int CHUNKS = NUM_HEADS * HEAD_DIM / 8;
  constexpr int OWN_CHUNKS = (CHUNKS + QUANTISE_THREADS - 1) / QUANTISE_THREADS;
  SHARED_ARRAY(float, partials, [QUANTISE_THREADS / 32]);
  hw::griddep_wait();
  hw::griddep_launch();
  const int index = blockIdx.x / TILE_TOKENS, token = blockIdx.x % TILE_TOKENS;
  if (index >= min(*num_tiles, most_tiles)) return;
  const Tile tile = hw::ld16<Tile>(tiles + index * 4);
  const int position = tile.first() + token;
  if (position < tile.position || position >= tile.length) return;
  const long long row = tile.row_of_position_0 + position, first = row * (NUM_HEADS * HEAD_DIM);
  float values[OWN_CHUNKS][8] = {}, amax = numeric::AMAX_FLOOR;
#pragma unroll
  for (int i = 0; i < OWN_CHUNKS; i++) {
    const int chunk = threadIdx.x + i * QUANTISE_THREADS;
    if (chunk < CHUNKS) numeric::unpack(hw::ld16<numeric::bf16x8>(unscaled + first + chunk * 8), values[i]);
#pragma unroll
    for (int d = 0; d < 8; d++) amax = fmaxf(amax, fabsf(values[i][d]));
  }
  const float row_scale = numeric::block_max<QUANTISE_THREADS / 32>(amax, partials) / numeric::E4M3_MAX;
  const float inverse_scale = 1.f / row_scale;
  if (threadIdx.x == 0) scale[row] = row_scale;
#pragma unroll
  for (int i = 0; i < OWN_CHUNKS; i++) {
    const int chunk = threadIdx.x + i * QUANTISE_THREADS;
    if (chunk < CHUNKS) hw::st8(out + first + chunk * 8, numeric::pack_e4m3(values[i], inverse_scale));
  }
}
EXPORT_KERNEL(prefill_quantise)
