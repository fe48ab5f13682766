// prefill_attention - causal softmax attention of many query tokens over paged K and V, with grouped query heads.
//
//   out[t, h] = sum_p w[p] v[p] / sum_p w[p],   w[p] = exp(q[t, h] . k[p] / sqrt(128)),   p = 0 .. position of t
//
// A tile: the tokens of a chunk between one multiple of TILE_TOKENS and the next, times the query heads of a KV head, up to 128 rows; NeMo: 32 x 4.
// Persistent blocks take (tile, KV head) after (tile, KV head), the longest first, in a fixed order.
//
//   warps 0-3, 4-7  math: 64 rows each, K and V by 128 tokens (two pages), from the tile's own back to the sequence's first. 224 registers
//   warp  8         producer: tiles of K and V into a ring of six slots of 32 KB, in the order in which they are used: K, K V, K V, ..., V
//
// A step of math: S = Q K^T of this tile and O += P V of the tile before are issued together; as soon as S is there it becomes weights, while O
// is still summed. The two warpgroups issue in turns (named barriers 1 and 2), so that one makes weights while the tensor cores work for the other.
// S, O and P are registers: 64 + 64 + 32. A page and KV head is stored as wgmma wants it in shared memory, 64 dimensions at a time.
//
// A row's result depends, bit for bit, on its own query and position, and on keys and values up to there: cuts between tiles of queries and of K and V lie at
// multiples of 128, whatever the chunk, so that even its place in the tile is the same. All tokens of a query tile end in the same tile of K, the
// first: no other needs a mask. Weights behind a row's position are 0; V behind the chunk's end, which may be anything, is replaced by zeros.
//
// NeMo, H = 32, K = 8, one sequence, causal, at 989 TFLOP/s (dense BF16, datasheet):
//   4K  137 GFLOP  139 us     8K  550 GFLOP  556 us     32K  8.8 TFLOP  8.9 ms     128K  141 TFLOP  142 ms
// Clocks of an SM for one step of both warpgroups (128 rows x 128 tokens): tensor cores 2048; weights 1024 (16 exp2 a clock);
// shared memory (128 bytes a clock) 1280 for the products and 512 for the copies; L2 32 bytes a clock.
// Limits: D = 128, at most 8 query heads per KV head.
//
// History
//   1  two math warpgroups in turns, weights of a tile made while the one before is summed     not yet run on hardware
#include "kv_layout.cuh"
#include "wgmma.cuh"
using namespace kv_layout;
using hw::u32;

namespace {
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int NUM_GROUPS = 2;   // math warpgroups of a block
constexpr int TILE_ROWS = 128;  // of queries: tokens x heads of a KV head, 64 rows for each warpgroup
constexpr int TILE_TOKENS = GROUP == 1 ? 128 : GROUP == 2 ? 64 : GROUP <= 4 ? 32 : 16;
constexpr int QUERY_ROWS = GROUP * TILE_TOKENS;
constexpr int KV_TOKENS = 128;  // of a tile of K or V: two pages
constexpr int KV_PAGES = KV_TOKENS / PAGE_TOKENS;
constexpr int NUM_WARPS = 4 * NUM_GROUPS;  // of math
constexpr int NUM_THREADS = 128 * (NUM_GROUPS + 1);
constexpr int SPAN_BYTES = 128 * 128;  // 128 rows of 64 dimensions: one swizzle span wide
constexpr int SLOT_BYTES = 2 * SPAN_BYTES;
constexpr float LOG2_E = 1.44269504f;
static_assert(GROUP >= 1 && GROUP <= 8 && GROUP * NUM_KV_HEADS == NUM_HEADS && KV_TOKENS % TILE_TOKENS == 0);

// Some consecutive query tokens of a sequence, within a multiple of TILE_TOKENS and the next.
struct alignas(16) Tile {
  int sequence;
  int row_of_position_0;  // the row of q where the sequence's first token would be
  int position;           // of the first token
  int length;             // behind the chunk's last token: the tile ends there or at the next multiple of TILE_TOKENS

