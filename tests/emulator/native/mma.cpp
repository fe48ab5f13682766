// mma.cpp - ldmatrix, stmatrix and mma.sync. Fragments: PTX ISA, "Warp-level matrix instructions".
#include <cstring>

#include "machine.h"

namespace emu {

struct MatrixLane {
  u32* load;
  const u32* store;
  u32 offset, num_matrices;
  bool transposed;
};

static void whole_warp(u32 mask, const char* what) {
  if (mask != ~0u) fail("%s needs all 32 lanes, mask %08x came", what, mask);
}

static u32 row_offset(const void* row, u32 num_matrices, Location at, const char* what) {
  if (current->lane >= num_matrices * 8) return 0;
  const u32 offset = shared_address(row, at);
  doing(what, at);
  if (offset % 16) fail("the row's shared address is not 16-byte aligned");
  return offset;
}

// The two 16-bit elements of matrix `i` that a lane holds: row lane / 4, columns 2 (lane % 4) and + 1, or the
// transposed places.
static u32 element_offset(MatrixLane** lanes, u32 i, u32 lane, u32 half) {
  const u32 row = lane / 4, column = lane % 4 * 2 + half;
  return lanes[0]->transposed ? lanes[i * 8 + column]->offset + row * 2 : lanes[i * 8 + row]->offset + column * 2;
}

// Every lane gets words of every row: all 32 must know that the row was written. (The lane that names the row reads it
// as well.)
static void check_rows(MatrixLane** lanes) {
  if (!machine.checked()) return;
  const u32 first = machine_index(me()) - me().lane;
  std::vector<View> views;
  for (u32 l = 0; l < 32; l++) views.push_back(machine.threads[first + l].view);
  const PastRef common = meet(views);
  for (u32 row = 0; row < lanes[0]->num_matrices * 8; row++) {
    View v = views[(row + 1) % 32];
    v.past = common;
    shared_read(my_block(), lanes[row]->offset, 16, v, Way::plain);
  }
}

void ldmatrix(u32* registers, u32 num_matrices, const void* row, bool transposed, Location at) {
  doing("ldmatrix", at);
  MatrixLane lane{registers, nullptr, row_offset(row, num_matrices, at, "ldmatrix"), num_matrices, transposed};
  if (machine.checked() && current->lane < num_matrices * 8)
    shared_read(my_block(), lane.offset, 16, me().view, Way::plain);
  collective(
      [](void** arguments, u32 mask) {
        whole_warp(mask, "ldmatrix");
        auto** lanes = reinterpret_cast<MatrixLane**>(arguments);
        check_rows(lanes);
        for (u32 i = 0; i < lanes[0]->num_matrices; i++)
          for (u32 l = 0; l < 32; l++) {
            u16 half[2];
            for (u32 h = 0; h < 2; h++) memcpy(&half[h], my_block().arena + element_offset(lanes, i, l, h), 2);
            lanes[l]->load[i] = half[0] | u32(half[1]) << 16;
          }
      },
      &lane, ~0u, "ldmatrix", at);
}

void stmatrix(void* row, u32 num_matrices, const u32* registers, bool transposed, Location at) {
  doing("stmatrix", at);
  MatrixLane lane{nullptr, registers, row_offset(row, num_matrices, at, "stmatrix"), num_matrices, transposed};
  if (machine.checked() && current->lane < num_matrices * 8)
    shared_write(my_block(), lane.offset, 16, me().view, Way::plain, me().view.epoch());
  collective(
      [](void** arguments, u32 mask) {
        whole_warp(mask, "stmatrix");
        auto** lanes = reinterpret_cast<MatrixLane**>(arguments);
        for (u32 i = 0; i < lanes[0]->num_matrices; i++)
          for (u32 l = 0; l < 32; l++)
            for (u32 h = 0; h < 2; h++) {
              const u16 half = u16(lanes[l]->store[i] >> (16 * h));
              memcpy(my_block().arena + element_offset(lanes, i, l, h), &half, 2);
            }
      },
      &lane, ~0u, "stmatrix", at);
}

struct MmaLane {
  float* d;
  const u32 *a, *b;
};

template <class Decode>
static void multiply(MmaLane** lanes, u32 k_size, u32 per_register, Decode decode) {
  float a[16][32], b[32][8];
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 group = lane / 4, in_group = lane % 4;
    for (u32 e = 0; e < per_register; e++) {
      const u32 k = in_group * per_register + e;
      for (u32 r = 0; r < 4; r++) a[group + 8 * (r % 2)][k + r / 2 * (k_size / 2)] = decode(lanes[lane]->a[r], e);
      for (u32 r = 0; r < 2; r++) b[k + r * (k_size / 2)][group] = decode(lanes[lane]->b[r], e);
    }
  }
  for (u32 lane = 0; lane < 32; lane++)
    for (u32 i = 0; i < 4; i++) {
      const u32 row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (u32 k = 0; k < k_size; k++) sum += a[row][k] * b[k][column];
      lanes[lane]->d[i] += sum;
    }
}

void mma(float* d, const u32* a, const u32* b, Element element, Location at) {
  MmaLane lane{d, a, b};
  // One function for each element type, so that lanes that call different ones are found to diverge.
  static constexpr CollectiveFunction run[] = {
      [](void** lanes, u32 mask) {
        whole_warp(mask, "mma");
        multiply(reinterpret_cast<MmaLane**>(lanes), 16, 2,
                 [](u32 bits, u32 e) { return decode_bf16(u16(bits >> (16 * e))); });
      },
      [](void** lanes, u32 mask) {
        whole_warp(mask, "mma");
        multiply(reinterpret_cast<MmaLane**>(lanes), 16, 2,
                 [](u32 bits, u32 e) { return decode_f16(u16(bits >> (16 * e))); });
      },
      [](void** lanes, u32 mask) {
        whole_warp(mask, "mma");
        multiply(reinterpret_cast<MmaLane**>(lanes), 32, 4,
                 [](u32 bits, u32 e) { return decode_e4m3(u8(bits >> (8 * e))); });
      },
  };
  collective(run[u32(element)], &lane, ~0u, "mma", at);
}

}  // namespace emu
