// wrong - kernels that each do one thing wrong; test_wrong.py says what the emulator must answer. n is 0: it keeps compilers from knowing better.
#include "hopper.cuh"
#include "wgmma.cuh"
using namespace hw;

#define WRONG(name) \
  extern "C" __global__ void __launch_bounds__(128) name(const int* in, int* out, int n)

// ---- global memory
WRONG(atomic_meets_plain_read) {
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(&out[0], in[0]);
  if (blockIdx.x == 1 && threadIdx.x == 0) out[1] = out[0];
}
WRONG(blocks_exchange_without_fences) {
  if (threadIdx.x == 0) {
    out[1 + blockIdx.x] = in[0];
    if (atomicAdd(&out[0], 1) == 1) out[3] = out[1] + out[2];
  }
}
WRONG(bulk_store_meets_read) {
  SHARED_ARRAY(uint4, tile, [8]);
  if (threadIdx.x < 8) tile[threadIdx.x] = uint4{1, 2, 3, 4};
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, tile, 128);
    bulk_commit();
    bulk_wait<0>();
  }
  if (threadIdx.x == 64) out[64] = out[0];
}
WRONG(before_the_start) { out[n - 1] = in[0]; }
WRONG(null_pointer) { ((int*)0)[n + 1] = in[0]; }
WRONG(misaligned_word) { *(int*)((char*)out + 2 + n) = in[0]; }

// ---- what a processor itself refuses
WRONG(unmapped_memory) { ((int*)0)[n + 1000] = in[0]; }
WRONG(division_by_zero) { out[threadIdx.x] = in[0] / n; }
WRONG(too_much_local_memory) {
  volatile int room[40000];
  room[n] = in[0];
  out[threadIdx.x] = room[n];
}

// ---- memory of one's own
WRONG(local_memory_of_another) {
  SHARED_ARRAY(int*, place, [1]);
  int mine[4] = {in[0], n, 0, 0};
  if (threadIdx.x == 0) place[0] = mine;
  __syncthreads();
  if (threadIdx.x == 1) place[0][n] = 1;
  __syncthreads();
  out[threadIdx.x] = mine[n];
}
WRONG(too_much_static) {
  SHARED_ARRAY(float, large, [12289]);
  large[threadIdx.x] = 0;
  out[threadIdx.x] = (int)large[threadIdx.x];
}
WRONG(too_much_in_all) {
  SHARED_ARRAY(float, large, [12000]);
  SHARED_DYNAMIC(memory, 16);
  memory[threadIdx.x] = 0;
  large[threadIdx.x] = 0;
}
WRONG(under_aligned_dynamic) {
  SHARED_DYNAMIC(memory, 16);
  st16((unsigned char*)memory + 8, uint4{});
}

// ---- warps and blocks
WRONG(asks_for_active_lanes) { out[threadIdx.x] = (int)__activemask(); }
WRONG(mask_without_the_caller) { out[threadIdx.x] = __shfl_sync(0xffff, in[0], 0); }
WRONG(lane_outside_of_the_mask) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, in[0], 20);
}
WRONG(barrier_for_half_a_warp) { bar_sync<1>(48); }
WRONG(barrier_for_too_many) { bar_sync<1>(256); }
WRONG(registers_out_of_range) { setmaxnreg_dec<16>(); }
WRONG(matrix_in_half_a_warp) {
  SHARED_ARRAY(uint4, tile, [32]);
  u32 r[4];
  if (threadIdx.x < 32) tile[threadIdx.x] = uint4{};
  __syncthreads();
  if (threadIdx.x < 16) ldmatrix_x4(r, &tile[threadIdx.x]);
}
WRONG(never_waits_for_the_kernel_before) { n++; }

// ---- mbarriers and copies
WRONG(barrier_not_initialised) {
  SHARED_ARRAY(Barrier, b, [1]);
  mbarrier_arrive(b);
}
WRONG(barrier_initialised_twice) {
  SHARED_ARRAY(Barrier, b, [1]);
  if (threadIdx.x == 0) mbarrier_init(b, 1), mbarrier_init(b, 1);
}
WRONG(barrier_overwritten) {
  SHARED_ARRAY(Barrier, b, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    b[0] = n;
    mbarrier_arrive(b);
  }
}
WRONG(too_many_bytes_expected) {
  SHARED_ARRAY(Barrier, b, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    mbarrier_expect_tx(b, 1 << 20);
  }
}
WRONG(load_nobody_waits_for) {
  SHARED_ARRAY(uint4, tile, [8]);
  SHARED_ARRAY(Barrier, b, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(b, 128);
    bulk_load(tile, in, 128, b);
  }
}
WRONG(bulk_load_of_odd_size) {
  SHARED_ARRAY(uint4, tile, [8]);
  SHARED_ARRAY(Barrier, b, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
    bulk_load(tile, in, 120, b);
  }
}
WRONG(load_over_ordinary_writes) {
  SHARED_ARRAY(uint4, tile, [128]);
  SHARED_ARRAY(Barrier, b, [1]);
  tile[threadIdx.x] = uint4{};
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(b, 128);
    bulk_load(tile, in, 128, b);
  }
  mbarrier_wait(b, 0);
}
WRONG(copies_nobody_waits_for) {
  SHARED_ARRAY(uint4, tile, [128]);
  cp_async_16(&tile[threadIdx.x], in);
  cp_async_commit();
}
WRONG(store_reuses_its_memory) {
  SHARED_ARRAY(uint4, tile, [8]);
  if (threadIdx.x < 8) tile[threadIdx.x] = uint4{1, 1, 1, 1};
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, tile, 128);
    bulk_commit();
    tile[n] = uint4{2, 2, 2, 2};
    bulk_wait<0>();
  }
}
WRONG(not_a_tensor_map) {
  SHARED_ARRAY(uint4, tile, [8]);
  SHARED_ARRAY(Barrier, b, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    const TensorMap map = {};
    tma_load_2d(tile, &map, b, 0, 0);
  }
}

