// sample - one id per row from its logits: rules, temperature, top-k / top-p / min-p, and Gumbel-max; or the largest logit.
//
// sample_scan, a tile of TILE logits per thread block:
//   x = logit, penalised (repetition over prompt and output, presence and frequency over the output), + bias, -infinity where mask, endings
//   before min_tokens or bad words forbid it. Rows with a rule get x written to `adjusted`; a row without has none and its logits are x.
//   Per group of 128 the largest x (as an ordered key); per tile whether all logits are finite; of rows that draw from everything, the tile's
//   best x / temperature + noise; of rows that forbid ids, the tile's best before that (drawn when nothing else is left).
// sample_draw, a row per thread block:
//   greedy, and rows that draw from everything: the best of the groups or tiles. Other rows: where the kept prefix of the sorted order ends
//   (select.cuh), then the best x / temperature + noise in it. Then the slot's state takes the id.
// All that decides is a maximum, an integer sum or elementwise, so a row's id depends on its logits, parameters and history alone.
//
// NeMo, V = 131072: a row reads 524,288 B; with a rule it also writes as much, with penalties it also reads 524,288 B of counts.
//   S = 1: 0.5 MB, launch-bound.   S = 64: 34 MB, 7.8 us.   S = 256: 134 MB, 31 us                  (at 4.3 TB/s, one read)
//   sample_draw reads top-k rows' best groups only (k * 512 B), top-p rows once more.
//
// Thread map: sample_scan, warp w of 8, step j of 4: logits j * 1024 + w * 128 + lane * 4 of the tile. sample_draw, 32 warps, a group a turn.
// Limits: V a multiple of 8, at most 262,144. NaN ranks as -infinity; +infinity is drawn as by a greedy row; both clear is_finite, as
// -infinity does. An id within [0, V) is drawn in any case.
//
// History
//   1  two kernels; groups' maxima give the select's pivot; FP32 bounds spare all but a few FP64 logarithms    not yet run on hardware
#include "noise.cuh"
#include "select.cuh"
using namespace select_;
using transcendental::exp_f64;

