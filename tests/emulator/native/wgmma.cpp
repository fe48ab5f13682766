// wgmma.cpp - warpgroup matrix multiply. Four warps issue one operation; each then executes its own 16 rows, at a
// moment of its own: what one warp waits for says nothing of the other three.
#include <cstring>

#include "machine.h"

namespace emu {

static constexpr u32 kPoison = 0x7fffdead;  // a NaN that stands in accumulators from issue to wait

// ---- operands

struct Operand {                          // a shared memory descriptor, decoded: PTX ISA, "Matrix-descriptor" of wgmma
  u32 address, leading, stride, swizzle;  // swizzle as in tensor maps
};

static Operand decode(u64 descriptor) {
  static constexpr u32 kSwizzle[] = {0, 3, 2, 1};
  if (descriptor >> 49 & 7) fail("emulator: a matrix descriptor with a base offset");
  const Operand o{u32(descriptor & 0x3fff) << 4, u32(descriptor >> 16 & 0x3fff) << 4,
                  u32(descriptor >> 32 & 0x3fff) << 4, kSwizzle[descriptor >> 62]};
  if (o.swizzle) {
    const u32 pattern = 128u << o.swizzle;  // its bytes
    const u32 rows = pattern - 128;         // address bits that say the row in it
    if (o.address & rows || o.stride % pattern)
      fail("descriptor of a %u-byte swizzle: address %u and stride %u must be aligned to its pattern of %u bytes",
           16u << o.swizzle, o.address, o.stride, pattern);
  }
  return o;
}

// Where byte `k` (0-31) of row `r` lies when the K elements of a row are adjacent.
static u32 k_major(const Operand& o, u32 r, u32 k) {
  if (!o.swizzle) return o.address + r % 8 * 16 + r / 8 * o.stride + k / 16 * o.leading + k % 16;
  return swizzled(o.address + r % 8 * (16u << o.swizzle) + r / 8 * o.stride + k, o.swizzle);
}

// Where 16-bit element (r, k) lies when the rows' elements are adjacent (MN-major).
static u32 mn_major(const Operand& o, u32 r, u32 k) {
  const u32 per_atom = 8u << o.swizzle;
  return swizzled(
      o.address + r % per_atom * 2 + r / per_atom * o.leading + k % 8 * (16u << o.swizzle) + k / 8 * o.stride,
      o.swizzle);
}

static float decode(Element element, const u8* p) {
  if (element == Element::e4m3) return decode_e4m3(*p);
  u16 bits;
  memcpy(&bits, p, 2);
  return element == Element::bf16 ? decode_bf16(bits) : decode_f16(bits);
}

// Reads rows first..first + count of an operand as floats: to[k * count + row].
static void read_operand(Block& b, u64 descriptor, bool transposed, Element element, u32 first, u32 count, float* to,
                         const View& view) {
  const Operand o = decode(descriptor);
  const u32 size = element == Element::e4m3 ? 1 : 2, k_size = 32 / size;
  if (transposed && !o.swizzle) fail("emulator: an MN-major operand without a swizzle");
  const auto check = [&](u32 offset, u32 num_bytes) {
    if (offset + num_bytes > kArenaBytes) fail("the descriptor leads past the end of shared memory");
    if (machine.checked()) shared_read(b, offset, num_bytes, view, Way::async);
  };
  for (u32 i = 0; i < count; i++) {
    const u32 row = first + i;
    if (!transposed)
      for (u32 k = 0; k < 32; k += 16) {
        const u32 offset = k_major(o, row, k);
        check(offset, 16);
        for (u32 e = 0; e < 16 / size; e++)
          to[(k / size + e) * count + i] = decode(element, b.arena + offset + e * size);
      }
    else
      for (u32 k = 0; k < k_size; k++) {
        const u32 offset = mn_major(o, row, k);
        check(offset, 2);
        to[k * count + i] = decode(element, b.arena + offset);
      }
  }
}

// The A fragments of a warp's registers, laid out as mma.sync's: to[k * 16 + row].
static void read_registers(const std::vector<u32>& registers, Element element, float* to) {
  const u32 per_register = element == Element::e4m3 ? 4 : 2, k_size = per_register * 8;
  for (u32 lane = 0; lane < 32; lane++)
    for (u32 r = 0; r < 4; r++) {
      u8 bytes[4];
      memcpy(bytes, &registers[lane * 4 + r], 4);
      for (u32 e = 0; e < per_register; e++)
        to[(lane % 4 * per_register + e + r / 2 * (k_size / 2)) * 16 + lane / 4 + 8 * (r % 2)] =
            decode(element, bytes + e * (4 / per_register));
    }
}

__attribute__((optimize("O3"), target_clones("avx2", "default"))) static void multiply(const float* a, const float* b,
                                                                                       float* c, u32 n, u32 k_size) {
  for (u32 row = 0; row < 16; row++) {
    float sum[256];
    for (u32 j = 0; j < n; j++) sum[j] = 0;
    for (u32 k = 0; k < k_size; k++) {
      const float x = a[k * 16 + row];
      for (u32 j = 0; j < n; j++) sum[j] += x * b[k * n + j];
    }
    for (u32 j = 0; j < n; j++) c[row * n + j] = sum[j];
  }
}

// ---- execution

static Accumulator* find(ThreadState& t, const float* registers) {
  for (Accumulator& a : t.accumulators)
    if (a.registers == registers) return &a;
  return nullptr;
}

bool step_wgmma(Block& b, u32 warpgroup, u32 warp) {
  Warpgroup& g = b.warpgroups[warpgroup];
  Warp& w = b.warps[warp];
  const u64 number = w.wgmma_executed;
  if (number - g.first >= g.operations.size() || g.operations[number - g.first].warps != 15) return false;
  const WgmmaOperation& o = g.operations[number - g.first];
  const u32 quarter = warp % 4, k_size = o.element == Element::e4m3 ? 32 : 16;
  static float a_values[16 * 32], b_values[32 * 256], c_values[16 * 256];

  Thread* const issuing = current;  // what goes wrong is reported where the operation was issued
  ThreadState& t = machine.threads[b.rank * machine.num_threads + warp * 32];
  const char* const was_doing = t.doing;
  const Location was_at = t.at;
  current = &t;
  doing("wgmma", o.at);
  if (o.a_in_registers)
    read_registers(o.a_registers[quarter], o.element, a_values);
  else
    read_operand(b, o.a, o.transpose_a, o.element, quarter * 16, 16, a_values, o.views[quarter]);
  read_operand(b, o.b, o.transpose_b, o.element, 0, o.n, b_values, o.views[quarter]);
  current = issuing;
  t.doing = was_doing;
  t.at = was_at;

  multiply(a_values, b_values, c_values, o.n, k_size);
  for (u32 lane = 0; lane < 32; lane++) {
    Accumulator* d =
        find(machine.threads[b.rank * machine.num_threads + warp * 32 + lane], o.destination[quarter][lane]);
    for (u32 j = 0; j < o.n / 8; j++)
      for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4 + 8 * (i / 2), column = j * 8 + lane % 4 * 2 + i % 2;
        float& value = d->values[j * 4 + i];
        value = (o.accumulate ? value : 0.0f) + c_values[row * o.n + column];
      }
  }
  w.wgmma_executed++;
  for (;;) {
    if (g.operations.empty()) break;
    bool all = true;
    for (u32 i = 0; i < 4; i++) all = all && b.warps[warpgroup * 4 + i].wgmma_executed > g.first;
    if (!all) break;
    g.operations.pop_front();
    g.first++;
  }
  wake(g.waiting);
  return true;
}

