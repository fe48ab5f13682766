// copies.cpp - asynchronous copies. The destination is poison from the moment of issue; the bytes come at once, as late
// as a wait allows, or between.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {

static bool happens_now() {
  const auto d = Delivery(machine.options.delivery);
  return d == Delivery::early || (d == Delivery::random && machine.random(2));
}

static void check_alignment(const void* global, u32 shared, u32 num_bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("the global address %p is not 16-byte aligned", global);
  if (shared % 16) fail("the shared address is not 16-byte aligned");
  if (!num_bytes || num_bytes % 16) fail("%u bytes, expected a multiple of 16", num_bytes);
}

// ---- cp.async: belongs to the thread that issues it

static void run(const Copy16& c) {
  u8* to = my_block().arena + c.to;
  memcpy(to, c.from, c.num_bytes);
  memset(to + c.num_bytes, 0, 16 - c.num_bytes);
}

void cp_async_16(void* to, const void* from, u32 num_bytes, Location at) {
  const u32 offset = shared_address(to, at);
  doing("cp_async_16", at);
  if (num_bytes > 16) fail("src_bytes is %u, expected 0 to 16", num_bytes);
  check_alignment(from, offset, 16);
  const Copy16 copy{offset, static_cast<const u8*>(from), num_bytes};
  if (machine.checked()) {
    if (num_bytes) global_access(reinterpret_cast<uintptr_t>(from), num_bytes, false, me().view, Way::plain);
    shared_write(my_block(), offset, 16, me().view, Way::plain, kPending);
  }
  if (happens_now())
    run(copy);
  else
    poison(my_block(), offset, 16);
  me().copies.push_back(copy);
}

void cp_async_commit(Location at) {
  doing("cp_async_commit", at);
  ThreadState& t = me();
  t.copy_groups.push_back(std::move(t.copies));
  t.copies.clear();
  preempt();
}

void cp_async_wait(u32 num_groups, Location at) {
  doing("cp_async_wait", at);
  ThreadState& t = me();
  while (t.copy_groups.size() > num_groups) {
    for (const Copy16& c : t.copy_groups.front()) {
      run(c);
      if (machine.checked()) my_block().shadow->fill(c.to, 16, t.view.epoch());
    }
    t.copy_groups.erase(t.copy_groups.begin());
  }
}

// ---- tensor maps

// PTX ISA, "Swizzling modes": 16-byte chunks; address bits 4.. are XORed with bits 7...
u32 swizzled(u32 address, u32 mode) {
  static constexpr u32 kChunkBits[] = {0, 0x10, 0x30, 0x70};
  return address ^ (address >> 3 & kChunkBits[mode]);
}

static const TensorMap& tensor_map(const void* p, u32 rank) {
  if (reinterpret_cast<uintptr_t>(p) % 64) fail("the tensor map at %p is not 64-byte aligned", p);
  const TensorMap& m = *static_cast<const TensorMap*>(p);
  if (m.magic != kTensorMapMagic) fail("%p is no tensor map", p);
  if (rank && m.rank != rank) fail("the tensor map has %u dimensions, the instruction %u", m.rank, rank);
  return m;
}

void prefetch_tensor_map(const void* map, Location at) {
  doing("tma_prefetch_descriptor", at);
  tensor_map(map, 0);
}

static u32 box_bytes(const TensorMap& m) {
  u32 n = m.element_bytes;
  for (u32 i = 0; i < m.rank; i++) n *= m.box[i];
  return n;
}

static void check_box(const TensorMap& m, u32 shared) {
  const u32 alignment = std::max(128u, m.swizzle ? 128u << m.swizzle : 0u);  // 256, 512, 1024 for the three swizzles
  if (shared % alignment) fail("the shared address is not aligned to %u bytes", alignment);
}