namespace {
constexpr int SCAN_THREADS = 256;
constexpr int TILE = 4096;
constexpr int STEPS = TILE / (SCAN_THREADS * 4);
constexpr int GROUPS_PER_TILE = TILE / GROUP;
constexpr u32 IN_PROMPT = 0x80000000u;  // of a token's history; the other bits count it in the output
constexpr int MAX_PIVOT_GROUPS = 1024;  // hardly more tokens are at or above the pivot, so that they fit into the list
constexpr double MASS_UNITS = 0x1p44;

enum { TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, NUM_REALS };
enum { SEED, TOP_K, MIN_TOKENS, NUM_TOPS, NUM_INTEGERS };
enum { NUM_BIASES, NUM_BAD_WORDS, NUM_ENDINGS, NUM_COUNTS };

// What a row does, from its slot's parameters.
struct Row {
  const double* reals;
  const long long* integers;
  const int* counts;
  int vocab_size;
  HW bool has_penalties() const { return reals[REPETITION] != 1.0 || reals[PRESENCE] != 0.0 || reals[FREQUENCY] != 0.0; }
  HW bool is_random() const { return reals[TEMPERATURE] > 0.0; }
  HW bool is_filtered() const { return integers[TOP_K] < vocab_size || reals[TOP_P] < 1.0 || reals[MIN_P] > 0.0; }
  HW bool may_forbid(int num_outputs) const {
    return counts[NUM_BAD_WORDS] > 0 || (counts[NUM_ENDINGS] > 0 && num_outputs < integers[MIN_TOKENS]);
  }
  HW bool has_rules(int num_outputs, int mask_row) const {
    return has_penalties() || counts[NUM_BIASES] > 0 || mask_row >= 0 || may_forbid(num_outputs);
  }
};

HW Row row_of(int slot, const double* reals, const long long* integers, const int* counts, int vocab_size) {
  return {reals + (long long)slot * NUM_REALS, integers + (long long)slot * NUM_INTEGERS, counts + slot * NUM_COUNTS, vocab_size};
}

HW float penalised(float x, u32 history, const double* reals) {
  const u32 count = history & ~IN_PROMPT;
  double y = x;
  if (history != 0) y = x > 0.f ? y / reals[REPETITION] : y * reals[REPETITION];
  y -= (count > 0 ? 1.0 : 0.0) * reals[PRESENCE] + (double)count * reals[FREQUENCY];
  if (y > 0x1.fffffep127) y = 0x1.fffffep127;
  if (y < -0x1.fffffep127) y = -0x1.fffffep127;
  return (float)y;
}

// Order-preserving integer of a score that is not NaN, never 0.
HW u64 key_of_score(double score) {
  const u64 bits = hw::from_bits<u64>(score + 0.0);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// Keeps the larger score, of equals the lower id. A tie stands for an id and falls with it, because block_best wants it so.
HW u32 tie_of(int id) { return (u32)(MAX_VOCAB - id); }
HW int id_of_tie(u32 tie) { return MAX_VOCAB - (int)tie; }
HW void keep_better(u64& best, u32& tie, u64 score, u32 its_tie) {
  if (score > best || (score == best && its_tie > tie)) {
    best = score;
    tie = its_tie;
  }
}
HW void offer(u64& best, u32& tie, double score, int id) { keep_better(best, tie, key_of_score(score), tie_of(id)); }
}  // namespace

extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
sample_scan(const float* __restrict__ logits, const int* __restrict__ slots, const int* __restrict__ positions,
            const int* __restrict__ mask_rows, const u32* __restrict__ masks, const double* __restrict__ reals,
            const long long* __restrict__ integers, const int* __restrict__ counts, const u32* __restrict__ histories,
            const int* __restrict__ num_outputs, const int* __restrict__ bias_ids, const float* __restrict__ bias_values,
            const int* __restrict__ bad_words, const int* __restrict__ recent_ids, const int* __restrict__ ending_ids,
            float* __restrict__ adjusted, u32* __restrict__ group_maxima, u32* __restrict__ tile_is_finite,
            u64* __restrict__ tile_scores, u32* __restrict__ tile_ties, Entry* __restrict__ tile_fallbacks,
            const int* __restrict__ num_rows, int vocab_size, int max_biases, int max_bad_words, int word_tokens, int max_endings) {
  SHARED_ARRAY(float, tile, [TILE]);
  SHARED_ARRAY(u64, values, [SCAN_THREADS / 32]);
  SHARED_ARRAY(u32, ties, [SCAN_THREADS / 32]);
  SHARED_ARRAY(u32, best_bound, [SCAN_THREADS / 32]);
  SHARED_ARRAY(u32, is_finite_in_warp, [SCAN_THREADS / 32]);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int first_id = blockIdx.x * TILE, num_tiles = gridDim.x, row_index = blockIdx.y;
  const int num_groups = (vocab_size + GROUP - 1) / GROUP;
  hw::griddep_wait();
  hw::griddep_launch();
  if (row_index >= *num_rows) return;
  const int slot = slots[row_index], mask_row = mask_rows[row_index], outputs = num_outputs[slot];
  const Row row = row_of(slot, reals, integers, counts, vocab_size);
  const long long row_start = (long long)row_index * vocab_size;

  // Element (j, i) of a thread is id first_id + j * 1024 + t * 4 + i.
  float x[STEPS][4];
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    const int id = first_id + j * SCAN_THREADS * 4 + t * 4;
    numeric::f32x4 piece = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
    if (id < vocab_size) piece = hw::ld16<numeric::f32x4>(logits + row_start + id);
#pragma unroll
    for (int i = 0; i < 4; i++) x[j][i] = piece.values[i];
  }
  bool is_finite = true;
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    const int id = first_id + j * SCAN_THREADS * 4 + t * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (id < vocab_size) is_finite &= (__float_as_uint(x[j][i]) & 0x7F800000u) != 0x7F800000u;
    }
  }
  const bool is_warp_finite = __all_sync(~0u, is_finite);
  if (lane == 0) is_finite_in_warp[warp] = is_warp_finite;

  const bool has_rules = row.has_rules(outputs, mask_row);
  if (has_rules) {
    // NOTE: through shared memory and not unrolled: a row with rules is rare, FP64 divisions are long, and lists of ids meet the tile there.
    const u32* mask = masks + (long long)mask_row * ((vocab_size + 31) / 32);
#pragma unroll 1
    for (int place = t * 4; place < TILE && first_id + place < vocab_size; place += SCAN_THREADS * 4) {
      const int id = first_id + place;
      numeric::f32x4 piece = hw::ld16<numeric::f32x4>(logits + row_start + id);
      uint4 history = make_uint4(0, 0, 0, 0);
      if (row.has_penalties()) history = hw::ld16<uint4>(histories + (long long)slot * vocab_size + id);
      const u32 words[4] = {history.x, history.y, history.z, history.w};
      const u32 allowed = mask_row >= 0 ? mask[id >> 5] >> (id & 31) : 15u;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (row.has_penalties()) piece.values[i] = penalised(piece.values[i], words[i], row.reals);
        if (!(allowed >> i & 1)) piece.values[i] = -INFINITY;
      }
      hw::st16(tile + place, piece);
    }
    __syncthreads();
    for (int i = t; i < row.counts[NUM_BIASES]; i += SCAN_THREADS) {
      const int place = bias_ids[(long long)slot * max_biases + i] - first_id;
      if (place >= 0 && place < TILE) tile[place] += bias_values[(long long)slot * max_biases + i];
    }
    __syncthreads();
    if (row.may_forbid(outputs)) {
      Entry best = 0;
      u32 no_tie = 0;
      for (int place = t; place < TILE && first_id + place < vocab_size; place += SCAN_THREADS) {
        best = max(best, entry_of(key_of(tile[place]), first_id + place));
      }
      block_best(best, no_tie, values, ties);
      if (t == 0) tile_fallbacks[(long long)row_index * num_tiles + blockIdx.x] = best;
      // block_best's barriers stand between reading the tile and what is forbidden in it.
      if (outputs < row.integers[MIN_TOKENS]) {
        for (int i = t; i < row.counts[NUM_ENDINGS]; i += SCAN_THREADS) {
          const int place = ending_ids[(long long)slot * max_endings + i] - first_id;
          if (place >= 0 && place < TILE) atomicExch(&tile[place], -INFINITY);
        }
      }
      for (int i = t; i < row.counts[NUM_BAD_WORDS]; i += SCAN_THREADS) {
        // A word is its ids right-aligned behind -1, which matches anything; the last one is forbidden where the others end the output.
        const int* word = bad_words + ((long long)slot * max_bad_words + i) * word_tokens;
        const int* recent = recent_ids + (long long)slot * (word_tokens - 1);
        const int place = word[word_tokens - 1] - first_id;
        bool is_matched = place >= 0 && place < TILE;
        for (int k = word_tokens - 2; k >= 0 && is_matched && word[k] >= 0; k--) is_matched = word[k] == recent[k];
        if (is_matched) atomicExch(&tile[place], -INFINITY);
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      const int place = j * SCAN_THREADS * 4 + t * 4;
      if (first_id + place >= vocab_size) continue;
      const numeric::f32x4 piece = hw::ld16<numeric::f32x4>(tile + place);
      hw::st16(adjusted + row_start + first_id + place, piece);
#pragma unroll
      for (int i = 0; i < 4; i++) x[j][i] = piece.values[i];
    }
  }

