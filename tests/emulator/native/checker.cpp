// checker.cpp - every access of the checked build comes here: is it in bounds, initialised, allowed, and ordered after
// what it conflicts with?
#include <algorithm>

#include "machine.h"

namespace emu {

// ---- agents: 0 is the kernel before this one, then the threads, then what acts on its own in each block

static constexpr u32 kAgentsPerBlock = kMaxBarriers + 32 + kMaxStoreSlots;
static u32 extra(u32 block) { return 1 + machine.num_blocks * machine.num_threads + block * kAgentsPerBlock; }
u32 thread_agent(u32 block, u32 thread) { return 1 + block * machine.num_threads + thread; }
u32 barrier_agent(u32 block, u32 number) {
  if (number >= kMaxBarriers) fail("emulator: more than %u mbarriers in a block", kMaxBarriers);
  return extra(block) + number;
}
u32 wgmma_agent(u32 block, u32 warp) { return extra(block) + kMaxBarriers + warp; }
u32 store_agent(u32 block, u32 slot) {
  if (slot >= kMaxStoreSlots) fail("emulator: more than %u threads of a block issue bulk stores", kMaxStoreSlots);
  return extra(block) + kMaxBarriers + 32 + slot;
}
u32 num_agents() { return extra(machine.num_blocks); }

std::string agent_name(Epoch e) {
  e &= ~kAtomic;
  if (e == (kPending & ~kAtomic)) return "an asynchronous copy in flight";
  const u32 agent = epoch_agent(e), num_threads = machine.num_blocks * machine.num_threads;
  u32 block = 0;
  std::string who;
  if (agent == 0) return "the kernel before this one";
  if (agent <= num_threads) {
    block = (agent - 1) / machine.num_threads;
    who = text("thread %u", (agent - 1) % machine.num_threads);
  } else {
    block = (agent - 1 - num_threads) / kAgentsPerBlock;
    const u32 slot = (agent - 1 - num_threads) % kAgentsPerBlock;
    if (slot < kMaxBarriers)
      who = text("the bulk load of mbarrier #%u", slot);
    else if (slot < kMaxBarriers + 32)
      who = text("wgmma of warp %u", slot - kMaxBarriers);
    else
      who = "a bulk store";
  }
  const u32 cluster = epoch_cluster(e);
  if (cluster != machine.run || machine.num_blocks > 1) {
    const uint3 first = machine.cluster_index[cluster];
    const dim3 c = machine.cluster;
    who +=
        text(" of block (%u,%u,%u)", first.x + block % c.x, first.y + block / c.x % c.y, first.z + block / (c.x * c.y));
  }
  return who;
}

std::string shared_name(const Block& b, u32 offset) {
  std::string whose = &b == &my_block() ? "" : text(" of block rank %u", b.rank);
  if (b.dynamic_offset && offset < b.static_begin)
    return text("dynamic shared memory%s, byte %u of %u", whose.c_str(), offset - b.dynamic_offset,
                machine.shared_bytes);
  for (const auto& [site, start] : b.arrays)
    if (offset + 32 >= start && offset < start + site->num_bytes + 32)
      return text("shared array %s%s, byte %d of %zu", site->name, whose.c_str(), int(offset) - int(start),
                  site->num_bytes);
  return text("shared memory%s at %u", whose.c_str(), offset);
}

// ---- what threads know

void tick(ThreadState& t) { t.view.clock = next_clock(t.view.clock); }

PastRef snapshot(ThreadState& t) {
  t.view.past = with_own(t.view.past, t.view.agent, t.view.clock);
  tick(t);
  return t.view.past;
}

void learn(ThreadState& t, const PastRef& past) { t.view.past = join(t.view.past, past); }

View snapshot_view(ThreadState& t, u32 agent, u32 clock) { return {snapshot(t), machine.run, agent, clock}; }

// Whether the ordinary write `e` was not followed, as far as the view knows, by fence_proxy_async in the thread that
// wrote.
bool unfenced(Epoch e, const View& v) {
  const u32 agent = epoch_agent(e);
  if (e == kBefore || epoch_cluster(e) != machine.run || agent == 0 || agent > machine.num_blocks * machine.num_threads)
    return false;
  const std::vector<u32>& fences = machine.threads[agent - 1].proxy_fences;
  const auto first = std::lower_bound(fences.begin(), fences.end(), epoch_clock(e));
  return first == fences.end() || !v.knows(agent, *first);
}

// ---- accesses

[[noreturn]] static void report(const Shadow::Conflict& c, const std::string& where, void* caller) {
  std::string s = std::string(c.what) + ": " + where;
  if (c.with && c.with != kPending) s += "; the other is " + agent_name(c.with);
  fail_at(caller, s);
}

void shared_read(Block& b, u32 offset, u32 num_bytes, const View& v, Way way, void* caller) {
  if (const auto c = b.shadow->read(offset, num_bytes, v, way)) report(c, shared_name(b, u32(c.offset)), caller);
}

void shared_write(Block& b, u32 offset, u32 num_bytes, const View& v, Way way, Epoch mark, void* caller) {
  if (const auto c = way == Way::atomic ? b.shadow->update(offset, num_bytes, v)
                                        : b.shadow->write(offset, num_bytes, v, way, mark))
    report(c, shared_name(b, u32(c.offset)), caller);
}

Block* block_of(const void* p, u32* offset) {
  const uintptr_t o = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(machine.arenas);
  if (o >= uintptr_t{kArenaBytes} * machine.num_blocks) return nullptr;
  *offset = u32(o % kArenaBytes);
  return &machine.blocks[o / kArenaBytes];
}

Buffer* find_buffer(uintptr_t address, u64 num_bytes) {
  const auto holds = [&](const Buffer& b) {
    return address >= b.address && address + num_bytes <= b.address + b.num_bytes;
  };
  if (machine.last_buffer && holds(*machine.last_buffer)) return machine.last_buffer;
  for (const auto& b : machine.buffers)
    if (holds(*b)) return machine.last_buffer = b.get();
  return nullptr;
}

static std::string nearest_buffer(uintptr_t address) {
  const Buffer* best = nullptr;
  uintptr_t distance = 1 << 20;
  bool behind = false;
  for (const auto& b : machine.buffers) {
    const uintptr_t end = b->address + b->num_bytes;
    const uintptr_t d = address >= end ? address - end : address < b->address ? b->address - address : 0;
    if (d < distance) best = b.get(), distance = d, behind = address >= b->address;
  }
  if (address < 4096) return "a null pointer";
  if (!best) return text("%p, near no buffer of this launch", reinterpret_cast<void*>(address));
  return text("%zu bytes %s of buffer %s (%llu bytes)", size_t(distance),
              behind ? "behind the end" : "before the start", best->name.c_str(), (unsigned long long)best->num_bytes);
}

void global_access(uintptr_t address, u64 num_bytes, bool write, const View& v, Way way, void* caller) {
  Buffer* b = find_buffer(address, num_bytes);
  if (!b)
    fail_at(caller,
            text("out-of-bounds global %s of %llu bytes: ", write ? "write" : "read", (unsigned long long)num_bytes) +
                nearest_buffer(address));
  if (write && !b->writable) {
    for (const auto& other : machine.buffers)  // the same memory may have been given twice
      if (other->writable && address >= other->address && address + num_bytes <= other->address + other->num_bytes)
        b = other.get();
    if (!b->writable) fail_at(caller, text("write to buffer %s, which is read-only", b->name.c_str()));
  }
  if (!b->constant && !v.knows(0, 1))
    fail_at(caller, text("%s of buffer %s before griddep_wait: the kernel before this one may still %s it",
                         write ? "write" : "read", b->name.c_str(), write ? "use" : "write"));
  if (!b->shadow.size()) return;
  const size_t offset = address - b->address;
  const auto c = way == Way::atomic ? b->shadow.update(offset, num_bytes, v)
                 : write            ? b->shadow.write(offset, num_bytes, v, Way::plain, v.epoch())
                                    : b->shadow.read(offset, num_bytes, v, Way::plain);
  if (c)
    report(c, text("buffer %s, byte %zu of %llu", b->name.c_str(), c.offset, (unsigned long long)b->num_bytes), caller);
}

void any_access(uintptr_t address, u64 num_bytes, bool write, void* caller) {
  ThreadState& t = me();
  u32 offset = 0;
  if (Block* b = block_of(reinterpret_cast<void*>(address), &offset)) {
    if (b->live == 0 && b != t.block) fail_at(caller, "access to the shared memory of a block that has ended");
    if (write)
      shared_write(*b, offset, u32(num_bytes), t.view, Way::plain, t.view.epoch(), caller);
    else
      shared_read(*b, offset, u32(num_bytes), t.view, Way::plain, caller);
    return;
  }
  const uintptr_t on_stack = address - reinterpret_cast<uintptr_t>(machine.stacks);
  if (on_stack < uintptr_t{machine.stack_bytes} * machine.num_stacks) {
    if (on_stack / machine.stack_bytes != machine_index(t))
      fail_at(caller, "access to the local memory of another thread");
    return;
  }
  const uintptr_t in_threads = address - reinterpret_cast<uintptr_t>(machine.threads.data());
  if (in_threads < machine.threads.size() * sizeof(ThreadState) || address == reinterpret_cast<uintptr_t>(&current))
    return;
  if (address >= machine.module_begin && address < machine.module_end) {
    if (write) fail_at(caller, "write to a constant or static variable");
    return;
  }
  global_access(address, num_bytes, write, t.view, Way::plain, caller);
}

}  // namespace emu
