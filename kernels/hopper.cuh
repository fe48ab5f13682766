// hopper.cuh - every PTX instruction of this project, each behind a named function.
//
// A function holds two bodies: HW_EITHER(what NVRTC compiles for sm_90a, what the emulator under tests/emulator does).
// Kernels contain no asm, no #ifdef and no __shared__, so the same .cu file runs on a GPU and, built by g++, on the CPU.
// Each function has a unit kernel in tests/kernels/units.cu. wgmma.cuh (generated) holds the warpgroup matrix
// instructions; a kernel that needs them includes it after this file.
//
// Sources: PTX ISA 8.x (section titles are the instruction names); spellings compared with NVIDIA/cutlass,
// include/cute/arch. Nothing here has run on hardware yet; tests/emulator/README.md lists what to verify first.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define HW __device__ __forceinline__
#define HW_EITHER(device, emulated) device
#define HW_AT  // the emulator's functions take the caller's source line as last argument: not here
#define HW_AT_ALONE
#define HW_PASS_AT
#define SHARED_ARRAY(T, name, dims) __shared__ T name dims
#define SHARED_DYNAMIC(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]
#define EXPORT_KERNEL(name)
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#else
#include "emulator.h"
#define HW inline
#define HW_EITHER(device, emulated) emulated
#define HW_AT , emu::Location at = emu::Location::current()
#define HW_AT_ALONE emu::Location at = emu::Location::current()
#define HW_PASS_AT , at
#endif

namespace hw {

using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using Barrier = unsigned long long;  // an mbarrier: lives in shared memory, 8-byte aligned

// A CUtensorMap; passed by value as `const __grid_constant__ hw::TensorMap`.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// ---- addresses and memory

// The 32-bit address of a generic pointer into this block's shared memory.
HW u32 shared_address(const void* p HW_AT) {
  return HW_EITHER((u32)__cvta_generic_to_shared(p), emu::shared_address(p, at));
}

// The same bytes as another type of the same size.
template <class To, class From>
HW To from_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// One access of 16 (or 8) bytes to global or shared memory; Value is any plain type of that size. The address must be aligned to it.
template <class Value>
HW Value ld16(const void* p HW_AT) {
  static_assert(sizeof(Value) == 16);
  HW_EITHER(, emu::check_vector(p, 16, false, at));
  uint4 bits = *static_cast<const uint4*>(p);
  return from_bits<Value>(bits);
}
template <class Value>
HW void st16(void* p, const Value& value HW_AT) {
  static_assert(sizeof(Value) == 16);
  HW_EITHER(, emu::check_vector(p, 16, true, at));
  *static_cast<uint4*>(p) = from_bits<uint4>(value);
}
template <class Value>
HW Value ld8(const void* p HW_AT) {
  static_assert(sizeof(Value) == 8);
  HW_EITHER(, emu::check_vector(p, 8, false, at));
  uint2 bits = *static_cast<const uint2*>(p);
  return from_bits<Value>(bits);
}
template <class Value>
HW void st8(void* p, const Value& value HW_AT) {
  static_assert(sizeof(Value) == 8);
  HW_EITHER(, emu::check_vector(p, 8, true, at));
  *static_cast<uint2*>(p) = from_bits<uint2>(value);
}

// Global memory that nobody writes during this launch, through the read-only path.
template <class Value>
HW Value ld16_nc(const void* p HW_AT) {
  static_assert(sizeof(Value) == 16);
  uint4 bits;
  HW_EITHER(asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                : "l"(__cvta_generic_to_global(p))),
            emu::load_nc(&bits, p, 16, at));
  return from_bits<Value>(bits);
}

// A cache policy for the copies below: data read once (weights) leaves the L2 first, data many blocks read stays longest.
HW u64 l2_evict_first() {
  u64 policy = 0;
  HW_EITHER(asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)), );
  return policy;
}
HW u64 l2_evict_last() {
  u64 policy = 0;
  HW_EITHER(asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy)), );
  return policy;
}

// As ld16_nc, past the L1 and first to leave the L2: for weights.
template <class Value>
HW Value ld16_stream(const void* p HW_AT) {
  static_assert(sizeof(Value) == 16);
  uint4 bits;
  HW_EITHER(asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                : "l"(__cvta_generic_to_global(p)), "l"(l2_evict_first())),
            emu::load_nc(&bits, p, 16, at));
  return from_bits<Value>(bits);
}
HW void prefetch_l2(const void* p HW_AT) {
  HW_EITHER(asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p))), emu::prefetch(p, 1, at));
}

// ---- arithmetic

