// gather - scores of 16 query rows against tokens gathered from pages, as decode attention begins: cp.async double buffer, XOR-swizzled
// rows, ldmatrix, mma; then the largest score of each row over all warps.
#include "hopper.cuh"
using namespace hw;

namespace {
constexpr int DIM = 64, PAGE = 16, TILE = 64, ROW_BYTES = DIM * 2;
HW u32 chunk_at(int token, int chunk) { return token * ROW_BYTES + ((chunk ^ (token & 7)) << 4); }
}  // namespace

// q [16 x 64] bf16; pages [P x 16 x 64] bf16; table [pages of the sequence]; scores [16 x length]; best [16]. 128 threads.
extern "C" __global__ void __launch_bounds__(128) gather(const __nv_bfloat16* q, const __nv_bfloat16* pages, const int* table, float* scores, float* best,
                                                         int length) {
  SHARED_DYNAMIC(memory, 128);  // two tiles
  SHARED_ARRAY(float, tops, [4][16]);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, tiles = (length + TILE - 1) / TILE;
  u32 a[4][4];
  for (int k = 0; k < 4; k++)
    for (int r = 0; r < 4; r++) a[k][r] = *(const u32*)(q + ((lane >> 2) + 8 * (r & 1)) * DIM + k * 16 + (lane & 3) * 2 + 8 * (r >> 1));
  auto load = [&](int tile, int buffer) {
    for (int i = 0; i < TILE * ROW_BYTES / 16 / 128; i++) {
      const int id = i * 128 + t, token = id >> 3, chunk = id & 7, position = tile * TILE + token;
      const bool inside = position < length;
      const __nv_bfloat16* from = inside ? pages + ((size_t)table[position / PAGE] * PAGE + position % PAGE) * DIM + chunk * 8 : pages;
      cp_async_16(memory + buffer * TILE * ROW_BYTES + chunk_at(token, chunk), from, inside ? 16 : 0);
    }
    cp_async_commit();
  };
  float top[2] = {-INFINITY, -INFINITY};
  load(0, 0);
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      load(tile + 1, (tile + 1) & 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // the tile of every thread is there
    const unsigned char* rows = memory + (tile & 1) * TILE * ROW_BYTES;
    float d[2][4] = {};
    for (int k = 0; k < 4; k++) {
      u32 r[4];
      ldmatrix_x4(r, rows + chunk_at(warp * 16 + (lane & 7) + (lane >> 4) * 8, k * 2 + (lane >> 3 & 1)));
      const u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
      mma_m16n8k16_bf16(d[0], a[k], b0);
      mma_m16n8k16_bf16(d[1], a[k], b1);
    }
    for (int n = 0; n < 2; n++)
      for (int i = 0; i < 4; i++) {
        const int position = tile * TILE + warp * 16 + n * 8 + (lane & 3) * 2 + (i & 1), row = (lane >> 2) + 8 * (i >> 1);
        if (position < length) {
          scores[row * length + position] = d[n][i];
          top[i >> 1] = fmaxf(top[i >> 1], d[n][i]);
        }
      }
    __syncthreads();  // everyone has read the tile: it may be overwritten
  }
  for (int i = 0; i < 2; i++) {
    for (int o = 1; o < 4; o <<= 1) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], o));
    if ((lane & 3) == 0) tops[warp][(lane >> 2) + 8 * i] = top[i];
  }
  __syncthreads();  // all warps' tops are there
  if (t < 16) {
    float m = tops[0][t];
    for (int w = 1; w < 4; w++) m = fmaxf(m, tops[w][t]);
    best[t] = m;
  }
}
EXPORT_KERNEL(gather)
