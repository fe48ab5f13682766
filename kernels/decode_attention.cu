// decode_attention - softmax attention of single query tokens over paged K and V, with grouped query heads.
//
//   out[t, h] = sum_p w[p] v[p] / sum_p w[p],   w[p] = exp(q[t, h] . k[p] / sqrt(128)),   p = 0 .. lengths[t] - 1
//   Pages BF16 or, FP8_KV 1, e4m3 with one scale each for K and V. OUTPUT 0: out BF16   1: e4m3 and a scale per token   2: e4m3, scale given
//
// attention_schedule, once per step: each row's KV is cut into chunks, and every (row, chunk) becomes an item. A chunk has 4, 8, 16 ... pages of
//   64 tokens, the fewest that make at most 64 chunks of the row. Cuts lie at positions that follow from the row's length alone.
// attention_partials, per layer: an item and KV head at a time per block, every block the same number of them within one: weighted sums of
//   the chunk, with their largest score and sum of weights. attention_merge: a row's chunks in a fixed order.
// So a row's result depends, bit for bit, on its own q, length, and K and V up to there.
//
// NeMo, H = 32, K = 8: bytes of K and V per layer, their floor at 4.3 TB/s, chunks x KV heads of all rows
//   batch   1, 1K    FP8 2.1 MB  0.5 us    32       batch  1, 128K   FP8 268 MB  62 us    512       batch 256, 1K    FP8 537 MB  125 us   8192
//   BF16 twice as much. Partials: 2,080 B of written (and read) per item and KV head, against 65,536 B of K and V at least (FP8).
//
// attention_partials, 5 warps: warp 4 is the producer, one lane of it asks for tiles: (page, KV head) is one bulk copy of 8 or 16 KB for K and one for V,
// STAGES of them ahead, across the borders of items. Warps 0-3 have 16 of a page's 64 tokens each: S = Q K^T with the group's heads as rows (mma
// m16n8k16, rows 8-15 are zero), weights stay in registers as the A operand of O += P V. Warps add up at the end of an item only.
//   in flight per SM: 2 blocks x 96 KB = 192 KB (registers allow no third block: capped at 136 the compiler spills)
// e4m3 becomes FP16, exactly, in one conversion per pair: K's bytes in the order ldmatrix gives them, to which the order of Q's dimensions is
// suited; V's through a transposing ldmatrix, whose pairs of bytes are even and odd dimensions of their token.
// Limits: D = 128, at most 8 query heads per KV head, 1024 rows; a row of length 0 gives zeros. What K and V pages hold behind a row's length has no influence, NaN included.
//
// History
//   1  persistent blocks, producer warp, tensor cores, schedule on the device            not yet run on hardware
#include "kv_layout.cuh"
#include "numeric.cuh"
using namespace kv_layout;
using hw::u32;
using numeric::f32x4;
using numeric::halves_of_e4m3;
using numeric::pack_bf16;
using numeric::pack_f16;

namespace {
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int ROW_BYTES = FP8_KV ? HEAD_DIM : 2 * HEAD_DIM;
constexpr int TILE_BYTES = PAGE_TOKENS * ROW_BYTES;
constexpr int STAGES = FP8_KV ? 6 : 3;
constexpr int NUM_CONSUMER_WARPS = 4;
constexpr int NUM_CONSUMERS = 32 * NUM_CONSUMER_WARPS;
constexpr int SCHEDULE_THREADS = 1024;
constexpr int MIN_CHUNK_PAGES = 4;
constexpr int MAX_CHUNKS = 64;
constexpr int MERGE_PARTS = 4;  // warps per head in the merge
constexpr float LOG2_E = 1.44269504f;
static_assert(GROUP >= 1 && GROUP <= 8 && GROUP * NUM_KV_HEADS == NUM_HEADS);

HW int pages_of(int length) { return (length + PAGE_TOKENS - 1) / PAGE_TOKENS; }

HW int chunk_pages_of(int num_pages) {
  int chunk_pages = MIN_CHUNK_PAGES;
  while (chunk_pages * MAX_CHUNKS < num_pages) chunk_pages *= 2;
  return chunk_pages;
}

HW int chunks_of(int length) {
  const int num_pages = pages_of(length), chunk_pages = chunk_pages_of(num_pages);
  return (num_pages + chunk_pages - 1) / chunk_pages;
}

HW u32 pack_weights(float low, float high) { return FP8_KV ? pack_f16(low, high) : pack_bf16(low, high); }

HW void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if constexpr (FP8_KV) hw::mma_m16n8k16_f16(d, a, b);
  else hw::mma_m16n8k16_bf16(d, a, b);
}