// Two e4m3 values -> two halves (exact); the low byte becomes .x.
HW __half2 e4m3x2_to_half2(u16 pair) {
  u32 r;
  HW_EITHER(asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair)), r = emu::e4m3x2_to_f16x2(pair));
  return from_bits<__half2>(r);
}
// Two floats -> two e4m3 values, to nearest even, clamped to +-448; `low` becomes the low byte. NaN stays NaN.
HW u16 float2_to_e4m3x2(float low, float high) {
  u16 r;
  HW_EITHER(asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low)), r = emu::float2_to_e4m3x2(low, high));
  return r;
}
// 2^x and log2(x) within 2 ulp; subnormals flush to zero. NOTE: the emulator computes these in full precision: not bit for bit.
HW float exp2_approx(float x) {
  float r;
  HW_EITHER(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)), r = emu::exp2_flushed(x));
  return r;
}
HW float log2_approx(float x) {
  float r;
  HW_EITHER(asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)), r = emu::log2_flushed(x));
  return r;
}

// Sum and maximum over the warp, in every lane, in the order of a butterfly (xor 16, 8, 4, 2, 1).
HW float warp_sum(float x HW_AT) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o, 32 HW_PASS_AT);
  return x;
}
HW float warp_max(float x HW_AT) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o, 32 HW_PASS_AT));
  return x;
}

// ---- threads of a block, blocks of a cluster, kernels of a stream

// True in one lane of a converged warp.
HW bool elect_one(HW_AT_ALONE) {
  u32 r;
  HW_EITHER(asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(r)), r = emu::elect_one(at));
  return r;
}
// A named barrier (1-15; 0 is __syncthreads) for `num_threads` threads, whole warps. The id is a template argument: in a register it would
// make ptxas reserve all sixteen.
template <int ID>
HW void bar_sync(u32 num_threads HW_AT) {
  static_assert(ID > 0 && ID < 16);
  HW_EITHER(asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(num_threads) : "memory"), emu::bar_sync(ID, num_threads, at));
}
template <int ID>
HW void bar_arrive(u32 num_threads HW_AT) {
  static_assert(ID > 0 && ID < 16);
  HW_EITHER(asm volatile("bar.arrive %0, %1;" ::"n"(ID), "r"(num_threads) : "memory"), emu::bar_arrive(ID, num_threads, at));
}
// Moves registers between the warpgroups of a block: all warps of a warpgroup call it. Needs __launch_bounds__(n, 1).
template <int REGISTERS>
HW void setmaxnreg_inc(HW_AT_ALONE) {
  HW_EITHER(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)), emu::setmaxnreg(REGISTERS, at));
}
template <int REGISTERS>
HW void setmaxnreg_dec(HW_AT_ALONE) {
  HW_EITHER(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)), emu::setmaxnreg(REGISTERS, at));
}