// Calls f(shared address, global pointer, first byte inside, end of the bytes inside) for each 16 bytes of the box.
template <class F>
static void each_chunk(const TensorMap& m, const Coordinates& where, u32 shared, F f) {
  const u32 row_bytes = m.box[0] * m.element_bytes;
  u32 rows = 1;
  for (u32 i = 1; i < m.rank; i++) rows *= m.box[i];
  for (u32 r = 0; r < rows; r++) {
    bool inside = true;
    int64_t row_offset = 0;
    for (u32 i = 1, rest = r; i < m.rank; rest /= m.box[i], i++) {
      const int64_t at = int64_t{where.at[i]} + rest % m.box[i];
      inside = inside && at >= 0 && at < int64_t{m.dims[i]};
      row_offset += at * int64_t(m.strides[i - 1]);
    }
    const int64_t end = int64_t{m.dims[0]} * m.element_bytes;
    for (u32 x = 0; x < row_bytes; x += 16) {
      const int64_t offset = int64_t{where.at[0]} * m.element_bytes + x;
      const u32 first = u32(std::clamp<int64_t>(-offset, 0, 16)), last = u32(std::clamp<int64_t>(end - offset, 0, 16));
      f(swizzled(shared + r * row_bytes + x, m.swizzle), reinterpret_cast<u8*>(m.base) + row_offset + offset,
        inside ? first : 0, inside ? last : 0);
    }
  }
}

// ---- loads that an mbarrier counts

static void issue(Load load, Barrier* barrier, u32 mask, void* to) {
  ThreadState& t = me();
  const u32 offset = shared_address(to, t.at);
  doing(load.tensor ? "tma_load" : "bulk_load", t.at);
  if (load.tensor)
    check_box(load.map, offset);
  else
    check_alignment(load.from, offset, load.num_bytes);
  if (mask >> machine.num_blocks)
    fail("mask %04x names a block that the cluster of %u has not", mask, machine.num_blocks);
  const bool multicast = mask != 0;
  for (u32 rank = 0; rank < machine.num_blocks; rank++) {
    if (multicast ? !(mask >> rank & 1) : rank != t.block->rank) continue;
    Block& b = machine.blocks[rank];
    if (!b.live) fail("block rank %u has ended: its shared memory is gone", rank);
    if (offset + load.num_bytes > kArenaBytes) fail("the load runs past the end of shared memory");
    MBarrier& m = mbarrier_of(b, barrier);
    if (machine.checked()) {
      if (!t.view.knows(b.shadow->last_write(m.offset)))
        fail("%s is used without synchronisation with its initialisation", describe(b, m).c_str());
      if (!m.fenced && unfenced(b.shadow->last_write(m.offset), t.view))
        fail("%s is used by a copy without fence_mbarrier_init after its initialisation", describe(b, m).c_str());
      shared_write(b, offset, load.num_bytes, t.view, Way::async, kPending);
    }
    poison(b, offset, load.num_bytes);
    load.block = rank;
    load.to = offset;
    load.barrier = b.mbarrier_at[m.offset / 8] - 1u;
    machine.loads.push_back(load);
  }
  if (Delivery(machine.options.delivery) == Delivery::early)
    while (!machine.loads.empty()) deliver_load(0);
  preempt();
}

void deliver_load(size_t i) {
  const Load l = machine.loads[i];
  machine.loads.erase(machine.loads.begin() + long(i));
  Block& b = machine.blocks[l.block];
  MBarrier& m = b.mbarriers[l.barrier];
  const Epoch arrived = machine.checked() ? make_epoch(machine.run, m.agent, ++m.clock) : 0;
  if (l.tensor) {
    each_chunk(l.map, l.where, l.to, [&](u32 to, const u8* from, u32 first, u32 last) {
      memset(b.arena + to, 0, 16);
      if (last > first) memcpy(b.arena + to + first, from + first, last - first);
    });
  } else {
    memcpy(b.arena + l.to, l.from, l.num_bytes);
  }
  if (machine.checked()) b.shadow->fill(l.to, l.num_bytes, arrived);
  complete_bytes(b, l.barrier, l.num_bytes);
}

