// units - one small kernel for every function of kernels/hopper.cuh, to compare the emulator's reading of the ISA with a reference, and
// with the hardware bit for bit. units.py launches them. wgmma has its own file, units_wgmma.cu.
#include "hopper.cuh"
using namespace hw;

namespace {
struct alignas(16) Words {
  u32 word[4];
};
struct alignas(8) Pair {
  u32 word[2];
};
}  // namespace

// ---- memory and arithmetic

// out[i] = five copies of in[i], 16 bytes each, by five ways.
extern "C" __global__ void vector_access(const Words* in, Words* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  prefetch_l2(in + i);
  st16(out + i, ld16<Words>(in + i));
  st16(out + n + i, ld16_nc<Words>(in + i));
  st16(out + 2 * n + i, ld16_stream<Words>(in + i));
  const Pair* pairs = reinterpret_cast<const Pair*>(in + i);
  st8(reinterpret_cast<Pair*>(out + 3 * n + i), ld8<Pair>(pairs + 1));
  st8(reinterpret_cast<Pair*>(out + 3 * n + i) + 1, ld8<Pair>(pairs));
  out[4 * n + i].word[0] = from_bits<u32>(from_bits<float>(in[i].word[0]));
  for (int j = 1; j < 4; j++) out[4 * n + i].word[j] = in[i].word[j];
}

// All 65,536 pairs.
extern "C" __global__ void e4m3_to_half(u32* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = from_bits<u32>(e4m3x2_to_half2((u16)i));
}
extern "C" __global__ void float_to_e4m3(const float* in, unsigned short* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = float2_to_e4m3x2(in[2 * i], in[2 * i + 1]);
}
extern "C" __global__ void approximations(const float* in, float* exp2s, float* log2s, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  exp2s[i] = exp2_approx(in[i]);
  log2s[i] = log2_approx(fabsf(in[i]));
}
// A TensorMap-free view of the descriptor helpers and address bits.
extern "C" __global__ void addresses(u32* out) {
  SHARED_DYNAMIC(memory, 1024);
  const u32 base = shared_address(memory);
  out[threadIdx.x] = shared_address(memory + threadIdx.x * 16) - base;
  out[blockDim.x + threadIdx.x] = swizzle128(threadIdx.x * 16);
  if (threadIdx.x == 0) out[2 * blockDim.x] = base % 1024;
}

// ---- a warp

extern "C" __global__ void warp_functions(const float* in, float* out, u32* bits) {
  const int lane = threadIdx.x;
  const float x = in[lane];
  const u32 u = from_bits<u32>(x);
  float* f = out + lane;
  f[0 * 32] = warp_sum(x);
  f[1 * 32] = warp_max(x);
  f[2 * 32] = __shfl_sync(~0u, x, (lane * 7) & 31);
  f[3 * 32] = __shfl_xor_sync(~0u, x, 5);
  f[4 * 32] = __shfl_down_sync(~0u, x, 3, 16);
  f[5 * 32] = __shfl_up_sync(~0u, x, 2, 8);
  u32* b = bits + lane;
  b[0 * 32] = __ballot_sync(~0u, x > 0.f);
  b[1 * 32] = (u32)__any_sync(~0u, x > 100.f) | (u32)__all_sync(~0u, x < 100.f) << 1;
  b[2 * 32] = __reduce_add_sync(~0u, u);
  b[3 * 32] = __reduce_min_sync(~0u, u);
  b[4 * 32] = __reduce_max_sync(~0u, u);
  b[5 * 32] = (u32)__reduce_min_sync(~0u, (int)u);
  b[6 * 32] = (u32)__reduce_max_sync(~0u, (int)u);
  b[7 * 32] = __reduce_and_sync(~0u, u);
  b[8 * 32] = __reduce_or_sync(~0u, u);
  b[9 * 32] = __reduce_xor_sync(~0u, u);
  b[10 * 32] = __match_any_sync(~0u, u & 3);
  b[11 * 32] = __popc(__ballot_sync(~0u, elect_one()));
}