bool step_any_wgmma() {
  const u32 num_warps = (machine.num_threads + 31) / 32, all = num_warps * machine.num_blocks;
  const u32 start = Schedule(machine.options.schedule) == Schedule::forward ? 0 : machine.random(all);
  for (u32 i = 0; i < all; i++) {
    const u32 warp = (start + i) % all;
    if (step_wgmma(machine.blocks[warp / num_warps], warp % num_warps / 4, warp % num_warps)) return true;
  }
  return false;
}

// ---- issue

struct WgmmaLane {
  ThreadState* thread;
  float* d;
  const u32* a_registers;
  WgmmaOperation operation;
};

static bool same(const WgmmaOperation& x, const WgmmaOperation& y) {
  return (x.a_in_registers || x.a == y.a) && x.b == y.b && x.n == y.n && x.element == y.element &&
         x.a_in_registers == y.a_in_registers && x.accumulate == y.accumulate && x.transpose_a == y.transpose_a &&
         x.transpose_b == y.transpose_b;
}

static void claim_accumulator(ThreadState& t, float* d, u32 count, bool accumulate, u64 number, bool fenced) {
  if (Accumulator* in_flight = find(t, d)) {
    if (in_flight->count != count) fail("an accumulator in flight is used with another shape");
    in_flight->last_operation = number;
    return;
  }
  if (!fenced) fail("no wgmma_fence since the accumulator registers were last touched");
  Accumulator a{d, count, number, {}};
  a.values.assign(d, d + count);
  if (!accumulate) a.values.assign(count, 0.0f);
  t.accumulators.push_back(std::move(a));
  for (u32 i = 0; i < count; i++) memcpy(d + i, &kPoison, 4);
}

