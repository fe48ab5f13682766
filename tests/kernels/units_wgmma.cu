// units_wgmma - one tile of every wgmma form: c[64 x N] += a[64 x K] . b[N x K]^T over two steps of K, operands written by ordinary stores.
// Compiled with N.
#include "hopper.cuh"
#include "wgmma.cuh"
using namespace hw;

namespace {
// Copies rows of `row_bytes` (a swizzle span) into a tile of that swizzle; the tile is aligned to 1024 bytes.
HW void place(unsigned char* tile, const unsigned char* from, int rows, int row_bytes) {
  const u32 mask = row_bytes == 128 ? 0x70 : row_bytes == 64 ? 0x30 : 0x10;
  for (int i = threadIdx.x; i < rows * row_bytes / 16; i += 128) {
    const u32 offset = i * 16, swizzled = offset ^ (offset >> 3 & mask);
    st16(tile + swizzled, ld16<uint4>(from + offset));
  }
}
HW void write_tile(float* c, const float (&d)[N / 2]) {
  const int t = threadIdx.x, lane = t & 31;
#pragma unroll
  for (int j = 0; j < N / 2; j++) c[((t >> 5) * 16 + (lane >> 2) + 8 * (j >> 1 & 1)) * N + (j >> 2) * 8 + (lane & 3) * 2 + (j & 1)] = d[j];
}
}  // namespace

// K-major operands in rows of SPAN bytes (128, 64 or 32), K in steps of 32 bytes inside a row.
#define K_MAJOR(name, SPAN, multiply)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(128) name(const unsigned char* a, const unsigned char* b, float* c) {                         \
    SHARED_DYNAMIC(memory, 1024);                                                                                                            \
    unsigned char* b_tile = memory + 64 * 128;                                                                                               \
    place(memory, a, 64, SPAN);                                                                                                              \
    place(b_tile, b, N, SPAN);                                                                                                               \
    fence_proxy_async();                                                                                                                     \
    __syncthreads();                                                                                                                         \
    const u64 da = wgmma_descriptor(memory, SPAN, 8 * SPAN), db = wgmma_descriptor(b_tile, SPAN, 8 * SPAN);                                  \
    float d[N / 2];                                                                                                                          \
    wgmma_fence();                                                                                                                           \
    for (int k = 0; k < SPAN / 32; k++) multiply<N>(d, da + 2 * k, db + 2 * k, k != 0);                                                      \
    wgmma_commit();                                                                                                                          \
    wgmma_wait<0>();                                                                                                                         \
    write_tile(c, d);                                                                                                                        \
  }
K_MAJOR(e4m3_128, 128, wgmma_m64k32_e4m3)
K_MAJOR(e4m3_64, 64, wgmma_m64k32_e4m3)
K_MAJOR(e4m3_32, 32, wgmma_m64k32_e4m3)
K_MAJOR(bf16_128, 128, wgmma_m64k16_bf16)
K_MAJOR(f16_128, 128, wgmma_m64k16_f16)

// a from registers; K is one row of 128 bytes.
#define A_IN_REGISTERS(name, multiply)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(128) name(const unsigned char* a, const unsigned char* b, float* c) {                         \
    SHARED_DYNAMIC(memory, 1024);                                                                                                            \
    place(memory, b, N, 128);                                                                                                                \
    fence_proxy_async();                                                                                                                     \
    __syncthreads();                                                                                                                         \
    const int row = (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7), column = (threadIdx.x & 3) * 4;                                        \
    const u64 db = wgmma_descriptor(memory, 128, 1024);                                                                                      \
    float d[N / 2];                                                                                                                          \
    u32 fragments[4][4];                                                                                                                     \
    for (int k = 0; k < 4; k++)                                                                                                              \
      for (int r = 0; r < 4; r++) fragments[k][r] = *(const u32*)(a + (row + 8 * (r & 1)) * 128 + k * 32 + column + 16 * (r >> 1));           \
    wgmma_fence();                                                                                                                           \
    _Pragma("unroll") for (int k = 0; k < 4; k++) multiply<N>(d, fragments[k], db + 2 * k, k != 0);                                           \
    wgmma_commit();                                                                                                                          \
    wgmma_wait<0>();                                                                                                                         \
    write_tile(c, d);                                                                                                                        \
  }
A_IN_REGISTERS(e4m3_ra, wgmma_m64k32_e4m3_ra)
A_IN_REGISTERS(bf16_ra, wgmma_m64k16_bf16_ra)
A_IN_REGISTERS(f16_ra, wgmma_m64k16_f16_ra)

// b as [K x N], N adjacent (V of attention): columns in groups of 64 (128 bytes), K = 64 rows. N a multiple of 64.
#define B_TRANSPOSED(name, multiply)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(128) name(const unsigned char* a, const unsigned char* b, float* c) {                         \
    SHARED_DYNAMIC(memory, 1024);                                                                                                            \
    unsigned char* b_tile = memory + 64 * 128;                                                                                               \
    place(memory, a, 64, 128);                                                                                                               \
    for (int group = 0; group < N / 64; group++) place(b_tile + group * 8192, b + group * 8192, 64, 128);                                    \
    fence_proxy_async();                                                                                                                     \
    __syncthreads();                                                                                                                         \
    const u64 da = wgmma_descriptor(memory, 128, 1024), db = wgmma_descriptor(b_tile, 128, 1024, 8192);                                      \
    float d[N / 2];                                                                                                                          \
    wgmma_fence();                                                                                                                           \
    for (int k = 0; k < 4; k++) multiply<N, 0, 1>(d, da + 2 * k, db + 128 * k, k != 0);                                                      \
    wgmma_commit();                                                                                                                          \
    wgmma_wait<0>();                                                                                                                         \
    write_tile(c, d);                                                                                                                        \
  }
#if N % 64 == 0
B_TRANSPOSED(bf16_transposed, wgmma_m64k16_bf16)
B_TRANSPOSED(f16_transposed, wgmma_m64k16_f16)
EXPORT_KERNEL(bf16_transposed)
EXPORT_KERNEL(f16_transposed)
#endif

EXPORT_KERNEL(e4m3_128)
EXPORT_KERNEL(e4m3_64)
EXPORT_KERNEL(e4m3_32)
EXPORT_KERNEL(bf16_128)
EXPORT_KERNEL(f16_128)
EXPORT_KERNEL(e4m3_ra)
EXPORT_KERNEL(bf16_ra)
EXPORT_KERNEL(f16_ra)
