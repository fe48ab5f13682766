// scatter - single words of a memory set to given values: what changes on the device between two steps.
//
//   memory[updates[i].place] = updates[i].value   for i < num_updates
//
// A step of decodes changes a page id for every 64th of its rows; a row that begins brings some thirty words of parameters,
// and its pages. An update takes 8 bytes from the host, and 4 bytes of a sector of 32 in the memory.
//
// 4 updates: launch-bound.   8192 updates: 65 KB read, 0.26 MB written, 0.08 us                       (at 4.3 TB/s)
//
// Thread map: an update per thread, and the next one as many further on as there are threads in the grid.
// Limits: places lie in the memory, each at most once in a launch.
//
// History
//   1  an update per thread                                                             not yet run on hardware
#include "hopper.cuh"

namespace {
struct alignas(8) Update {
  int place, value;
};
}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
scatter(const int* __restrict__ updates, int* __restrict__ memory, const int* __restrict__ num_updates) {
  hw::griddep_wait();
  hw::griddep_launch();
  const int count = *num_updates;
  for (int i = blockIdx.x * NUM_THREADS + threadIdx.x; i < count; i += gridDim.x * NUM_THREADS) {
    const Update update = hw::ld8<Update>(updates + 2 * i);
    memory[update.place] = update.value;
  }
}
EXPORT_KERNEL(scatter)