// ---- wgmma
WRONG(accumulators_touched_in_flight) {
  SHARED_DYNAMIC(memory, 1024);
  for (int i = threadIdx.x; i < 72 * 128; i += 128) memory[i] = 0;
  fence_proxy_async();
  __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma_m64k32_e4m3<8>(d, wgmma_descriptor(memory, 128, 1024), wgmma_descriptor(memory + 8192, 128, 1024), 0);
  wgmma_commit();
  d[n] = 1.f;
  wgmma_wait<0>();
  out[threadIdx.x] = (int)d[1];
}
WRONG(warps_disagree) {
  SHARED_DYNAMIC(memory, 1024);
  for (int i = threadIdx.x; i < 72 * 128; i += 128) memory[i] = 0;
  fence_proxy_async();
  __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma_m64k32_e4m3<8>(d, wgmma_descriptor(memory, 128, 1024) + (threadIdx.x < 32 ? 2 : 0), wgmma_descriptor(memory + 8192, 128, 1024), 0);
  wgmma_commit();
  wgmma_wait<0>();
}
WRONG(operand_not_fenced) {
  SHARED_DYNAMIC(memory, 1024);
  for (int i = threadIdx.x; i < 72 * 128; i += 128) memory[i] = 0;
  __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma_m64k32_e4m3<8>(d, wgmma_descriptor(memory, 128, 1024), wgmma_descriptor(memory + 8192, 128, 1024), 0);
  wgmma_commit();
  wgmma_wait<0>();
}
WRONG(operand_overwritten_by_another_warp) {
  SHARED_DYNAMIC(memory, 1024);
  for (int i = threadIdx.x; i < 72 * 128; i += 128) memory[i] = 0;
  fence_proxy_async();
  __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma_m64k32_e4m3<8>(d, wgmma_descriptor(memory, 128, 1024), wgmma_descriptor(memory + 8192, 128, 1024), 0);
  wgmma_commit();
  wgmma_wait<0>();  // says nothing of the other warps
  memory[8192 + threadIdx.x] = 1;
}

EXPORT_KERNEL(atomic_meets_plain_read)
EXPORT_KERNEL(blocks_exchange_without_fences)
EXPORT_KERNEL(bulk_store_meets_read)
EXPORT_KERNEL(before_the_start)
EXPORT_KERNEL(null_pointer)
EXPORT_KERNEL(misaligned_word)
EXPORT_KERNEL(unmapped_memory)
EXPORT_KERNEL(division_by_zero)
EXPORT_KERNEL(too_much_local_memory)
EXPORT_KERNEL(local_memory_of_another)
EXPORT_KERNEL(too_much_static)
EXPORT_KERNEL(too_much_in_all)
EXPORT_KERNEL(under_aligned_dynamic)
EXPORT_KERNEL(asks_for_active_lanes)
EXPORT_KERNEL(mask_without_the_caller)
EXPORT_KERNEL(lane_outside_of_the_mask)
EXPORT_KERNEL(barrier_for_half_a_warp)
EXPORT_KERNEL(barrier_for_too_many)
EXPORT_KERNEL(registers_out_of_range)
EXPORT_KERNEL(matrix_in_half_a_warp)
EXPORT_KERNEL(never_waits_for_the_kernel_before)
EXPORT_KERNEL(barrier_not_initialised)
EXPORT_KERNEL(barrier_initialised_twice)
EXPORT_KERNEL(barrier_overwritten)
EXPORT_KERNEL(too_many_bytes_expected)
EXPORT_KERNEL(load_nobody_waits_for)
EXPORT_KERNEL(bulk_load_of_odd_size)
EXPORT_KERNEL(load_over_ordinary_writes)
EXPORT_KERNEL(copies_nobody_waits_for)
EXPORT_KERNEL(store_reuses_its_memory)
EXPORT_KERNEL(not_a_tensor_map)
EXPORT_KERNEL(accumulators_touched_in_flight)
EXPORT_KERNEL(warps_disagree)
EXPORT_KERNEL(operand_not_fenced)
EXPORT_KERNEL(operand_overwritten_by_another_warp)
