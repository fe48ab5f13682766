// read_bandwidth - reads memory as fast as it can be read; the ceiling that other kernels' bandwidth is a share of.
//
//   sums[b] = sum of all 32-bit words that block b reads, modulo 2^32
//
// The result depends on every word, so that no read can be left out, and on nothing else: integer sums have no order.
// Timed on 1 GiB, which is 20 times the L2 of an H200: 0.239 ms at 4.5 TB/s. A bandwidth measured by a copy is lower.
//
// Thread map: block b of B reads pieces b * NUM_THREADS + t, then NUM_THREADS * B further, UNROLL of 16 bytes in flight per
// thread. 132 SMs x 2 blocks x 512 threads x 8 x 16 bytes = 17 MB in flight asked for; 64 KB per SM suffice at 700 ns.
// Limits: num_pieces (16 bytes each) at most 2^31, so that no index wraps.
//
// History
//   1  grid-stride, 8 loads of 16 bytes per thread in flight, read-only path     not yet run on hardware
#include "hopper.cuh"

namespace {
struct alignas(16) Piece { unsigned words[4]; };
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
read_bandwidth(const unsigned* __restrict__ data, unsigned* __restrict__ sums, unsigned num_pieces) {
  SHARED_ARRAY(unsigned, warp_sums, [NUM_THREADS / 32]);
  hw::griddep_wait();
  hw::griddep_launch();
  const unsigned t = threadIdx.x;
  const unsigned stride = gridDim.x * NUM_THREADS;
  unsigned sum = 0;
  for (unsigned first = blockIdx.x * NUM_THREADS + t; first < num_pieces; first += stride * UNROLL) {
    Piece pieces[UNROLL] = {};
#pragma unroll
    for (unsigned j = 0; j < UNROLL; j++) {
      const size_t piece = first + (size_t)j * stride;
      if (piece < num_pieces) pieces[j] = hw::ld16_nc<Piece>(data + piece * 4);
    }
#pragma unroll
    for (unsigned j = 0; j < UNROLL; j++) sum += pieces[j].words[0] + pieces[j].words[1] + pieces[j].words[2] + pieces[j].words[3];
  }
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (t % 32 == 0) warp_sums[t / 32] = sum;
  __syncthreads();
  if (t == 0) {
    for (int warp = 1; warp < NUM_THREADS / 32; warp++) sum += warp_sums[warp];
    sums[blockIdx.x] = sum;
  }
}
EXPORT_KERNEL(read_bandwidth)