static void check_global(u64 address, u64 num_bytes, bool write) {
  if (machine.checked()) global_access(address, num_bytes, write, me().view, Way::plain);
}

void bulk_load(void* to, const void* from, u32 num_bytes, Barrier* barrier, u32 mask, Location at) {
  doing("bulk_load", at);
  Load load{};
  load.from = static_cast<const u8*>(from);
  load.num_bytes = num_bytes;
  check_global(reinterpret_cast<u64>(from), num_bytes, false);
  issue(load, barrier, mask, to);
}

// The bytes of the box that lie inside the tensor are read now, as far as the checker is concerned.
static void check_tensor(const TensorMap& m, const Coordinates& where, bool write) {
  if (!machine.checked()) return;
  each_chunk(m, where, 0, [&](u32, const u8* p, u32 first, u32 last) {
    if (last > first) check_global(reinterpret_cast<u64>(p) + first, last - first, write);
  });
}

void tma_load(void* to, const void* map, Barrier* barrier, Coordinates where, u32 rank, u32 mask, Location at) {
  doing("tma_load", at);
  Load load{};
  load.tensor = true;
  load.map = tensor_map(map, rank);
  load.where = where;
  load.num_bytes = box_bytes(load.map);
  check_tensor(load.map, where, false);
  issue(load, barrier, mask, to);
}

// ---- stores that their thread waits for in groups

static void run(Store& s) {
  if (s.done) return;
  s.done = true;
  u8* arena = my_block().arena;
  if (s.tensor)
    each_chunk(s.map, s.where, s.from, [&](u32 from, u8* to, u32 first, u32 last) {
      if (last > first) memcpy(to + first, arena + from + first, last - first);
    });
  else
    memcpy(s.to, arena + s.from, s.num_bytes);
}

static void issue(Store s) {
  ThreadState& t = me();
  if (machine.checked()) {
    if (t.store_slot < 0) t.store_slot = int(t.block->num_store_slots++);
    s.view = snapshot_view(t, store_agent(t.block->rank, u32(t.store_slot)), ++t.store_clock);
    shared_read(my_block(), s.from, s.num_bytes, s.view, Way::async);
  }
  if (happens_now()) run(s);
  t.stores.push_back(std::move(s));
  preempt();
}

void bulk_store(void* to, const void* from, u32 num_bytes, Location at) {
  Store s{};
  s.from = shared_address(from, at);
  doing("bulk_store", at);
  s.to = static_cast<u8*>(to);
  s.num_bytes = num_bytes;
  check_alignment(to, s.from, num_bytes);
  check_global(reinterpret_cast<u64>(to), num_bytes, true);
  issue(std::move(s));
}

void tma_store(const void* map, const void* from, Coordinates where, u32 rank, Location at) {
  Store s{};
  s.from = shared_address(from, at);
  doing("tma_store", at);
  s.tensor = true;
  s.map = tensor_map(map, rank);
  s.where = where;
  s.num_bytes = box_bytes(s.map);
  check_box(s.map, s.from);
  check_tensor(s.map, where, true);
  issue(std::move(s));
}

void bulk_commit(Location at) {
  doing("bulk_commit", at);
  ThreadState& t = me();
  t.store_groups.push_back(std::move(t.stores));
  t.stores.clear();
  preempt();
}

void bulk_wait(u32 num_groups, bool only_reads, Location at) {
  doing(only_reads ? "bulk_wait_read" : "bulk_wait", at);
  ThreadState& t = me();
  u32 finished = 0;
  while (t.store_groups.size() > num_groups) {
    for (Store& s : t.store_groups.front()) {
      run(s);
      finished = s.view.clock;
    }
    t.store_groups.erase(t.store_groups.begin());
  }
  if (machine.checked() && finished && t.store_slot >= 0) {
    const u32 agent = store_agent(t.block->rank, u32(t.store_slot));
    if (!t.view.knows(agent, finished)) t.view.past = with_own(t.view.past, agent, finished);
  }
}

}  // namespace emu
