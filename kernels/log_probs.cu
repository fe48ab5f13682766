// log_probs - log-softmax of chosen rows at one id each and at their most likely ids, and the id's rank.
//
//   log p(i) = x_i - max x - log(sum_j exp(x_j - max x))            rank(i) = 1 + how many x_j > x_i
//   The sum is of integers, floor(exp * 2^44), so no order of additions can change it. exp in FP32 of the FP32 difference (its error
//   is below 1 ulp), everything after the sum in FP64, rounded once.
//
// NeMo, V = 131072: a row reads 524,288 B twice, the second time mostly from L2.
//   n = 1: 0.5 MB, launch-bound.   n = 256: 134 MB, 31 us                                        (at 4.3 TB/s, one read)
//
// Thread map: a row per thread block of 16 warps; a group of 128 logits per warp and turn. First turn: groups' maxima, kept in shared
// memory. Second turn: sum, rank, and the list of what may be among the most likely (select.cuh), of which the last rank is then counted.
// Limits: V a multiple of 8, at most 262,144; 0 to 32 most likely ids. A row that is not finite gives a log-probability that is not.
//
// History
//   1  two reads, no workspace                                                          not yet run on hardware
#include "select.cuh"
#include "transcendental.cuh"
using namespace select_;

namespace {
constexpr int MAX_TOPS = 32;
constexpr int MAX_GROUPS = MAX_VOCAB / GROUP;
constexpr float MASS_UNITS = 0x1p44f;
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
log_probs(const float* __restrict__ logits, const int* __restrict__ ids, const int* __restrict__ rows, float* __restrict__ chosen_log_probs,
          int* __restrict__ ranks, int* __restrict__ top_ids, float* __restrict__ top_log_probs, const int* __restrict__ num_rows,
          int vocab_size, int num_tops) {
  SHARED_ARRAY(Workspace, works, [1]);
  SHARED_ARRAY(u32, group_maxima, [MAX_GROUPS]);
  SHARED_ARRAY(Entry, tops, [MAX_TOPS]);
  SHARED_ARRAY(int, num_found, [1]);
  SHARED_ARRAY(u32, warp_is_finite, [NUM_WARPS]);
  Workspace& work = works[0];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int num_groups = (vocab_size + GROUP - 1) / GROUP;
  const size_t row_index = blockIdx.x;
  hw::griddep_wait();
  hw::griddep_launch();
  if ((int)row_index >= *num_rows) return;
  const size_t place = rows[row_index];
  const float* row = logits + place * vocab_size;

  bool is_finite = true;
#pragma unroll 8
  for (int group = warp; group < num_groups; group += NUM_WARPS) {
    const int id = group * GROUP + lane * 4;
    u32 key = 0;
    if (id < vocab_size) {
      const numeric::f32x4 piece = hw::ld16<numeric::f32x4>(row + id);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        key = max(key, key_of(piece.values[i]));
        is_finite &= (__float_as_uint(piece.values[i]) & 0x7F800000u) != 0x7F800000u;
      }
    }
    key = __reduce_max_sync(~0u, key);
    if (lane == 0) group_maxima[group] = key;
  }
  const bool is_warp_finite = __all_sync(~0u, is_finite);
  if (lane == 0) warp_is_finite[warp] = is_warp_finite;
  __syncthreads();
  u64 largest_key = 0;
  u32 no_tie = 0;
  for (int i = t; i < num_groups; i += NUM_THREADS) largest_key = max(largest_key, (u64)group_maxima[i]);
  block_best(largest_key, no_tie, work.warp_masses, work.warp_counts);
  const float largest = logit_of_key((u32)largest_key);
  for (int i = 0; i < NUM_WARPS; i++) is_finite &= warp_is_finite[i] != 0;

  // As many groups' maxima as ids are wanted give the pivot; with fewer groups than that, everything is a candidate.
  auto no_mass = [](Entry) { return (u64)0; };
  u32 pivot = 0;
  if (num_tops > 0 && num_tops <= num_groups) {
    auto each_group = [&](auto visit) {
      for (int i = t; i < num_groups; i += NUM_THREADS) visit(entry_of(group_maxima[i], i));
    };
    pivot = key_of_entry(select_prefix<false>(work, each_group, no_mass, (u32)num_tops, 0.0, 0).last);
  }
  if (t == 0) {
    work.list_size = 0;
    num_found[0] = 0;
  }
  __syncthreads();

  const int chosen_id = ids[place];
  const float chosen = row[chosen_id];
  const u32 chosen_key = key_of(chosen);
  u64 sum = 0;
  u32 num_greater = 0;
  auto everything = [](u32) { return true; };
  for_each_token(row, group_maxima, vocab_size, everything, [&](Entry entry) {
    const u32 key = key_of_entry(entry);
    sum += (u64)(transcendental::exp_f32(logit_of_key(key) - largest) * MASS_UNITS);
    num_greater += key > chosen_key;
    if (num_tops > 0 && key >= pivot) append(work, entry);
  });
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, offset);
    num_greater += __shfl_xor_sync(~0u, num_greater, offset);
  }
  if (lane == 0) {
    work.warp_masses[warp] = sum;
    work.warp_counts[warp] = num_greater;
  }
  __syncthreads();
  sum = 0;
  num_greater = 0;
  for (int i = 0; i < NUM_WARPS; i++) {
    sum += work.warp_masses[i];
    num_greater += work.warp_counts[i];
  }
  const double not_a_number = hw::from_bits<double>(0x7FF8000000000000ull);
  const double normaliser = is_finite ? (double)largest + transcendental::log_f64((double)sum * (1.0 / MASS_UNITS)) : not_a_number;
  if (t == 0) {
    chosen_log_probs[row_index] = (float)((double)chosen - normaliser);
    ranks[row_index] = (int)num_greater + 1;
  }
  if (num_tops == 0) return;

  const bool is_listed = work.list_size <= LIST_CAPACITY;
  const int list_size = work.list_size;
  auto each_entry = [&](auto visit) {
    if (is_listed) {
      for (int i = t; i < list_size; i += NUM_THREADS) visit(work.list[i]);
    } else {
      for_each_token(row, group_maxima, vocab_size, everything, visit);
    }
  };
  const Entry floor = select_prefix<false>(work, each_entry, no_mass, (u32)num_tops, 0.0, 0).last;
  each_entry([&](Entry entry) {
    if (entry >= floor) tops[atomicAdd(&num_found[0], 1)] = entry;
  });
  __syncthreads();
  if (t < num_tops) {
    int order = 0;
    for (int i = 0; i < num_tops; i++) order += tops[i] > tops[t];
    top_ids[row_index * num_tops + order] = id_of(tops[t]);
    top_log_probs[row_index * num_tops + order] = (float)((double)logit_of_key(key_of_entry(tops[t])) - normaliser);
  }
}
EXPORT_KERNEL(log_probs)