#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    u32 key = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) key = max(key, key_of(x[j][i]));
    key = __reduce_max_sync(~0u, key);
    const int group = blockIdx.x * GROUPS_PER_TILE + j * (SCAN_THREADS / 32) + warp;
    if (lane == 0 && group < num_groups) group_maxima[(long long)row_index * num_groups + group] = key;
  }

  const bool draws_from_all = row.is_random() && !row.is_filtered();
  const u64 noise_key = noise::row_key((u64)row.integers[SEED], positions[row_index]);
  float bounds[STEPS][4];  // of the scores, from above
  if (draws_from_all) {
    // What the best score is at least, in FP32: only what may beat that is worth FP64 logarithms.
    const float temperature = (float)row.reals[TEMPERATURE];
    float at_least = -INFINITY;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u64 bits = noise::uniform_bits(noise_key, first_id + j * SCAN_THREADS * 4 + t * 4 + i);
        const float scaled = __fdividef(x[j][i], temperature);
        const float slack = 1e-4f + fabsf(scaled) * 1e-6f;
        const float bound = scaled + noise::gumbel_bound(bits);
        bounds[j][i] = bound + slack;
        const float low = bound - slack - noise::GUMBEL_BOUND_EXCESS;
        if (noise::is_bound_tight(bits) && low > at_least && low < INFINITY) at_least = low;
      }
    }
    const u32 warp_bound = __reduce_max_sync(~0u, key_of(at_least));
    if (lane == 0) best_bound[warp] = warp_bound;
  }
  __syncthreads();
  if (t == 0) {
    u32 all = 1;
    for (int i = 0; i < SCAN_THREADS / 32; i++) all &= is_finite_in_warp[i];
    tile_is_finite[(long long)row_index * num_tiles + blockIdx.x] = all;
  }
  if (!draws_from_all) return;
  u32 at_least_key = 0;
  for (int i = 0; i < SCAN_THREADS / 32; i++) at_least_key = max(at_least_key, best_bound[i]);
  const float at_least = logit_of_key(at_least_key);
  u32 candidates = 0;  // bit 4 j + i
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // NOTE: not "bounds < at_least": infinity minus infinity must stay a candidate.
      if (x[j][i] > -INFINITY && !(bounds[j][i] < at_least)) candidates |= 1u << (4 * j + i);
    }
  }
  const float* source = (has_rules ? adjusted : logits) + row_start;
  u64 best = 0;
  u32 tie = 0;
  while (candidates != 0) {
    const int element = __ffs(candidates) - 1;
    candidates &= candidates - 1;
    const int id = first_id + (element >> 2) * SCAN_THREADS * 4 + t * 4 + (element & 3);
    offer(best, tie, (double)source[id] / row.reals[TEMPERATURE] + noise::gumbel(noise::uniform_bits(noise_key, id)), id);
  }
  block_best(best, tie, values, ties);
  if (t == 0) {
    tile_scores[(long long)row_index * num_tiles + blockIdx.x] = best;
    tile_ties[(long long)row_index * num_tiles + blockIdx.x] = tie;
  }
}
EXPORT_KERNEL(sample_scan)

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
sample_draw(const float* __restrict__ logits, const float* __restrict__ adjusted, const int* __restrict__ slots,
            const int* __restrict__ positions, const int* __restrict__ mask_rows, const double* __restrict__ reals,
            const long long* __restrict__ integers, const int* __restrict__ counts, const u32* __restrict__ group_maxima,
            const u32* __restrict__ tile_is_finite, const u64* __restrict__ tile_scores, const u32* __restrict__ tile_ties,
            const Entry* __restrict__ tile_fallbacks, u32* __restrict__ histories, int* __restrict__ num_outputs,
            int* __restrict__ recent_ids, int* __restrict__ last_ids, int* __restrict__ token_ids, int* __restrict__ is_finite,
            const int* __restrict__ num_rows, int vocab_size, int num_tiles, int word_tokens) {
  SHARED_ARRAY(Workspace, works, [1]);
  Workspace& work = works[0];
  const int t = threadIdx.x, row_index = blockIdx.x;
  const int num_groups = (vocab_size + GROUP - 1) / GROUP;
  hw::griddep_wait();
  hw::griddep_launch();
  if (row_index >= *num_rows) return;
  const int slot = slots[row_index], outputs = num_outputs[slot];
  const Row row = row_of(slot, reals, integers, counts, vocab_size);
  const float* scores = (row.has_rules(outputs, mask_rows[row_index]) ? adjusted : logits) + (long long)row_index * vocab_size;
  const u32* maxima = group_maxima + (long long)row_index * num_groups;
  const long long first_tile = (long long)row_index * num_tiles;

  // The largest logit: its key and the first group that has it.
  u64 largest = 0;
  u32 largest_tie = 0;
  for (int i = t; i < num_groups; i += NUM_THREADS) {
    if (maxima[i] > largest) {
      largest = maxima[i];
      largest_tie = tie_of(i);
    }
  }
  block_best(largest, largest_tie, work.warp_masses, work.warp_counts);
  const u32 largest_key = (u32)largest;

  u64 best = 0;  // and its tie, from which the id follows: MAX_VOCAB - id
  u32 tie = 0;
  if (largest_key == KEY_OF_MINUS_INFINITY) {
    // Nothing is left: the best before bad words and endings, or id 0 of logits that are no numbers.
    if (t == 0) tie = tie_of(0);
    if (row.may_forbid(outputs)) {
      for (int i = t; i < num_tiles; i += NUM_THREADS) {
        if (tile_fallbacks[first_tile + i] > best) {
          best = tile_fallbacks[first_tile + i];
          tie = tie_of(id_of(best));
        }
      }
    }
  } else if (!row.is_random() || largest_key == KEY_OF_INFINITY) {
    const int id = id_of_tie(largest_tie) * GROUP + t;
    if (t < GROUP && id < vocab_size && key_of(scores[id]) == largest_key) {
      best = 1;
      tie = tie_of(id);
    }
  } else if (!row.is_filtered()) {
    for (int i = t; i < num_tiles; i += NUM_THREADS) {
      keep_better(best, tie, tile_scores[first_tile + i], tile_ties[first_tile + i]);
    }
  } else {
    const double temperature = row.reals[TEMPERATURE], top_p = row.reals[TOP_P], min_p = row.reals[MIN_P];
    const long long top_k = row.integers[TOP_K];
    const bool has_top_k = top_k < vocab_size, has_top_p = top_p < 1.0;
    const double largest_score = (double)logit_of_key(largest_key) / temperature;
    auto relative = [&](u32 key) { return (double)logit_of_key(key) / temperature - largest_score; };
    auto mass_of_key = [&](u32 key) { return (u64)(exp_f64(relative(key)) * MASS_UNITS); };
    auto mass_of = [&](Entry entry) { return mass_of_key(key_of_entry(entry)); };
    auto no_mass = [](Entry) { return (u64)0; };

    // A list of the most likely tokens: everything from the pivot on, which is all that top-k needs, and nearly always all that top-p needs.
    bool is_listed = false;
    u64 rest = 0;  // the mass of what is not in the list, where it counts
    if ((has_top_k && top_k <= min(num_groups, MAX_PIVOT_GROUPS)) || (!has_top_k && has_top_p)) {
      const u32 num_pivots = has_top_k ? (u32)top_k : (u32)min(num_groups, MAX_PIVOT_GROUPS / 2);
      auto each_group = [&](auto visit) {
        for (int i = t; i < num_groups; i += NUM_THREADS) visit(entry_of(maxima[i], i));
      };
      const u32 pivot = key_of_entry(select_prefix<false>(work, each_group, no_mass, num_pivots, 0.0, 0).last);
      if (t == 0) work.list_size = 0;
      __syncthreads();
      auto is_wanted = [&](u32 maximum) { return !has_top_k || maximum >= pivot; };
      for_each_token(scores, maxima, vocab_size, is_wanted, [&](Entry entry) {
        if (key_of_entry(entry) >= pivot) append(work, entry);
        else if (!has_top_k) rest += mass_of(entry);
      });
#pragma unroll
      for (int offset = 16; offset > 0; offset >>= 1) rest += __shfl_xor_sync(~0u, rest, offset);
      if ((t & 31) == 0) work.warp_masses[t >> 5] = rest;
      __syncthreads();
      rest = 0;
      for (int i = 0; i < NUM_WARPS; i++) rest += work.warp_masses[i];
      is_listed = work.list_size <= LIST_CAPACITY;
      __syncthreads();
    }
    auto everything = [](u32) { return true; };
    auto each_entry = [&](Entry floor, auto visit) {
      if (is_listed) {
        for (int i = t; i < work.list_size; i += NUM_THREADS) {
          if (work.list[i] >= floor) visit(work.list[i]);
        }
      } else {
        for_each_token(scores, maxima, vocab_size, everything, [&](Entry entry) {
          if (entry >= floor) visit(entry);
        });
      }
    };
    Entry floor = 0;
    if (has_top_k) {
      floor = select_prefix<false>(work, [&](auto visit) { each_entry(0, visit); }, no_mass, (u32)top_k, 0.0, 0).last;
    }
    while (has_top_p) {
      const Prefix kept = select_prefix<true>(work, [&](auto visit) { each_entry(floor, visit); }, mass_of, 0, top_p, is_listed ? rest : 0);
      const bool may_go_on = is_listed && !has_top_k && kept.count >= (u32)work.list_size;
      if (!may_go_on) {
        floor = kept.last;
        break;
      }
      __syncthreads();  // the list's size is read before anything else
      is_listed = false;  // all of the list is kept, perhaps more: look through the whole row
    }
    const u64 noise_key = noise::row_key((u64)row.integers[SEED], positions[row_index]);
    auto draw = [&](Entry entry) {
      const double its_relative = relative(key_of_entry(entry));
      if (min_p > 0.0 && !(exp_f64(its_relative) >= min_p)) return;
      if (key_of_entry(entry) == KEY_OF_MINUS_INFINITY) return;
      const int id = id_of(entry);
      const double scaled = (double)logit_of_key(key_of_entry(entry)) / temperature;
      offer(best, tie, scaled + noise::gumbel(noise::uniform_bits(noise_key, id)), id);
    };
    each_entry(floor, draw);
  }
  block_best(best, tie, work.warp_masses, work.warp_counts);
  const int id = id_of_tie(tie);

  // The slot's state takes the id. Ids of bad words' prefixes move one place to the left.
  int moved = -1;
  const bool keeps_recent = row.counts[NUM_BAD_WORDS] > 0 && t < word_tokens - 1;
  int* recent = recent_ids + (long long)slot * (word_tokens - 1);
  if (keeps_recent) moved = t + 1 < word_tokens - 1 ? recent[t + 1] : id;
  __syncthreads();
  if (keeps_recent) recent[t] = moved;
  if (t == 0) {
    u32 all = 1;
    for (int i = 0; i < num_tiles; i++) all &= tile_is_finite[first_tile + i];
    is_finite[row_index] = (int)all;
    token_ids[row_index] = id;
    last_ids[slot] = id;
    num_outputs[slot] = outputs + 1;
    if (row.has_penalties()) histories[(long long)slot * vocab_size + id] += 1;
  }
}
EXPORT_KERNEL(sample_draw)
