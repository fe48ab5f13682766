// select.cuh - finds in a row of logits where the sorted order's first k tokens, or first share of the mass, end. No sorting.
//
// Tokens are ordered by falling logit, the lowest id first among equals. An Entry holds both in one integer that rises with the order's
// rank from last to first: 32 bits of the logit, then 18 bits of (2^18 - 1 - id). No two are equal, so a prefix of the order is one number,
// its smallest entry. A radix select finds it digit by digit from the top: histogram of the digit among entries that share
// the digits so far, scan from the highest bin, go into the bin where the prefix ends. Counts and masses are integers, so neither the order
// of additions nor the number of threads can change the result.
//
// Logits are looked at in groups of 128, one 16-byte load by each lane of a warp. The maxima of the groups give a pivot: at least k tokens
// are not below the k-th largest of them, and hardly more, so that usually a short list in shared memory is all that is sorted through.
#pragma once
#include "numeric.cuh"

namespace select_ {
using hw::u32;
using hw::u64;
using Entry = u64;

constexpr int NUM_THREADS = 512;
constexpr int NUM_WARPS = NUM_THREADS / 32;
constexpr int GROUP = 128;
constexpr int ID_BITS = 18;
constexpr int MAX_VOCAB = 1 << ID_BITS;
constexpr int NUM_BINS = 2048;
constexpr int BINS_PER_THREAD = NUM_BINS / NUM_THREADS;
constexpr int LIST_CAPACITY = 1536;
constexpr u32 KEY_OF_MINUS_INFINITY = 0x007FFFFF;
constexpr u32 KEY_OF_INFINITY = 0xFF800000;

// Rises with x; +-0 are equal. NaN ranks as -infinity.
HW u32 key_of(float x) {
  const u32 bits = __float_as_uint((x != x ? -INFINITY : x) + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
HW float logit_of_key(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }
HW Entry entry_of(u32 key, int id) { return (u64)key << ID_BITS | (u32)(MAX_VOCAB - 1 - id); }
HW int id_of(Entry entry) { return MAX_VOCAB - 1 - (int)(entry & (MAX_VOCAB - 1)); }
HW u32 key_of_entry(Entry entry) { return (u32)(entry >> ID_BITS); }

struct Workspace {
  Entry list[LIST_CAPACITY];
  u64 masses[NUM_BINS];
  u32 counts[NUM_BINS];
  u64 warp_masses[NUM_WARPS];
  u32 warp_counts[NUM_WARPS];
  u64 chosen_mass;
  u32 chosen_bin, chosen_before, chosen_count;
  int list_size;
};

// Largest (value, of equals the largest tie) over the block; one barrier before, one after the warps' results. `values`, `ties` [NUM_WARPS].
HW void block_best(u64& value, u32& tie, u64* values, u32* ties) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  auto reduce = [&]() {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
      const u64 other = __shfl_xor_sync(~0u, value, offset);
      const u32 other_tie = __shfl_xor_sync(~0u, tie, offset);
      if (other > value || (other == value && other_tie > tie)) {
        value = other;
        tie = other_tie;
      }
    }
  };
  reduce();
  __syncthreads();  // whoever used values and ties before is done
  if (lane == 0) {
    values[warp] = value;
    ties[warp] = tie;
  }
  __syncthreads();
  const int num_warps = blockDim.x >> 5;
  value = lane < num_warps ? values[lane] : 0;
  tie = lane < num_warps ? ties[lane] : 0;
  reduce();
}

// Calls visit(entry) for every token of a row whose group is wanted: is_wanted(group maximum).
template <class IsWanted, class Visit>
HW void for_each_token(const float* row, const u32* group_maxima, int vocab_size, IsWanted is_wanted, Visit visit) {
  const int lane = threadIdx.x & 31, num_groups = (vocab_size + GROUP - 1) / GROUP;
#pragma unroll 4
  for (int group = threadIdx.x >> 5; group < num_groups; group += NUM_WARPS) {
    if (!is_wanted(group_maxima[group])) continue;
    const int id = group * GROUP + lane * 4;
    if (id >= vocab_size) continue;
    const numeric::f32x4 piece = hw::ld16<numeric::f32x4>(row + id);
#pragma unroll
    for (int i = 0; i < 4; i++) visit(entry_of(key_of(piece.values[i]), id + i));
  }
}

// Where a prefix ends: its smallest entry (or what is just below it, where a whole bin is taken), and how many entries it has.
struct Prefix {
  Entry last;
  u32 count;
};

// The longest prefix with fewer than `num_wanted` entries before its last (IS_MASS false), or with less than `share` of the total mass before its
// last. for_each(visit) offers this thread's entries, the same at every call; mass_of(entry) weighs one. `rest` is mass that counts in the
// total but lies behind all entries. All threads of the block call it and get the same answer.
template <bool IS_MASS, class ForEach, class MassOf>
HW Prefix select_prefix(Workspace& work, ForEach for_each, MassOf mass_of, u32 num_wanted, double share, u64 rest) {
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  Entry upper = 0;  // the digits found so far
  int upper_shift = 50;
  u32 count_before = 0;
  u64 mass_before = 0;
  double wanted_mass = 0.0;
  for (int level = 0;; level++) {
    const int shift = level == 0 ? 39 : level == 1 ? 28 : level == 2 ? 18 : level == 3 ? 9 : 0;  // digits of 11, 11, 10, 9 and 9 bits
    const u32 digit_mask = (1u << (upper_shift - shift)) - 1;
    for (int bin = t; bin < NUM_BINS; bin += NUM_THREADS) {
      work.counts[bin] = 0;
      if constexpr (IS_MASS) work.masses[bin] = 0;
    }
    if (t == 0) work.chosen_bin = NUM_BINS;
    __syncthreads();
    for_each([&](Entry entry) {
      if (entry >> upper_shift != upper) return;
      const u32 bin = (u32)(entry >> shift) & digit_mask;
      atomicAdd(&work.counts[bin], 1u);
      if constexpr (IS_MASS) atomicAdd(&work.masses[bin], mass_of(entry));
    });
    __syncthreads();

    // From the highest bin down: thread t has BINS_PER_THREAD of them, and learns what lies before its first.
    const int first_bin = NUM_BINS - 1 - t * BINS_PER_THREAD;
    u32 own_count = 0;
    u64 own_mass = 0;
#pragma unroll
    for (int i = 0; i < BINS_PER_THREAD; i++) {
      own_count += work.counts[first_bin - i];
      if constexpr (IS_MASS) own_mass += work.masses[first_bin - i];
    }
    u32 count = own_count;
    u64 mass = own_mass;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const u32 other_count = __shfl_up_sync(~0u, count, offset);
      const u64 other_mass = IS_MASS ? __shfl_up_sync(~0u, mass, offset) : 0;
      if (lane >= offset) {
        count += other_count;
        mass += other_mass;
      }
    }
    if (lane == 31) {
      work.warp_counts[warp] = count;
      work.warp_masses[warp] = mass;
    }
    __syncthreads();
    u64 total_mass = 0;
    for (int i = 0; i < NUM_WARPS; i++) {
      if (i < warp) {
        count += work.warp_counts[i];
        mass += work.warp_masses[i];
      }
      total_mass += work.warp_masses[i];
    }
    if (IS_MASS && level == 0) wanted_mass = (double)(total_mass + rest) * share;

    // The prefix ends in the lowest bin that is not empty and of which it wants the first entry.
    u32 its_bin = NUM_BINS, its_before = 0, its_count = 0;
    u64 its_mass_before = 0;
    count += count_before - own_count;
    mass += mass_before - own_mass;
#pragma unroll
    for (int i = 0; i < BINS_PER_THREAD; i++) {
      const u32 bin_count = work.counts[first_bin - i];
      if (bin_count > 0 && (IS_MASS ? (double)mass < wanted_mass : count < num_wanted)) {
        its_bin = first_bin - i;
        its_before = count;
        its_count = bin_count;
        its_mass_before = mass;
      }
      count += bin_count;
      if constexpr (IS_MASS) mass += work.masses[first_bin - i];
    }
    if (its_bin < NUM_BINS) atomicMin(&work.chosen_bin, its_bin);
    __syncthreads();
    const u32 chosen = work.chosen_bin;
    if (chosen == its_bin && chosen < NUM_BINS) {
      work.chosen_before = its_before;
      work.chosen_count = its_count;
      work.chosen_mass = its_mass_before;
    }
    __syncthreads();
    if (chosen == NUM_BINS) return {~(Entry)0, 0};  // nothing was offered, or nothing wanted
    count_before = work.chosen_before;
    mass_before = work.chosen_mass;
    upper = upper << (upper_shift - shift) | chosen;
    upper_shift = shift;
    const u32 chosen_count = work.chosen_count;
    // A bin taken whole needs no further digit. Nor does a single entry; after the last digit there is only that.
    const bool is_whole = chosen_count == 1 || (!IS_MASS && count_before + chosen_count <= num_wanted);
    if (is_whole) return {upper << shift, count_before + chosen_count};
  }
}

// Appends to the list; list_size may exceed the capacity, and what is over is lost.
HW void append(Workspace& work, Entry entry) {
  const int place = atomicAdd(&work.list_size, 1);
  if (place < LIST_CAPACITY) work.list[place] = entry;
}
}  // namespace select_