extern "C" __global__ void matrix_moves(const u32* in, u32* out) {
  SHARED_ARRAY(Words, tile, [32]);
  SHARED_ARRAY(Words, written, [3][32]);
  const int lane = threadIdx.x;
  st16(&tile[lane], ld16<Words>(in + lane * 4));
  __syncwarp();
  u32 r1[1], r2[2], r4[4], t2[2], t4[4];
  ldmatrix_x1(r1, &tile[lane & 7]);
  ldmatrix_x2(r2, &tile[lane & 15]);
  ldmatrix_x4(r4, &tile[lane]);
  ldmatrix_x2_trans(t2, &tile[lane & 15]);
  ldmatrix_x4_trans(t4, &tile[lane]);
  u32* o = out + lane * 13;
  o[0] = r1[0];
  for (int i = 0; i < 2; i++) o[1 + i] = r2[i], o[7 + i] = t2[i];
  for (int i = 0; i < 4; i++) o[3 + i] = r4[i], o[9 + i] = t4[i];
  if (lane < 16) st16(&written[0][16 + lane], Words{});
  stmatrix_x2(&written[0][lane & 15], r2);
  stmatrix_x4(&written[1][lane], r4);
  stmatrix_x4_trans(&written[2][lane], r4);
  __syncwarp();
  for (int i = 0; i < 3; i++) st16(out + 32 * 13 + (i * 32 + lane) * 4, ld16<Words>(&written[i][lane]));
}

// out = c + a . b^T for one tile: a 16 x K, b 8 x K, both row-major; fragments by the tables of the PTX ISA.
template <int K, class Multiply>
HW void multiply_tile(const unsigned char* a, const unsigned char* b, float* out, int element_bytes, Multiply multiply) {
  const int group = threadIdx.x >> 2, place = threadIdx.x & 3, row_bytes = K * element_bytes;
  u32 fa[4], fb[2];
  float d[4];
  for (int r = 0; r < 4; r++) fa[r] = *(const u32*)(a + (group + 8 * (r & 1)) * row_bytes + place * 4 + 16 * (r >> 1));
  for (int r = 0; r < 2; r++) fb[r] = *(const u32*)(b + group * row_bytes + place * 4 + 16 * r);
  for (int i = 0; i < 4; i++) d[i] = out[(group + 8 * (i >> 1)) * 8 + place * 2 + (i & 1)];
  multiply(d, fa, fb);
  for (int i = 0; i < 4; i++) out[(group + 8 * (i >> 1)) * 8 + place * 2 + (i & 1)] = d[i];
}
extern "C" __global__ void mma_bf16(const unsigned char* a, const unsigned char* b, float* out) {
  multiply_tile<16>(a, b, out, 2, [](float(&d)[4], const u32(&x)[4], const u32(&y)[2]) { mma_m16n8k16_bf16(d, x, y); });
}
extern "C" __global__ void mma_f16(const unsigned char* a, const unsigned char* b, float* out) {
  multiply_tile<16>(a, b, out, 2, [](float(&d)[4], const u32(&x)[4], const u32(&y)[2]) { mma_m16n8k16_f16(d, x, y); });
}
extern "C" __global__ void mma_e4m3(const unsigned char* a, const unsigned char* b, float* out) {
  multiply_tile<32>(a, b, out, 1, [](float(&d)[4], const u32(&x)[4], const u32(&y)[2]) { mma_m16n8k32_e4m3(d, x, y); });
}

// ---- a block

// Warp 0 fills a slot, warps 1 to 3 read it: two named barriers, three rounds.
extern "C" __global__ void __launch_bounds__(128) named_barriers(const u32* in, u32* out) {
  SHARED_ARRAY(u32, slot, [32]);
  const int t = threadIdx.x;
  for (int round = 0; round < 3; round++) {
    if (t < 32) {
      slot[t] = in[round * 32 + t];
      bar_arrive<1>(128);
      bar_sync<2>(128);
    } else {
      bar_sync<1>(128);
      out[round * 128 + t] = slot[t & 31];
      bar_arrive<2>(128);
    }
  }
}
extern "C" __global__ void __launch_bounds__(256, 1) register_moves(u32* out) {
  if (threadIdx.x < 128)
    setmaxnreg_dec<40>();
  else
    setmaxnreg_inc<232>();
  out[threadIdx.x] = threadIdx.x * 3;
}
extern "C" __global__ void block_votes(const int* in, int* out) {
  const int p = in[threadIdx.x];
  out[threadIdx.x] = __syncthreads_count(p);
  out[blockDim.x + threadIdx.x] = __syncthreads_and(p) ? 1 : 0;
  out[2 * blockDim.x + threadIdx.x] = __syncthreads_or(p) ? 1 : 0;
}