HW u32 cluster_rank() {
  u32 r;
  HW_EITHER(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)), r = emu::cluster_rank());
  return r;
}
HW u32 cluster_size() {
  u32 r;
  HW_EITHER(asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)), r = emu::cluster_size());
  return r;
}
// Every thread of every block of the cluster arrives (release) and waits (acquire).
HW void cluster_arrive(HW_AT_ALONE) {
  HW_EITHER(asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"), emu::cluster_arrive(at));
}
HW void cluster_wait(HW_AT_ALONE) {
  HW_EITHER(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"), emu::cluster_wait(at));
}
HW void cluster_sync(HW_AT_ALONE) {
  cluster_arrive(HW_EITHER(, at));
  cluster_wait(HW_EITHER(, at));
}
// As cluster_sync after nothing but reads (before a block ends): publishes no writes, and so does not wait for them.
HW void cluster_sync_readers(HW_AT_ALONE) {
  HW_EITHER(asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"), emu::cluster_arrive(at));
  cluster_wait(HW_EITHER(, at));
}
// The same place in the shared memory of another block of the cluster, as an ordinary pointer.
template <class Type>
HW Type* cluster_map(Type* p, u32 rank HW_AT) {
  u64 r;
  HW_EITHER(asm volatile("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(p), "r"(rank)), r = emu::cluster_map(p, rank, at));
  return reinterpret_cast<Type*>(r);
}

// Programmatic dependent launch: nothing but constants may be touched before griddep_wait; griddep_launch lets the next kernel start early.
HW void griddep_wait(HW_AT_ALONE) { HW_EITHER(asm volatile("griddepcontrol.wait;" ::: "memory"), emu::griddep_wait(at)); }
HW void griddep_launch(HW_AT_ALONE) { HW_EITHER(asm volatile("griddepcontrol.launch_dependents;" ::: "memory"), emu::griddep_launch(at)); }

// ---- mbarriers

// Phase n completes when `count` arrivals and all expected bytes have come. A waiter names the parity of the phase it waits for: a fresh
// barrier is in phase 0, so waiting for parity 0 blocks and waiting for parity 1 does not.
HW void mbarrier_init(Barrier* b, u32 count HW_AT) {
  HW_EITHER(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory"),
            emu::mbarrier_init(b, count, at));
}
HW void mbarrier_inval(Barrier* b HW_AT) {
  HW_EITHER(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory"), emu::mbarrier_inval(b, at));
}
HW void mbarrier_arrive(Barrier* b HW_AT) {
  HW_EITHER(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"),
            emu::mbarrier_arrive(b, 0, at));
}
HW void mbarrier_arrive_expect_tx(Barrier* b, u32 num_bytes HW_AT) {
  HW_EITHER(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(num_bytes) : "memory"),
            emu::mbarrier_arrive(b, num_bytes, at));
}
HW void mbarrier_expect_tx(Barrier* b, u32 num_bytes HW_AT) {
  HW_EITHER(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(num_bytes) : "memory"),
            emu::mbarrier_expect_tx(b, num_bytes, at));
}
// Arrives at the barrier that lies at the same place in block `rank` of the cluster.
HW void mbarrier_arrive_cluster(Barrier* b, u32 rank HW_AT) {
  HW_EITHER(asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
                         "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)), "r"(rank) : "memory"),
            emu::mbarrier_arrive_cluster(b, rank, at));
}
// As above for one who has only read (a stage is given back): publishes no writes, and so costs no fence of the whole device, into which ptxas
// turns the release above. CUTLASS's ClusterBarrier::arrive is this instruction too.
HW void mbarrier_arrive_cluster_reader(Barrier* b, u32 rank HW_AT) {
  HW_EITHER(asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
                         "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)), "r"(rank) : "memory"),
            emu::mbarrier_arrive_cluster(b, rank, at));
}
// May return false before the phase is complete: call it in a loop, or mbarrier_wait.
HW bool mbarrier_try_wait(Barrier* b, u32 parity HW_AT) {
  u32 r;
  HW_EITHER(asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                         : "=r"(r) : "r"(shared_address(b)), "r"(parity) : "memory"),
            r = emu::mbarrier_try_wait(b, parity, at));
  return r;
}
HW void mbarrier_wait(Barrier* b, u32 parity HW_AT) {
  while (!mbarrier_try_wait(b, parity HW_PASS_AT)) {
  }
}
// As above where other blocks of the cluster arrive or write.
HW bool mbarrier_try_wait_cluster(Barrier* b, u32 parity HW_AT) {
  u32 r;
  HW_EITHER(asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                         : "=r"(r) : "r"(shared_address(b)), "r"(parity) : "memory"),
            r = emu::mbarrier_try_wait(b, parity, at));
  return r;
}
HW void mbarrier_wait_cluster(Barrier* b, u32 parity HW_AT) {
  while (!mbarrier_try_wait_cluster(b, parity HW_PASS_AT)) {
  }
}

// ---- fences

// After mbarrier_init, before the barrier is used by copies or by other blocks.
HW void fence_mbarrier_init(HW_AT_ALONE) {
  HW_EITHER(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"), emu::fence_mbarrier_init(at));
}
// By every thread that wrote shared memory with ordinary stores, before the barrier after which a copy or wgmma reads (or overwrites) it.
HW void fence_proxy_async(HW_AT_ALONE) {
  HW_EITHER(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"), emu::fence_proxy_async(at));
}

// ---- cp.async (16 bytes a thread)

// Copies `src_bytes` (0-16) and fills the rest of the 16 bytes with zeros; both addresses 16-byte aligned.
HW void cp_async_16(void* dst, const void* src, u32 src_bytes = 16 HW_AT) {
  HW_EITHER(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)),
                         "r"(src_bytes) : "memory"),
            emu::cp_async_16(dst, src, src_bytes, at));
}
HW void cp_async_commit(HW_AT_ALONE) { HW_EITHER(asm volatile("cp.async.commit_group;" ::: "memory"), emu::cp_async_commit(at)); }
// Waits until at most NUM_GROUPS of this thread's newest groups are in flight.
template <int NUM_GROUPS>
HW void cp_async_wait(HW_AT_ALONE) {
  HW_EITHER(asm volatile("cp.async.wait_group %0;" ::"n"(NUM_GROUPS) : "memory"), emu::cp_async_wait(NUM_GROUPS, at));
}

// ---- bulk copies (one thread moves many bytes; addresses and sizes multiples of 16)

HW void bulk_load(void* dst, const void* src, u32 num_bytes, Barrier* b HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(num_bytes), "r"(shared_address(b)) : "memory"),
            emu::bulk_load(dst, src, num_bytes, b, 0, at));
}
HW void bulk_load_hint(void* dst, const void* src, u32 num_bytes, Barrier* b, u64 policy HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                         ::"r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(num_bytes), "r"(shared_address(b)), "l"(policy)
                         : "memory"),
            emu::bulk_load(dst, src, num_bytes, b, 0, at));
}
// Into the same place of every block of the cluster whose bit is set in `mask`; each block's own barrier counts the bytes.
HW void bulk_load_multicast(void* dst, const void* src, u32 num_bytes, Barrier* b, u16 mask HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                         ::"r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(num_bytes), "r"(shared_address(b)), "h"(mask)
                         : "memory"),
            emu::bulk_load(dst, src, num_bytes, b, mask, at));
}
HW void bulk_store(void* dst, const void* src, u32 num_bytes HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(dst)),
                         "r"(shared_address(src)), "r"(num_bytes) : "memory"),
            emu::bulk_store(dst, src, num_bytes, at));
}
HW void bulk_prefetch_l2(const void* src, u32 num_bytes HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(src)), "r"(num_bytes)),
            emu::prefetch(src, num_bytes, at));
}
// Stores (bulk_store, tma_store_*) are waited for in groups: until they have read shared memory, or until they are done.
HW void bulk_commit(HW_AT_ALONE) { HW_EITHER(asm volatile("cp.async.bulk.commit_group;" ::: "memory"), emu::bulk_commit(at)); }
template <int NUM_GROUPS>
HW void bulk_wait_read(HW_AT_ALONE) {
  HW_EITHER(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(NUM_GROUPS) : "memory"), emu::bulk_wait(NUM_GROUPS, true, at));
}
template <int NUM_GROUPS>
HW void bulk_wait(HW_AT_ALONE) {
  HW_EITHER(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(NUM_GROUPS) : "memory"), emu::bulk_wait(NUM_GROUPS, false, at));
}
HW void tma_prefetch_descriptor(const TensorMap* map HW_AT) {
  HW_EITHER(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), emu::prefetch_tensor_map(map, at));
}

