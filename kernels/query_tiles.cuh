// query_tiles.cuh - how prefill attention cuts its work: which tiles of queries and of K and V there are, who takes them, in which order.
//
// Tiles are cut at multiples of their size, whatever the chunks, so that a token's place in its tile follows from its position.
// prefill_attention.py plans them.
#pragma once
#include "hopper.cuh"

namespace query_tiles {
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int TILE_ROWS = 128;  // tokens x heads of a KV head
constexpr int TILE_TOKENS = GROUP == 1 ? 128 : GROUP == 2 ? 64 : GROUP <= 4 ? 32 : 16;
constexpr int QUERY_ROWS = GROUP * TILE_TOKENS;
constexpr int KV_TOKENS = 128;  // of a tile of K or V
static_assert(GROUP >= 1 && GROUP <= 8 && GROUP * NUM_KV_HEADS == NUM_HEADS && KV_TOKENS % TILE_TOKENS == 0);

// Some consecutive query tokens of a sequence, within a multiple of TILE_TOKENS and the next.
struct alignas(16) Tile {
  int sequence;
  int row_of_position_0;  // the row of q where the sequence's first token would be
  int position;           // of the first token
  int length;             // behind the chunk's last token: the tile ends there or at the next multiple of TILE_TOKENS

  HW int first() const { return position / TILE_TOKENS * TILE_TOKENS; }
  HW int num_kv_tiles() const { return first() / KV_TOKENS + 1; }
};

// The item of a block in a round: forwards and backwards in turns, so that no block always gets the longest of a round.
HW int item_at(int round) {
  return round * (int)gridDim.x + (int)(round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Calls use(tile, kv_head) for each item of this block.
template <class Use>
HW void for_each_item(const int* tiles, int num_items, Use use) {
  for (int round = 0; round * (int)gridDim.x < num_items; round++) {
    const int item = item_at(round);
    if (item < num_items) use(hw::ld16<Tile>(tiles + item / NUM_KV_HEADS * 4), item % NUM_KV_HEADS);
  }
}

// Calls use(is_value, kv_tile, num_valid) for each tile of K and V of a tile of queries, in the order in which they are used: from the last to the first,
// V one step later. Tokens from num_valid on are behind the chunk.
template <class Use>
HW void for_each_kv_tile(const Tile& tile, Use use) {
  const int num_kv_tiles = tile.num_kv_tiles();
  for (int kv_tile = num_kv_tiles - 1; kv_tile >= -1; kv_tile--) {
    if (kv_tile >= 0) use(false, kv_tile, KV_TOKENS);
    if (kv_tile < num_kv_tiles - 1) use(true, kv_tile + 1, min(tile.length - (kv_tile + 1) * KV_TOKENS, KV_TOKENS));
  }
}
}  // namespace query_tiles