// The A operand of S for step k of 16 dimensions: this lane's head, and the dimensions that load_keys puts at the same places.
HW void load_query(u32 (&a)[8][4], const __nv_bfloat16* q, int lane) {
  const int head = lane >> 2, j = lane & 3;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    a[k][0] = a[k][1] = a[k][2] = a[k][3] = 0;
    if (head >= GROUP) continue;
    const __nv_bfloat162* pairs = (const __nv_bfloat162*)(q + head * HEAD_DIM + k * 16);
    if constexpr (FP8_KV) {
      const float2 low = __bfloat1622float2(pairs[2 * j]), high = __bfloat1622float2(pairs[2 * j + 1]);
      a[k][0] = pack_f16(low.x, low.y);
      a[k][2] = pack_f16(high.x, high.y);
    } else {
      a[k][0] = hw::from_bits<u32>(pairs[j]);
      a[k][2] = hw::from_bits<u32>(pairs[j + 4]);
    }
  }
}

// s[i] += Q . K of this warp's tokens 8 i to 8 i + 7 of the page.
HW void add_scores(float (&s)[2][4], const u32 (&a)[8][4], const unsigned char* keys, int first_token, int lane) {
  if constexpr (FP8_KV) {
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 2) {  // a chunk is a step of 16 dimensions
      u32 r[4];
      hw::ldmatrix_x4(r, keys + chunk_offset<ROW_BYTES>(first_token + (lane & 15), chunk + (lane >> 4)));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 b[2] = {halves_of_e4m3(r[i]), halves_of_e4m3(r[i] >> 16)};
        multiply(s[i & 1], a[chunk + (i >> 1)], b);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) {  // a step of 16 dimensions is two chunks
      u32 r[4];
      hw::ldmatrix_x4(r, keys + chunk_offset<ROW_BYTES>(first_token + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
      const u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
      multiply(s[0], a[k], b0);
      multiply(s[1], a[k], b1);
    }
  }
}

// o += P . V. Tile i of o: dimensions 8 i + 2 j, + 1 in BF16; in e4m3 16 (i / 2) + 4 j, + 2 for even i, one more for odd i. `keep_low` and `keep_high` are masks
// of the pair of tokens 2 j, 2 j + 1 of this warp's first and second eight: what is behind the length may be anything.
HW void add_values(float (&o)[16][4], const u32 (&p)[4], const unsigned char* values, int first_token, u32 keep_low, u32 keep_high,
                   int lane) {
#pragma unroll
  for (int n = 0; n < 16; n += 2) {
    if constexpr (FP8_KV) {
      if (n % 4 != 0) continue;
    }
    u32 r[4];
    const int chunk = FP8_KV ? n / 2 : n;
    hw::ldmatrix_x4_trans(r, values + chunk_offset<ROW_BYTES>(first_token + (lane & 15), chunk + (lane >> 4)));
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const u32 low = r[i] & keep_low, high = r[i + 1] & keep_high;
      if constexpr (FP8_KV) {
        const u32 low0 = halves_of_e4m3(low), low1 = halves_of_e4m3(low >> 16), high0 = halves_of_e4m3(high), high1 = halves_of_e4m3(high >> 16);
        const u32 even[2] = {(low0 & 0xFFFF) | low1 << 16, (high0 & 0xFFFF) | high1 << 16};
        const u32 odd[2] = {low0 >> 16 | (low1 & 0xFFFF0000u), high0 >> 16 | (high1 & 0xFFFF0000u)};
        multiply(o[n + i], p, even);
        multiply(o[n + i + 1], p, odd);
      } else {
        const u32 b[2] = {low, high};
        multiply(o[n + i / 2], p, b);
      }
    }
  }
}

// Where element (i, e) of a lane's o belongs.
HW int dimension_of(int i, int e, int lane) {
  const int j = lane & 3;
  return FP8_KV ? 16 * (i / 2) + 4 * j + 2 * e + i % 2 : 8 * i + 2 * j + e;
}

