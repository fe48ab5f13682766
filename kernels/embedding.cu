// embedding - the rows of the token embedding for the tokens of a step.
//
//   out[t] = table[id],   id = token_ids[t], or, where that is negative, last_ids[-1 - token_ids[t]]
//
// A decode row names the slot whose last drawn id it continues (-1 - slot), so the host need not know the id. An id outside
// [0, V) gives a row of NaN, which the sampler's check for finite logits reports, instead of a fault that ends the process.
//
// NeMo, E = 5120: a row reads and writes 10,240 B.   M = 1: launch-bound.   M = 8192: 168 MB, 39 us     (at 4.3 TB/s)
//
// Thread map: HIDDEN / 8 pieces of 16 bytes, one per thread, NUM_THREADS of them per block: grid (tokens, pieces / NUM_THREADS).
// Limits: E a multiple of 8 (the launcher: of 128).
//
// History
//   1  one piece per thread                                                            not yet run on hardware
#include "numeric.cuh"
using namespace numeric;

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
embedding(const __nv_bfloat16* __restrict__ table, const int* __restrict__ token_ids, const int* __restrict__ last_ids,
          __nv_bfloat16* __restrict__ out, const int* __restrict__ num_tokens, int vocab_size) {
  const int piece = blockIdx.y * NUM_THREADS + threadIdx.x;
  const size_t token = blockIdx.x;
  hw::griddep_wait();
  hw::griddep_launch();
  if ((int)token >= *num_tokens || piece >= HIDDEN / 8) return;
  int id = token_ids[token];
  if (id < 0) id = last_ids[-1 - id];
  bf16x8 values;
#pragma unroll
  for (int i = 0; i < 4; i++) values.pairs[i] = __floats2bfloat162_rn(__int_as_float(0x7fc00000), __int_as_float(0x7fc00000));
  if (id >= 0 && id < vocab_size) values = hw::ld16<bf16x8>(table + (size_t)id * HIDDEN + piece * 8);
  hw::st16(out + token * HIDDEN + piece * 8, values);
}
EXPORT_KERNEL(embedding)