// The producer warp gives two slots round and round; everyone else takes.
extern "C" __global__ void __launch_bounds__(128) mbarriers(const u32* in, u32* out, int rounds) {
  SHARED_ARRAY(u32, slot, [2][32]);
  SHARED_ARRAY(Barrier, full, [2]);
  SHARED_ARRAY(Barrier, empty, [2]);
  const int t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init(&full[i], 32), mbarrier_init(&empty[i], 96);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int i = 0; i < rounds; i++) {
    const int s = i & 1, phase = i >> 1 & 1;
    if (t < 32) {
      mbarrier_wait(&empty[s], phase ^ 1);
      slot[s][t] = in[i * 32 + t];
      mbarrier_arrive(&full[s]);
    } else {
      while (!mbarrier_try_wait(&full[s], phase)) {
      }
      out[i * 96 + t - 32] = slot[s][t & 31];
      mbarrier_arrive(&empty[s]);
    }
  }
  __syncthreads();
  if (t == 0) {
    for (int i = 0; i < 2; i++) mbarrier_inval(&full[i]), mbarrier_inval(&empty[i]);
  }
}

extern "C" __global__ void atomics(const int* in, int* integers, u32* words, unsigned long long* longs, float* floats) {
  const int x = in[threadIdx.x];
  atomicAdd(&integers[0], x);
  atomicMin(&integers[1], x);
  atomicMax(&integers[2], x);
  atomicSub(&integers[3], x);
  atomicAnd(&words[0], ~(1u << (x & 31)));
  atomicOr(&words[1], 1u << (x & 31));
  atomicXor(&words[2], (u32)x);
  atomicInc(&words[3], 9u);
  atomicDec(&words[4], 9u);
  atomicMax(&words[5], (u32)x);
  atomicExch(&words[6], 77u);
  for (u32 seen = 0; seen != ~0u;) seen = atomicCAS(&words[7], 0u, 5u) ? ~0u : 0u;
  atomicAdd(&longs[0], (unsigned long long)(long long)x);
  atomicAdd(&floats[0], (float)x);
}
// Each block adds up its part; the block that ends last adds the parts in order.
extern "C" __global__ void last_block(const u32* in, u32* parts, u32* count, u32* out) {
  SHARED_ARRAY(u32, sum, [1]);
  SHARED_ARRAY(u32, ticket, [1]);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], in[blockIdx.x * blockDim.x + threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum[0];
    __threadfence();
    ticket[0] = atomicInc(count, gridDim.x - 1);
    __threadfence();
  }
  __syncthreads();
  if (ticket[0] != gridDim.x - 1) return;
  if (threadIdx.x == 0) {
    u32 total = 0;
    for (u32 i = 0; i < gridDim.x; i++) total = total * 31 + parts[i];
    out[0] = total;
  }
}
extern "C" __global__ void dependent(const u32* weights, const u32* in, u32* out) {
  const u32 w = weights[threadIdx.x];
  griddep_wait();
  griddep_launch();
  out[threadIdx.x] = w + in[threadIdx.x];
}

// ---- copies

// Thread t copies t % 17 bytes; the rest of its 16 is zero.
extern "C" __global__ void __launch_bounds__(128) thread_copies(const Words* in, Words* out) {
  SHARED_ARRAY(Words, tile, [2][128]);
  const int t = threadIdx.x;
  cp_async_16(&tile[0][t], in + t, t % 17);
  cp_async_commit();
  cp_async_16(&tile[1][t], in + 128 + t);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  st16(out + t, ld16<Words>(&tile[0][t ^ 1]));
  cp_async_wait<0>();
  __syncthreads();
  st16(out + 128 + t, ld16<Words>(&tile[1][t ^ 1]));
}

