// gather_rows - some rows of a step, with their scales, one behind the other: those that reach the output head.
//
//   out[i] = x[rows[i]]   and   out_scale[i] = scale[rows[i]]   for i < num_rows
//
// NeMo, E = 5120 in BF16: a row reads and writes 10,240 B.   M = 64: 1.3 MB, 0.3 us                      (at 4.3 TB/s)
//
// Thread map: ROW_BYTES / 16 pieces, one per thread, NUM_THREADS of them per block: grid (rows, pieces / NUM_THREADS).
// Limits: ROW_BYTES a multiple of 16 (the launcher: of 128); rows lie in x.
//
// History
//   1  one piece per thread                                                            not yet run on hardware
#include "hopper.cuh"

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
gather_rows(const unsigned char* __restrict__ x, const float* __restrict__ scale, const int* __restrict__ rows,
            unsigned char* __restrict__ out, float* __restrict__ out_scale, const int* __restrict__ num_rows) {
  const int piece = blockIdx.y * NUM_THREADS + threadIdx.x;
  const size_t row = blockIdx.x;
  hw::griddep_wait();
  hw::griddep_launch();
  if ((int)row >= *num_rows || piece >= ROW_BYTES / 16) return;
  const size_t source = rows[row];
  hw::st16(out + row * ROW_BYTES + piece * 16, hw::ld16<uint4>(x + source * ROW_BYTES + piece * 16));
  if (scale != nullptr && piece == 0) out_scale[row] = scale[source];
}
EXPORT_KERNEL(gather_rows)
