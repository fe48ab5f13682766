// memory.cpp - shared memory's layout, named vector accesses, fences and atomics.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {

// ---- shared memory

void* shared_array(SharedArray* site) {
  Block& b = my_block();
  const auto [it, fresh] = b.arrays.try_emplace(site, 0);
  if (fresh) {
    const u32 offset = u32((b.static_end + kRedZoneBytes + site->alignment - 1) / site->alignment * site->alignment);
    it->second = offset;
    b.static_end = u32(offset + site->num_bytes);
    const u32 num_static = b.static_end - b.static_begin - kRedZoneBytes * u32(b.arrays.size());
    if (num_static > kMaxStaticBytes)
      fail("more than %u bytes of static shared memory (SHARED_ARRAY)", kMaxStaticBytes);
    if (num_static + machine.shared_bytes > kMaxSharedBytes)
      fail("more than %u bytes of shared memory, static and dynamic", kMaxSharedBytes);
    poison(b, offset, u32(site->num_bytes));
    if (machine.checked()) b.shadow->fill(offset, site->num_bytes, kUninitialised);
  }
  return b.arena + it->second;
}

void* shared_dynamic(u32 alignment) {
  Block& b = my_block();
  if (!b.dynamic_offset) {
    if (alignment < 16 || alignment > 1024 || alignment & (alignment - 1))
      fail("SHARED_DYNAMIC: alignment %u, expected 16 to 1024", alignment);
    b.dynamic_offset = kDynamicBase + alignment;  // aligned as declared, never better
    if (machine.checked()) b.shadow->fill(b.dynamic_offset, machine.shared_bytes, kUninitialised);
  }
  return b.arena + b.dynamic_offset;
}

u32 shared_address(const void* p, Location at) {
  doing("shared_address", at);
  u32 offset;
  Block* b = block_of(p, &offset);
  if (!b) fail("%p does not point into shared memory", p);
  if (b != &my_block())
    fail("the pointer leads into another block's shared memory (use the _cluster form of the instruction)");
  return offset;
}

// NaN in every floating-point format.
void poison(Block& b, u32 offset, u32 num_bytes) { memset(b.arena + offset, 0xff, num_bytes); }

// ---- named accesses

void check_vector(const void* p, u32 num_bytes, bool write, Location at) {
  doing(write ? "vector store" : "vector load", at);
  if (reinterpret_cast<uintptr_t>(p) % num_bytes) fail("%p is not aligned to its %u bytes", p, num_bytes);
}

void load_nc(void* to, const void* p, u32 num_bytes, Location at) {
  doing("ld.global.nc", at);
  u32 offset;
  if (reinterpret_cast<uintptr_t>(p) % num_bytes) fail("%p is not aligned to its %u bytes", p, num_bytes);
  if (block_of(p, &offset)) fail("the address is in shared memory");
  if (machine.checked()) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    global_access(address, num_bytes, false, me().view, Way::plain);
    if (const Buffer* b = find_buffer(address, num_bytes); b && b->writable)
      fail("buffer %s is written by this launch: the read-only path may give old data", b->name.c_str());
  }
  memcpy(to, p, num_bytes);
}

void prefetch(const void* p, u32 num_bytes, Location at) {
  doing("prefetch", at);
  if (num_bytes > 1 && (num_bytes % 16 || reinterpret_cast<uintptr_t>(p) % 16))
    fail("address and size must be multiples of 16");
  if (machine.checked() && !find_buffer(reinterpret_cast<uintptr_t>(p), num_bytes))
    fail("the address is outside of every buffer");
}

// ---- fences and atomics

// fence, then atomic: publishes what the thread knew at the fence. atomic, then fence: the thread learns what was
// published.
void thread_fence(bool device_wide, Location at) {
  doing(device_wide ? "__threadfence" : "__threadfence_block", at);
  if (!machine.checked()) return;
  ThreadState& t = me();
  for (int scope = 0; scope <= int(device_wide); scope++) {
    if (t.learnt[scope]) learn(t, from_other(t.learnt[scope], machine.run));
    t.learnt[scope] = nullptr;
  }
  const PastRef now = snapshot(t);
  for (int scope = 0; scope <= int(device_wide); scope++) t.released[scope] = now;
}

static void exchange_knowledge(uintptr_t address) {
  ThreadState& t = me();
  PastRef* const published[2] = {&machine.block_atomics[{address, t.block->rank}], &machine.atomics[address]};
  for (int scope = 0; scope < 2; scope++) {
    t.learnt[scope] = join(t.learnt[scope], *published[scope]);
    if (t.released[scope]) *published[scope] = join(*published[scope], as_other(t.released[scope], machine.run));
  }
}

static u64 apply(Atomic operation, char type, u32 num_bytes, u64 old, u64 operand, u64 compare) {
  if (type == 'f') {
    const float a = __builtin_bit_cast(float, u32(old)), b = __builtin_bit_cast(float, u32(operand));
    switch (operation) {
      case Atomic::add: return __builtin_bit_cast(u32, a + b);
      case Atomic::exchange: return operand;
      default: fail("emulator: this atomic has no float form");
    }
  }
  const bool is_signed = type == 'i';
  const int64_t sa = num_bytes == 4 ? int32_t(old) : int64_t(old),
                sb = num_bytes == 4 ? int32_t(operand) : int64_t(operand);
  switch (operation) {
    case Atomic::add: return old + operand;
    case Atomic::min: return is_signed ? u64(std::min(sa, sb)) : std::min(old, operand);
    case Atomic::max: return is_signed ? u64(std::max(sa, sb)) : std::max(old, operand);
    case Atomic::exchange: return operand;
    case Atomic::compare_swap: return old == compare ? operand : old;
    case Atomic::inc: return old >= operand ? 0 : old + 1;
    case Atomic::dec: return old == 0 || old > operand ? operand : old - 1;
    case Atomic::bit_and: return old & operand;
    case Atomic::bit_or: return old | operand;
    case Atomic::bit_xor: return old ^ operand;
  }
  return 0;
}

u64 atomic(Atomic operation, void* p, u32 num_bytes, char type, u64 operand, u64 compare, Location at) {
  doing("atomic operation", at);
  if (reinterpret_cast<uintptr_t>(p) % num_bytes) fail("%p is not aligned to its %u bytes", p, num_bytes);
  if (machine.checked()) {
    u32 offset;
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (Block* b = block_of(p, &offset))
      shared_write(*b, offset, num_bytes, me().view, Way::atomic, 0);
    else
      global_access(address, num_bytes, true, me().view, Way::atomic);
    exchange_knowledge(address);
  }
  u64 old = 0;
  memcpy(&old, p, num_bytes);
  const u64 next = apply(operation, type, num_bytes, old, operand, compare);
  memcpy(p, &next, num_bytes);
  preempt();
  return old;
}

void fence_proxy_async(Location at) {
  doing("fence_proxy_async", at);
  if (!machine.checked()) return;
  me().proxy_fences.push_back(me().view.clock);
  tick(me());
}

}  // namespace emu