// Two loads on one barrier, then two stores: 4,096 bytes each.
extern "C" __global__ void __launch_bounds__(128) bulk_copies(const unsigned char* in, unsigned char* out) {
  SHARED_DYNAMIC(memory, 128);
  SHARED_ARRAY(Barrier, loaded, [1]);
  const int t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(loaded, 1);
    fence_mbarrier_init();
    bulk_prefetch_l2(in, 8192);
    mbarrier_expect_tx(loaded, 4096);
    mbarrier_arrive_expect_tx(loaded, 4096);
    bulk_load(memory, in, 4096, loaded);
    bulk_load_hint(memory + 4096, in + 4096, 4096, loaded, l2_evict_first());
  }
  __syncthreads();
  mbarrier_wait(loaded, 0);
  for (int i = t; i < 8192; i += 128) memory[i] ^= 0x55;
  fence_proxy_async();
  __syncthreads();
  if (t == 0) {
    bulk_store(out, memory, 4096);
    bulk_commit();
    bulk_store(out + 4096, memory + 4096, 4096);
    bulk_commit();
    bulk_wait_read<1>();
    bulk_wait<0>();
  }
}

#define COORDINATES_2 at[0], at[1]
#define COORDINATES_3 at[0], at[1], at[2]
#define COORDINATES_4 at[0], at[1], at[2], at[3]
#define COORDINATES_5 at[0], at[1], at[2], at[3], at[4]
// Loads a box (twice: plainly and with a policy), shows its bytes as they lie in shared memory, stores the box at other coordinates.
#define TENSOR_COPIES(RANK)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128) tensor_copies_##RANK(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, \
                                                                         unsigned char* seen, const int* coordinates, int num_bytes) {       \
    SHARED_DYNAMIC(memory, 1024);                                                                                                            \
    SHARED_ARRAY(Barrier, loaded, [1]);                                                                                                      \
    const int t = threadIdx.x, room = (num_bytes + 1023) / 1024 * 1024;                                                                      \
    int at[5];                                                                                                                               \
    for (int i = 0; i < RANK; i++) at[i] = coordinates[i];                                                                                   \
    if (t == 0) {                                                                                                                            \
      tma_prefetch_descriptor(&in);                                                                                                          \
      mbarrier_init(loaded, 1);                                                                                                              \
      fence_mbarrier_init();                                                                                                                 \
      mbarrier_arrive_expect_tx(loaded, 2 * num_bytes);                                                                                      \
      tma_load_##RANK##d(memory, &in, loaded, COORDINATES_##RANK);                                                                           \
      tma_load_##RANK##d_hint(memory + room, &in, loaded, COORDINATES_##RANK, l2_evict_last());                                              \
    }                                                                                                                                        \
    __syncthreads();                                                                                                                         \
    mbarrier_wait(loaded, 0);                                                                                                                \
    for (int i = t; i < num_bytes; i += 128) seen[i] = memory[i], seen[num_bytes + i] = memory[room + i];                                     \
    for (int i = 0; i < RANK; i++) at[i] = coordinates[RANK + i];                                                                            \
    if (t == 0) {                                                                                                                            \
      tma_store_##RANK##d(&out, memory, COORDINATES_##RANK);                                                                                 \
      bulk_commit();                                                                                                                         \
      bulk_wait<0>();                                                                                                                        \
    }                                                                                                                                        \
  }                                                                                                                                          \
  /* Block 0 of a cluster of two loads for both. */                                                                                         \
  extern "C" __global__ void __launch_bounds__(128) multicast_copies_##RANK(const __grid_constant__ TensorMap in, unsigned char* seen,       \
                                                                            const int* coordinates, int num_bytes) {                         \
    SHARED_DYNAMIC(memory, 1024);                                                                                                            \
    SHARED_ARRAY(Barrier, loaded, [1]);                                                                                                      \
    const int t = threadIdx.x, rank = cluster_rank();                                                                                        \
    int at[5];                                                                                                                               \
    for (int i = 0; i < RANK; i++) at[i] = coordinates[i];                                                                                   \
    if (t == 0) {                                                                                                                            \
      mbarrier_init(loaded, 1);                                                                                                              \
      fence_mbarrier_init();                                                                                                                 \
      mbarrier_arrive_expect_tx(loaded, num_bytes);                                                                                          \
    }                                                                                                                                        \
    cluster_sync();                                                                                                                          \
    if (t == 0 && rank == 0) tma_load_##RANK##d_multicast(memory, &in, loaded, COORDINATES_##RANK, (u16)3);                                  \
    mbarrier_wait_cluster(loaded, 0);                                                                                                        \
    for (int i = t; i < num_bytes; i += 128) seen[rank * num_bytes + i] = memory[i];                                                         \
    cluster_sync();                                                                                                                          \
  }