// Barriers and ring position that producer and consumers advance alike.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  HW void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};
}  // namespace

extern "C" __global__ void __launch_bounds__(SCHEDULE_THREADS)
attention_schedule(const int* __restrict__ lengths, int* __restrict__ items, int* __restrict__ first_items,
                   const int* __restrict__ num_rows, int most_rows) {
  SHARED_ARRAY(int, warp_sums, [32]);
  SHARED_ARRAY(int, firsts, [SCHEDULE_THREADS + 1]);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  hw::griddep_wait();
  hw::griddep_launch();
  const int own = t < min(*num_rows, most_rows) ? chunks_of(max(lengths[t], 0)) : 0;
  int sum = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; i++) sum += warp_sums[i];
  firsts[t + 1] = sum;
  if (t == 0) firsts[0] = 0;
  __syncthreads();
  for (int row = t; row <= most_rows; row += SCHEDULE_THREADS) first_items[row] = firsts[row];
  const int num_items = firsts[SCHEDULE_THREADS];
  for (int item = t; item < num_items; item += SCHEDULE_THREADS) {
    int row = 0;  // the last row that begins at or before the item
#pragma unroll
    for (int step = SCHEDULE_THREADS / 2; step > 0; step /= 2) {
      if (firsts[row + step] <= item) row += step;
    }
    items[2 * item] = row;
    items[2 * item + 1] = item - firsts[row];
  }
}
EXPORT_KERNEL(attention_schedule)

extern "C" __global__ void __launch_bounds__(NUM_CONSUMERS + 32)
attention_partials(const __nv_bfloat16* __restrict__ q, const unsigned char* __restrict__ k_pages, const unsigned char* __restrict__ v_pages,
                   const float* __restrict__ k_scale, const int* __restrict__ page_tables, const int* __restrict__ sequences,
                   const int* __restrict__ lengths, const int* __restrict__ items, const int* __restrict__ first_items,
                   float* __restrict__ sums, float* __restrict__ stats, int most_rows, int max_pages) {
  SHARED_DYNAMIC(ring_memory, 128);  // STAGES times a tile of K and one of V
  SHARED_ARRAY(hw::Barrier, full, [STAGES]);
  SHARED_ARRAY(hw::Barrier, empty, [STAGES]);
  SHARED_ARRAY(float, warp_stats, [NUM_CONSUMER_WARPS][GROUP][2]);
  SHARED_ARRAY(float, warp_sums, [NUM_CONSUMER_WARPS][GROUP][HEAD_DIM]);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  if (t == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      hw::mbarrier_init(&full[stage], 1);
      hw::mbarrier_init(&empty[stage], NUM_CONSUMER_WARPS);
    }
    hw::fence_mbarrier_init();
  }
  __syncthreads();
  hw::griddep_wait();
  hw::griddep_launch();
  const int num_works = first_items[most_rows] * NUM_KV_HEADS;  // (item, KV head), the heads of an item one after the other
  Ring ring;

  if (warp == NUM_CONSUMER_WARPS) {
    if (!hw::elect_one()) return;
    bool is_first_round = true;
    for (int work = blockIdx.x; work < num_works; work += gridDim.x) {
      const int item = work / NUM_KV_HEADS, kv_head = work % NUM_KV_HEADS;
      const int row = items[2 * item], chunk = items[2 * item + 1];
      const int num_pages = pages_of(lengths[row]), chunk_pages = chunk_pages_of(num_pages);
      const int* table = page_tables + (long long)sequences[row] * max_pages;
      const int last = min(num_pages, (chunk + 1) * chunk_pages);
      for (int page = chunk * chunk_pages; page < last; page++) {
        if (!is_first_round) hw::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
        const long long tile = tile_offset<ROW_BYTES>(table[page], kv_head, NUM_KV_HEADS);
        unsigned char* to = ring_memory + ring.stage * 2 * TILE_BYTES;
        hw::mbarrier_arrive_expect_tx(&full[ring.stage], 2 * TILE_BYTES);
        hw::bulk_load(to, k_pages + tile, TILE_BYTES, &full[ring.stage]);
        hw::bulk_load(to + TILE_BYTES, v_pages + tile, TILE_BYTES, &full[ring.stage]);
        ring.advance();
        if (ring.stage == 0) is_first_round = false;
      }
    }
    return;
  }

  const float scale = LOG2_E * 0.08838834764f * (FP8_KV ? *k_scale : 1.f);  // 1 / sqrt(128), for powers of two
  const int head = lane >> 2, j = lane & 3;
  for (int work = blockIdx.x; work < num_works; work += gridDim.x) {
    const int item = work / NUM_KV_HEADS, kv_head = work % NUM_KV_HEADS;
    const int row = items[2 * item], chunk = items[2 * item + 1];
    const int length = lengths[row], num_pages = pages_of(length), chunk_pages = chunk_pages_of(num_pages);
    const int last = min(num_pages, (chunk + 1) * chunk_pages);
    u32 query[8][4];
    load_query(query, q + ((long long)row * NUM_HEADS + kv_head * GROUP) * HEAD_DIM, lane);
    float o[16][4] = {}, largest = -INFINITY, total = 0.f;  // of this lane's head, and of `total` its own tokens only
    for (int page = chunk * chunk_pages; page < last; page++) {
      const unsigned char* keys = ring_memory + ring.stage * 2 * TILE_BYTES;
      hw::mbarrier_wait(&full[ring.stage], ring.parity);
      float s[2][4] = {};
      add_scores(s, query, keys, warp * 16, lane);
      const int first_position = page * PAGE_TOKENS + warp * 16 + 2 * j;
      float page_largest = largest;
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          s[i][e] = first_position + 8 * i + e < length ? s[i][e] * scale : -INFINITY;
          page_largest = fmaxf(page_largest, s[i][e]);
        }
      }
      page_largest = fmaxf(page_largest, __shfl_xor_sync(~0u, page_largest, 1));
      page_largest = fmaxf(page_largest, __shfl_xor_sync(~0u, page_largest, 2));
      const float base = page_largest == -INFINITY ? 0.f : page_largest;
      const float correction = hw::exp2_approx(largest - base);
      largest = page_largest;
      total *= correction;
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          s[i][e] = hw::exp2_approx(s[i][e] - base);
          total += s[i][e];
        }
      }