  HW int first() const { return position / TILE_TOKENS * TILE_TOKENS; }
  HW int num_kv_tiles() const { return first() / KV_TOKENS + 1; }
};

// The item of a block in a round: forwards and backwards in turns, so that no block always gets the longest of a round.
HW int item_at(int round) {
  return round * (int)gridDim.x + (int)(round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

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

HW u32 pack(float low, float high) { return hw::from_bits<u32>(__floats2bfloat162_rn(low, high)); }

// s = Q K^T of 64 rows and 128 tokens, by steps of 16 dimensions (32 bytes; descriptors count in 16).
HW void issue_scores(float (&s)[64], const unsigned char* q, const unsigned char* keys) {
  const hw::u64 a = hw::wgmma_descriptor(q, 128, 1024), b = hw::wgmma_descriptor(keys, 128, 1024);
#pragma unroll
  for (int step = 0; step < 8; step++) {
    const int offset = step / 4 * (SPAN_BYTES / 16) + step % 4 * 2;
    hw::wgmma_m64k16_bf16<KV_TOKENS>(s, a + offset, b + offset, step > 0);
  }
}

// o += P V, by steps of 16 tokens.
HW void issue_sums(float (&o)[64], const u32 (&p)[8][4], const unsigned char* values) {
  const hw::u64 b = hw::wgmma_descriptor(values, 128, 1024, SPAN_BYTES);
#pragma unroll
  for (int step = 0; step < 8; step++) hw::wgmma_m64k16_bf16_ra<HEAD_DIM, 1>(o, p[step], b + step * (16 * 128 / 16), 1);
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

HW void pack_weights(u32 (&p)[8][4], const float (&s)[64]) {
#pragma unroll
  for (int step = 0; step < 8; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) p[step][i] = pack(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
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
                  const __grid_constant__ hw::TensorMap v_map, const int* __restrict__ page_tables, const int* __restrict__ tiles,
                  const int* __restrict__ num_tiles, __nv_bfloat16* __restrict__ out, int most_tiles, int max_pages) {
  constexpr int SLOTS = 6;
  SHARED_DYNAMIC(memory, 1024);  // queries, then SLOTS tiles of K or V
  SHARED_ARRAY(hw::Barrier, full, [SLOTS]);
  SHARED_ARRAY(hw::Barrier, empty, [SLOTS]);
  SHARED_ARRAY(hw::Barrier, query, [3]);  // full, empty; and a tile of V that is to be cleaned has come
  unsigned char* const slots = memory + SLOT_BYTES;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < SLOTS; slot++) {
      hw::mbarrier_init(&full[slot], 1);
      hw::mbarrier_init(&empty[slot], NUM_WARPS);
    }
    hw::mbarrier_init(&query[0], 1);
    hw::mbarrier_init(&query[1], NUM_WARPS);
    hw::mbarrier_init(&query[2], 1);
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
      Place<SLOTS> place;
      u32 query_parity = 0, cleaned_parity = 0;
      for (int round = 0; round * (int)gridDim.x < num_items; round++) {
        const int item = item_at(round);
        if (item >= num_items) break;
        const int kv_head = item % NUM_KV_HEADS;
        const Tile tile = hw::ld16<Tile>(tiles + item / NUM_KV_HEADS * 4);
        const int* const table = page_tables + (long long)tile.sequence * max_pages;
        const int last_page = (tile.length - 1) / PAGE_TOKENS;
        const int num_kv_tiles = tile.num_kv_tiles();

        // A tile of K or V; pages behind the last one are that one again. Rows of V from num_valid on become zeros.
        const auto load = [&](const hw::TensorMap* map, int kv_tile, int num_valid) {
          unsigned char* const slot = slots + place.slot * SLOT_BYTES;
          hw::mbarrier_wait(&empty[place.slot], place.parity ^ 1);
          if (lane == 0) {
            hw::Barrier* const barrier = num_valid < KV_TOKENS ? &query[2] : &full[place.slot];
            hw::mbarrier_arrive_expect_tx(barrier, SLOT_BYTES);
#pragma unroll
            for (int i = 0; i < KV_PAGES; i++) {
              const int page = table[min(kv_tile * KV_PAGES + i, last_page)];
#pragma unroll
              for (int half = 0; half < 2; half++)
                hw::tma_load_2d(slot + half * SPAN_BYTES + i * PAGE_TOKENS * 128, map, barrier, half * 64,
                                (page * NUM_KV_HEADS + kv_head) * PAGE_TOKENS);
            }
          }
          if (num_valid < KV_TOKENS) {
            hw::mbarrier_wait(&query[2], cleaned_parity);
            cleaned_parity ^= 1;
            const int num_chunks = (KV_TOKENS - num_valid) * 8;
            for (int i = lane; i < 2 * num_chunks; i += 32)
              hw::st16(slot + i / num_chunks * SPAN_BYTES + num_valid * 128 + i % num_chunks * 16, make_uint4(0, 0, 0, 0));
            hw::fence_proxy_async();
            __syncwarp();
            if (lane == 0) hw::mbarrier_arrive(&full[place.slot]);
          }
          place.advance();
        };

        for (int i = 0; i <= num_kv_tiles; i++) {  // from the last tile to the first; V comes one step later
          const int kv_tile = num_kv_tiles - 1 - i;
          if (kv_tile >= 0) load(&k_map, kv_tile, KV_TOKENS);
          if (i == 0) {
            hw::mbarrier_wait(&query[1], query_parity ^ 1);
            query_parity ^= 1;
            if (lane == 0) {
              hw::mbarrier_arrive_expect_tx(&query[0], 2 * QUERY_ROWS * 128);
#pragma unroll
              for (int half = 0; half < 2; half++)
                hw::tma_load_3d(memory + half * SPAN_BYTES, &q_map, &query[0], half * 64, kv_head * GROUP,
                                tile.row_of_position_0 + tile.first());
            }
          } else {
            load(&v_map, kv_tile + 1, min(tile.length - (kv_tile + 1) * KV_TOKENS, KV_TOKENS));
          }
        }
      }
    }
  } else {
    hw::setmaxnreg_inc<224>();
    const float scale = LOG2_E * 0.08838834764f;  // 1 / sqrt(128), for powers of two
    const unsigned char* const q = memory + group * 64 * 128;
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

    for (int round = 0; round * (int)gridDim.x < num_items; round++) {
      const int item = item_at(round);
      if (item >= num_items) break;
      const int kv_head = item % NUM_KV_HEADS;
      const Tile tile = hw::ld16<Tile>(tiles + item / NUM_KV_HEADS * 4);
      const int num_kv_tiles = tile.num_kv_tiles();
      float o[64] = {}, s[64];
      u32 p[8][4];
      Rows rows;

      hw::mbarrier_wait(&query[0], query_parity);
      query_parity ^= 1;
      const int diagonal = next();
      hw::wgmma_fence();
      issue_scores(s, q, slots + diagonal * SLOT_BYTES);
      hw::wgmma_commit();
      hw::wgmma_wait<0>();
      release(&empty[diagonal]);
      if (num_kv_tiles == 1) release(&query[1]);
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
      pack_weights(p, s);

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
        if (i == num_kv_tiles - 1) release(&query[1]);
        rows.weigh(s, scale);
        hw::wgmma_wait<0>();
        release(&empty[values]);
#pragma unroll
        for (int j = 0; j < 64; j++) o[j] *= rows.correction[j / 2 % 2];
        pack_weights(p, s);
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
        factor[r] = 1.f / total;
      }
      // Lane 4 i + j stores eight columns of row i, + 8 for j = 2 and 3, the second eight of each sixteen for j = 1 and 3.
      const int row = first_row + lane / 2 % 2 * 8, token = row / GROUP, position = tile.first() + token;
      const bool is_real = token < TILE_TOKENS && position >= tile.position && position < tile.length;
      __nv_bfloat16* const to = out + ((long long)(tile.row_of_position_0 + position) * NUM_HEADS + kv_head * GROUP + row % GROUP) * HEAD_DIM;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* const pair = &o[8 * n + i % 2 * 4 + i / 2 * 2];
          x[i] = hw::from_bits<u32>(__floats2bfloat162_rn(pair[0] * factor[i / 2], pair[1] * factor[i / 2]));
        }
        transpose(x, lane);
        if (is_real) hw::st16(to + 16 * n + lane % 2 * 8, make_uint4(x[0], x[1], x[2], x[3]));
      }
    }
    if (group == 0) wait_for_turn(group);  // the turn passed last
  }
  hw::griddep_launch();
}
EXPORT_KERNEL(prefill_attention)