TENSOR_COPIES(2)
TENSOR_COPIES(3)
TENSOR_COPIES(4)
TENSOR_COPIES(5)

// ---- a cluster

// Each block reads its neighbour's shared memory, arrives at its barrier, and gets a part of a multicast load.
extern "C" __global__ void __launch_bounds__(64) cluster_functions(const unsigned char* in, u32* out, unsigned char* loaded_bytes) {
  SHARED_DYNAMIC(memory, 128);
  SHARED_ARRAY(u32, mine, [64]);
  SHARED_ARRAY(Barrier, loaded, [1]);
  SHARED_ARRAY(Barrier, greeted, [1]);
  const u32 t = threadIdx.x, rank = cluster_rank(), size = cluster_size(), next = (rank + 1) % size;
  mine[t] = rank * 1000 + t;
  if (t == 0) {
    mbarrier_init(loaded, 1);
    mbarrier_init(greeted, 64);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(loaded, 512);
  }
  cluster_arrive();
  cluster_wait();
  if (t % 2) mbarrier_arrive_cluster(greeted, next);
  else mbarrier_arrive_cluster_reader(greeted, next);
  while (!mbarrier_try_wait_cluster(greeted, 0)) {
  }
  if (rank == 1 && t == 0) bulk_load_multicast(memory, in, 512, loaded, (u16)((1 << size) - 1));
  mbarrier_wait_cluster(loaded, 0);
  for (u32 i = t; i < 512; i += 64) loaded_bytes[rank * 512 + i] = memory[i];
  out[rank * 64 + t] = *cluster_map(&mine[t], next) + size;
  cluster_sync_readers();  // nobody leaves while its shared memory may be read
}

EXPORT_KERNEL(vector_access)
EXPORT_KERNEL(e4m3_to_half)
EXPORT_KERNEL(float_to_e4m3)
EXPORT_KERNEL(approximations)
EXPORT_KERNEL(addresses)
EXPORT_KERNEL(warp_functions)
EXPORT_KERNEL(matrix_moves)
EXPORT_KERNEL(mma_bf16)
EXPORT_KERNEL(mma_f16)
EXPORT_KERNEL(mma_e4m3)
EXPORT_KERNEL(named_barriers)
EXPORT_KERNEL(register_moves)
EXPORT_KERNEL(block_votes)
EXPORT_KERNEL(mbarriers)
EXPORT_KERNEL(atomics)
EXPORT_KERNEL(last_block)
EXPORT_KERNEL(dependent)
EXPORT_KERNEL(thread_copies)
EXPORT_KERNEL(bulk_copies)
EXPORT_KERNEL(tensor_copies_2)
EXPORT_KERNEL(tensor_copies_3)
EXPORT_KERNEL(tensor_copies_4)
EXPORT_KERNEL(tensor_copies_5)
EXPORT_KERNEL(multicast_copies_2)
EXPORT_KERNEL(multicast_copies_3)
EXPORT_KERNEL(multicast_copies_4)
EXPORT_KERNEL(multicast_copies_5)
EXPORT_KERNEL(cluster_functions)