#pragma unroll
      for (int n = 0; n < 16; n++) {
        o[n][0] *= correction;
        o[n][1] *= correction;
      }
      const u32 weights[4] = {pack_weights(s[0][0], s[0][1]), 0, pack_weights(s[1][0], s[1][1]), 0};
      u32 keep[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int position = first_position + 8 * i;
        keep[i] = (position < length ? 0x0000FFFFu : 0) | (position + 1 < length ? 0xFFFF0000u : 0);
      }
      add_values(o, weights, keys + TILE_BYTES, warp * 16, keep[0], keep[1], lane);
      __syncwarp();
      if (lane == 0) hw::mbarrier_arrive(&empty[ring.stage]);
      ring.advance();
    }

    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (head < GROUP) {
      if (j == 0) {
        warp_stats[warp][head][0] = largest;
        warp_stats[warp][head][1] = total;
      }
#pragma unroll
      for (int n = 0; n < 16; n++) {
        warp_sums[warp][head][dimension_of(n, 0, lane)] = o[n][0];
        warp_sums[warp][head][dimension_of(n, 1, lane)] = o[n][1];
      }
    }
    hw::bar_sync<1>(NUM_CONSUMERS);
    const long long first_head = (long long)item * NUM_HEADS + kv_head * GROUP;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float most = warp_stats[0][g][0];
#pragma unroll
      for (int w = 1; w < NUM_CONSUMER_WARPS; w++) most = fmaxf(most, warp_stats[w][g][0]);
      float sum = 0.f, weight = 0.f;
#pragma unroll
      for (int w = 0; w < NUM_CONSUMER_WARPS; w++) {
        const float factor = hw::exp2_approx(warp_stats[w][g][0] - most);
        sum += factor * warp_sums[w][g][t];
        weight += factor * warp_stats[w][g][1];
      }
      sums[(first_head + g) * HEAD_DIM + t] = sum;
      if (t == 0) {
        stats[(first_head + g) * 2] = most;
        stats[(first_head + g) * 2 + 1] = weight;
      }
    }
    hw::bar_sync<1>(NUM_CONSUMERS);  // all has been read before the next item's sums take its place
  }
}
EXPORT_KERNEL(attention_partials)