static void issue(void** arguments, u32 mask) {
  if (mask != ~0u) fail("wgmma needs all 32 lanes, mask %08x came", mask);
  auto** lanes = reinterpret_cast<WgmmaLane**>(arguments);
  ThreadState& first = *lanes[0]->thread;
  Block& b = *first.block;
  const u32 warpgroup = first.warp / 4, quarter = first.warp % 4;
  if (machine.num_threads < (warpgroup + 1) * 128) fail("the warpgroup has fewer than 4 warps");
  Warpgroup& g = b.warpgroups[warpgroup];
  Warp& warp = b.warps[first.warp];
  const u64 number = warp.wgmma_issued++;
  if (number == g.first + g.operations.size()) g.operations.push_back(lanes[0]->operation);
  WgmmaOperation& o = g.operations[number - g.first];
  for (u32 lane = 0; lane < 32; lane++)
    if (!same(o, lanes[lane]->operation))
      fail("the threads of the warpgroup disagree on a wgmma's descriptors, shape or accumulate flag");
  o.warps |= 1u << quarter;
  if (o.a_in_registers) o.a_registers[quarter].resize(32 * 4);
  std::vector<View> views;
  for (u32 lane = 0; lane < 32; lane++) {
    WgmmaLane& l = *lanes[lane];
    claim_accumulator(*l.thread, l.d, o.n / 2, o.accumulate, number, warp.fenced);
    o.destination[quarter][lane] = l.d;
    if (o.a_in_registers) memcpy(&o.a_registers[quarter][lane * 4], l.a_registers, 16);
    if (machine.checked()) views.push_back(l.thread->view);
  }
  if (machine.checked())
    o.views[quarter] = {meet(views), machine.run, wgmma_agent(b.rank, first.warp), u32(number + 1)};
  if (o.warps == 15 && machine.wgmma_delivery == Delivery::early)
    for (u32 w = 0; w < 4; w++)
      while (step_wgmma(b, warpgroup, warpgroup * 4 + w)) {
      }
  if (o.warps == 15) wake(g.waiting);
}

static void start(float* d, const u32* a_registers, WgmmaOperation operation, Location at) {
  operation.at = at;
  WgmmaLane lane{&me(), d, a_registers, std::move(operation)};
  collective(issue, &lane, ~0u, "wgmma", at);
}

void wgmma(float* d, u32 n, Element element, u64 a, u64 b, int accumulate, int transpose_a, int transpose_b,
           Location at) {
  start(d, nullptr,
        {.a = a,
         .b = b,
         .n = n,
         .element = element,
         .a_in_registers = false,
         .accumulate = accumulate != 0,
         .transpose_a = transpose_a != 0,
         .transpose_b = transpose_b != 0},
        at);
}

void wgmma_ra(float* d, u32 n, Element element, const u32* a, u64 b, int accumulate, int transpose_b, Location at) {
  start(d, a,
        {.a = 0,
         .b = b,
         .n = n,
         .element = element,
         .a_in_registers = true,
         .accumulate = accumulate != 0,
         .transpose_a = false,
         .transpose_b = transpose_b != 0},
        at);
}

// ---- fence, commit, wait

void wgmma_fence(Location at) {
  collective(nullptr, nullptr, ~0u, "wgmma_fence", at);
  my_warp().fenced = true;
}

void wgmma_commit(Location at) {
  struct Lane {
    Warp* warp;
  } lane{&my_warp()};
  collective(
      [](void** arguments, u32) {
        Warp& warp = *static_cast<Lane*>(arguments[0])->warp;
        warp.groups.push_back(warp.wgmma_issued);
      },
      &lane, ~0u, "wgmma_commit", at);
  preempt();
}

void wgmma_wait(u32 num_groups, Location at) {
  struct Lane {
    Warp* warp;
    u32 num_groups;
    u64 target;
  } lane{&my_warp(), num_groups, 0};
  collective(
      [](void** arguments, u32 mask) {
        if (mask != ~0u) fail("wgmma_wait needs all 32 lanes, mask %08x came", mask);
        auto** lanes = reinterpret_cast<Lane**>(arguments);
        std::vector<u64>& groups = lanes[0]->warp->groups;
        if (groups.size() <= lanes[0]->num_groups) return;
        const size_t finished = groups.size() - lanes[0]->num_groups;
        const u64 target = groups[finished - 1];
        groups.erase(groups.begin(), groups.begin() + long(finished));
        for (u32 i = 0; i < 32; i++) lanes[i]->target = target;
        lanes[0]->warp->fenced = false;
      },
      &lane, ~0u, "wgmma_wait", at);
  if (!lane.target) return;
  ThreadState& t = me();
  Block& b = my_block();
  Warp& warp = my_warp();
  Warpgroup& g = b.warpgroups[t.warp / 4];
  doing("wgmma_wait", at);
  while (warp.wgmma_executed < lane.target) {  // late: only when nothing else in the cluster can run
    if (machine.wgmma_delivery != Delivery::late && step_wgmma(b, t.warp / 4, t.warp)) continue;
    g.waiting.push_back(machine_index(t));
    block_current();
  }
  std::erase_if(t.accumulators, [&](const Accumulator& a) {
    if (a.last_operation >= lane.target) return false;
    for (u32 i = 0; i < a.count; i++) {
      u32 bits;
      memcpy(&bits, a.registers + i, 4);
      if (bits != kPoison) fail("accumulator register %u was written while wgmma was in flight", i);
    }
    memcpy(a.registers, a.values.data(), a.count * 4);
    return true;
  });
  if (machine.checked()) t.view.past = with_own(t.view.past, wgmma_agent(b.rank, t.warp), u32(lane.target));
}

}  // namespace emu
