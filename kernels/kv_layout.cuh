// kv_layout.cuh - where K and V of a token lie. Written by rope_kv, read by the attention kernels; kv_layout.py says the same in Python.
//
//   pages [page][kv_head][token in page: 64][head_dim: 128], K and V apart, e4m3 or BF16
//
// One (page, KV head) is a contiguous tile of 64 rows of 128 elements: 8 KB in e4m3, 16 KB in BF16, fetched by one plain bulk copy,
// which does not swizzle. So that eight rows of one column fall into different banks of shared memory (ldmatrix), the 16-byte chunk c of the row of token
// t is stored as chunk c ^ (t & 7).
#pragma once
#include "hopper.cuh"

namespace kv_layout {
constexpr int PAGE_TOKENS = 64;
constexpr int HEAD_DIM = 128;

// Byte within a tile of `chunk` of the row of `token_in_page`; ROW_BYTES 128 for e4m3, 256 for BF16.
template <int ROW_BYTES>
HW int chunk_offset(int token_in_page, int chunk) {
  return token_in_page * ROW_BYTES + ((chunk ^ (token_in_page & 7)) << 4);
}

// Byte of the tile of (page, KV head) within the K or V pages of a layer. 64 bits: a layer may have more than 4 GB.
template <int ROW_BYTES>
HW long long tile_offset(int page, int kv_head, int num_kv_heads) {
  return ((long long)page * num_kv_heads + kv_head) * (PAGE_TOKENS * ROW_BYTES);
}
}  // namespace kv_layout