#include "tensor_copies.cuh"

// ---- matrices in a warp

// Lane 8 i + j gives the address of row j (16 bytes) of matrix i; lane L receives row L / 4, columns 2 (L % 4) and + 1 of each matrix (b16).
HW void ldmatrix_x1(u32 (&r)[1], const void* row HW_AT) {
  HW_EITHER(asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory"),
            emu::ldmatrix(r, 1, row, false, at));
}
HW void ldmatrix_x2(u32 (&r)[2], const void* row HW_AT) {
  HW_EITHER(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory"),
            emu::ldmatrix(r, 2, row, false, at));
}
HW void ldmatrix_x4(u32 (&r)[4], const void* row HW_AT) {
  HW_EITHER(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory"),
            emu::ldmatrix(r, 4, row, false, at));
}
// Transposed: lane L receives rows 2 (L % 4) and + 1 of column L / 4.
HW void ldmatrix_x2_trans(u32 (&r)[2], const void* row HW_AT) {
  HW_EITHER(asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                         : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory"),
            emu::ldmatrix(r, 2, row, true, at));
}
HW void ldmatrix_x4_trans(u32 (&r)[4], const void* row HW_AT) {
  HW_EITHER(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory"),
            emu::ldmatrix(r, 4, row, true, at));
}
// The reverse of ldmatrix.
HW void stmatrix_x2(void* row, const u32 (&r)[2] HW_AT) {
  HW_EITHER(asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]) : "memory"),
            emu::stmatrix(row, 2, r, false, at));
}
HW void stmatrix_x4(void* row, const u32 (&r)[4] HW_AT) {
  HW_EITHER(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
                         "r"(r[2]), "r"(r[3]) : "memory"),
            emu::stmatrix(row, 4, r, false, at));
}
HW void stmatrix_x4_trans(void* row, const u32 (&r)[4] HW_AT) {
  HW_EITHER(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
                         "r"(r[2]), "r"(r[3]) : "memory"),
            emu::stmatrix(row, 4, r, true, at));
}

// d += a . b: a is 16 x K row-major, b is K x 8 column-major, d is 16 x 8; fragments as in the PTX ISA, "Matrix Fragments for mma".
HW void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2] HW_AT) {
  HW_EITHER(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
            emu::mma(d, a, b, emu::Element::bf16, at));
}
HW void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2] HW_AT) {
  HW_EITHER(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
            emu::mma(d, a, b, emu::Element::f16, at));
}
HW void mma_m16n8k32_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2] HW_AT) {
  HW_EITHER(asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
            emu::mma(d, a, b, emu::Element::e4m3, at));
}

// Where byte `offset` of a tile of 128-byte rows, aligned to 1024 bytes, lies under the 128-byte swizzle: the 16-byte chunk is XORed with the row.
HW u32 swizzle128(u32 offset) { return offset ^ (offset >> 3 & 0x70); }

}  // namespace hw