// One row and KV head per block; with OUTPUT 1 the row's KV heads are a cluster, which finds the row's largest output.
extern "C" __global__ void __launch_bounds__(32 * GROUP * MERGE_PARTS)
attention_merge(const float* __restrict__ sums, const float* __restrict__ stats, const int* __restrict__ first_items,
                const float* __restrict__ v_scale, const float* __restrict__ static_scale, unsigned char* __restrict__ out,
                float* __restrict__ scale) {
  SHARED_ARRAY(float, part_sums, [MERGE_PARTS][GROUP][HEAD_DIM]);
  SHARED_ARRAY(float, part_weights, [MERGE_PARTS][GROUP]);
  SHARED_ARRAY(float, head_maxima, [GROUP]);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp / GROUP, g = warp % GROUP;
  const int row = blockIdx.x, head = blockIdx.y * GROUP + g;
  hw::griddep_wait();
  hw::griddep_launch();
  const int first = first_items[row], num_chunks = first_items[row + 1] - first;

  float most = -INFINITY;
  for (int chunk = lane; chunk < num_chunks; chunk += 32) most = fmaxf(most, stats[((long long)(first + chunk) * NUM_HEADS + head) * 2]);
  most = hw::warp_max(most);
  float sum[4] = {}, weight = 0.f;
#pragma unroll 4
  for (int chunk = part; chunk < num_chunks; chunk += MERGE_PARTS) {
    const long long place = (long long)(first + chunk) * NUM_HEADS + head;
    const float factor = hw::exp2_approx(stats[place * 2] - most);
    weight += factor * stats[place * 2 + 1];
    const f32x4 piece = hw::ld16<f32x4>(sums + place * HEAD_DIM + lane * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += factor * piece.values[i];
  }
  hw::st16(&part_sums[part][g][lane * 4], f32x4{{sum[0], sum[1], sum[2], sum[3]}});
  if (lane == 0) part_weights[part][g] = weight;
  __syncthreads();
  float amax = 0.f;
  if (part == 0) {
#pragma unroll
    for (int i = 1; i < MERGE_PARTS; i++) {
      const f32x4 piece = hw::ld16<f32x4>(&part_sums[i][g][lane * 4]);
#pragma unroll
      for (int d = 0; d < 4; d++) sum[d] += piece.values[d];
      weight += part_weights[i][g];
    }
    const float factor = num_chunks > 0 ? (FP8_KV ? *v_scale : 1.f) / weight : 0.f;
#pragma unroll
    for (int d = 0; d < 4; d++) {
      sum[d] *= factor;
      amax = fmaxf(amax, fabsf(sum[d]));
    }
  }
  float inverse_scale = 1.f;
  if constexpr (OUTPUT == 1) {
    if (part == 0) {
      amax = hw::warp_max(amax);
      if (lane == 0) head_maxima[g] = amax;
    }
    if constexpr (NUM_KV_HEADS > 1) hw::cluster_sync();
    else __syncthreads();
    float row_amax = numeric::AMAX_FLOOR;
    for (int rank = 0; rank < NUM_KV_HEADS; rank++) {
      const float* theirs = NUM_KV_HEADS > 1 ? hw::cluster_map(&head_maxima[0], rank) : head_maxima;
#pragma unroll
      for (int i = 0; i < GROUP; i++) row_amax = fmaxf(row_amax, theirs[i]);
    }
    if constexpr (NUM_KV_HEADS > 1) hw::cluster_sync();  // no block leaves while others read its maxima
    const float row_scale = row_amax / numeric::E4M3_MAX;
    if (blockIdx.y == 0 && threadIdx.x == 0) scale[row] = row_scale;
    inverse_scale = 1.f / row_scale;
  }
  if constexpr (OUTPUT == 2) inverse_scale = 1.f / *static_scale;
  if (part != 0) return;
  const long long place = ((long long)row * NUM_HEADS + head) * HEAD_DIM + lane * 4;
  if constexpr (OUTPUT == 0) {
    hw::st8(out + place * 2, make_uint2(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3])));
  } else {
    const u32 low = hw::float2_to_e4m3x2(sum[0] * inverse_scale, sum[1] * inverse_scale);
    const u32 high = hw::float2_to_e4m3x2(sum[2] * inverse_scale, sum[3] * inverse_scale);
    *(u32*)(out + place) = low | high << 16;
  }
}
EXPORT_KERNEL(attention_merge)
