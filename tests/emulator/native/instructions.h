// instructions.h - the emulator's functions that hopper.cuh and builtins.h call, one for each instruction. Definitions:
// the .cpp files.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>

#include <vector_types.h>

namespace emu {

using Location = std::source_location;
using Barrier = unsigned long long;
enum class Element : uint32_t { bf16, f16, e4m3 };
enum class Atomic : uint32_t { add, min, max, exchange, compare_swap, inc, dec, bit_and, bit_or, bit_xor };

// The part of a thread's state that kernels read; the rest is in state.h.
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
  uint32_t number, lane, warp;  // number: within the block
};
extern Thread* current;

struct Coordinates {
  int at[5] = {};
  Coordinates() = default;
  template <class... I>
  explicit Coordinates(int x, I... rest) : at{x, rest...} {}
};

// shared memory
struct SharedArray {  // one SHARED_ARRAY in the source
  size_t num_bytes, alignment;
  const char* name;
};
void* shared_array(SharedArray* site);
void* shared_dynamic(uint32_t alignment);
uint32_t shared_address(const void* p, Location at);

// memory
void check_vector(const void* p, uint32_t num_bytes, bool write, Location at);
void load_nc(void* to, const void* p, uint32_t num_bytes, Location at);
void prefetch(const void* p, uint32_t num_bytes, Location at);
void thread_fence(bool device_wide, Location at);
uint64_t atomic(Atomic operation, void* p, uint32_t num_bytes, char type, uint64_t operand, uint64_t compare,
                Location at);

// arithmetic
uint32_t e4m3x2_to_f16x2(uint16_t pair);
uint16_t float2_to_e4m3x2(float low, float high);
float exp2_flushed(float x);
float log2_flushed(float x);

// warps, blocks, clusters, grids
uint64_t shuffle(uint64_t bits, int source_lane, uint32_t mask, Location at);
uint32_t ballot(bool value, uint32_t mask, Location at);
enum class Reduction : uint32_t { add, min_signed, max_signed, min_unsigned, max_unsigned, bit_and, bit_or, bit_xor };
uint32_t reduce(Reduction operation, uint32_t value, uint32_t mask, Location at);
uint32_t match_any(uint64_t value, uint32_t mask, Location at);
uint32_t active_mask(Location at);
void sync_warp(uint32_t mask, Location at);
bool elect_one(Location at);
void bar_sync(uint32_t id, uint32_t num_threads, Location at);
void bar_arrive(uint32_t id, uint32_t num_threads, Location at);
uint32_t bar_reduce(int operation, int predicate, Location at);  // 0 count, 1 and, 2 or
void setmaxnreg(uint32_t registers, Location at);
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(Location at);
void cluster_wait(Location at);
uint64_t cluster_map(const void* p, uint32_t rank, Location at);
void griddep_wait(Location at);
void griddep_launch(Location at);

// mbarriers and fences
void mbarrier_init(Barrier* b, uint32_t count, Location at);
void mbarrier_inval(Barrier* b, Location at);
void mbarrier_arrive(Barrier* b, uint32_t expect_bytes, Location at);
void mbarrier_arrive_cluster(Barrier* b, uint32_t rank, Location at);
void mbarrier_expect_tx(Barrier* b, uint32_t num_bytes, Location at);
bool mbarrier_try_wait(Barrier* b, uint32_t parity, Location at);
void fence_mbarrier_init(Location at);
void fence_proxy_async(Location at);

// asynchronous copies
void cp_async_16(void* to, const void* from, uint32_t num_source_bytes, Location at);
void cp_async_commit(Location at);
void cp_async_wait(uint32_t num_groups, Location at);
void bulk_load(void* to, const void* from, uint32_t num_bytes, Barrier* b, uint32_t mask, Location at);
void bulk_store(void* to, const void* from, uint32_t num_bytes, Location at);
void bulk_commit(Location at);
void bulk_wait(uint32_t num_groups, bool only_reads, Location at);
void tma_load(void* to, const void* map, Barrier* b, Coordinates where, uint32_t rank, uint32_t mask, Location at);
void tma_store(const void* map, const void* from, Coordinates where, uint32_t rank, Location at);
void prefetch_tensor_map(const void* map, Location at);

// matrices
void ldmatrix(uint32_t* registers, uint32_t num_matrices, const void* row, bool transposed, Location at);
void stmatrix(void* row, uint32_t num_matrices, const uint32_t* registers, bool transposed, Location at);
void mma(float* d, const uint32_t* a, const uint32_t* b, Element element, Location at);
void wgmma_fence(Location at);
void wgmma_commit(Location at);
void wgmma_wait(uint32_t num_groups, Location at);
void wgmma(float* d, uint32_t n, Element element, uint64_t a, uint64_t b, int accumulate, int transpose_a,
           int transpose_b, Location at);
void wgmma_ra(float* d, uint32_t n, Element element, const uint32_t* a, uint64_t b, int accumulate, int transpose_b,
              Location at);

}  // namespace emu
