// launch.cpp - runs a grid, one cluster after the other. The functions that device.py calls by ctypes.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "faults.h"
#include "fiber.h"
#include "machine.h"

namespace emu {

struct KernelTable {  // emulator.h
  void (*run)(void** arguments);
  u32 num_parameters;
  const void* parameters;
};
struct BufferDescription {  // device.py
  const char* name;
  u64 address, num_bytes;
  u32 writable, constant, starts_uninitialised, unused;
};
struct LaunchDescription {
  u32 grid[3], block[3], cluster[3], shared_bytes, num_buffers, unused;
  const BufferDescription* buffers;
  void** arguments;
};

static u8* reserve(size_t num_bytes, size_t alignment) {
  void* p =
      mmap(nullptr, num_bytes + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("emulator: no memory for %zu bytes", num_bytes);
  return reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(p) + alignment - 1) / alignment * alignment);
}

// Arenas and stacks are kept from launch to launch.
static void prepare_memory(u32 num_blocks, u32 num_threads, u32 stack_bytes) {
  static u32 num_arenas = 0;
  if (num_blocks > num_arenas) {
    machine.arenas = reserve(size_t{kArenaBytes} * num_blocks, 1 << 20);
    num_arenas = num_blocks;
  }
  if (num_threads <= machine.num_stacks && stack_bytes == machine.stack_bytes) return;
  machine.num_stacks = std::max(num_threads, kMaxThreads);
  machine.stack_bytes = stack_bytes;
  machine.stacks = reserve(size_t{stack_bytes} * machine.num_stacks, 1 << 16);
  for (u32 i = 0; i < machine.num_stacks; i++) mprotect(machine.stacks + size_t{i} * stack_bytes, 4096, PROT_NONE);
}

// The loaded library that holds p: the kernel's constants lie in it.
static void find_module(const void* p) {
  struct Query {
    uintptr_t p, begin, end;
  } q{reinterpret_cast<uintptr_t>(p), 0, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* argument) {
        Query& query = *static_cast<Query*>(argument);
        uintptr_t begin = ~uintptr_t{0}, end = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          begin = std::min(begin, start);
          end = std::max(end, start + info->dlpi_phdr[i].p_memsz);
        }
        if (query.p < begin || query.p >= end) return 0;
        query.begin = begin;
        query.end = end;
        return 1;
      },
      &q);
  machine.module_begin = q.begin;
  machine.module_end = q.end;
}

static void prepare_buffers(const LaunchDescription& d) {
  machine.buffers.clear();
  machine.last_buffer = nullptr;
  for (u32 i = 0; i < d.num_buffers; i++) {
    const BufferDescription& in = d.buffers[i];
    auto b = std::make_unique<Buffer>();
    b->name = in.name;
    b->address = uintptr_t(in.address);
    b->num_bytes = in.num_bytes;
    b->writable = in.writable;
    b->constant = in.constant;
    if (machine.checked() && b->writable && b->num_bytes) {
      b->shadow.reserve(b->num_bytes, &machine.global_sets);
      if (!in.starts_uninitialised) b->shadow.fill(0, b->num_bytes, kBefore);
    }
    machine.buffers.push_back(std::move(b));
  }
}

// The shadow of one block's arena, kept from block to block; what the last block used of it is made new.
struct KeptShadow {
  Shadow shadow;
  u32 num_used = kArenaBytes;
};
static std::deque<KeptShadow> kept_shadows;

static Shadow* shared_shadow(u32 rank) {
  while (kept_shadows.size() <= rank) kept_shadows.emplace_back().shadow.reserve(kArenaBytes, &machine.shared_sets);
  KeptShadow& k = kept_shadows[rank];
  k.shadow.fill(0, std::min(k.num_used, kArenaBytes), kOutside);
  k.num_used = kArenaBytes;
  return &k.shadow;
}

static void prepare_cluster(uint3 first) {
  for (const Block& b : machine.blocks)
    if (b.shadow) kept_shadows[b.rank].num_used = std::max(b.static_end, b.static_begin) + kRedZoneBytes;
  machine.blocks.clear();
  machine.threads.assign(size_t{machine.num_blocks} * machine.num_threads, {});
  machine.loads.clear();
  machine.cluster_waiting.clear();
  machine.cluster_has_arrived.assign(machine.threads.size(), 0);
  machine.cluster_arrived = machine.cluster_phase = 0;
  machine.cluster_gathering = {};
  machine.shared_sets.clear();
  const auto arena = reinterpret_cast<uintptr_t>(machine.arenas);
  std::erase_if(machine.atomics,
                [&](const auto& a) { return a.first - arena < uintptr_t{kArenaBytes} * machine.num_blocks; });
  machine.block_atomics.clear();
  PastRef beginning;
  if (machine.checked()) {
    auto past = std::make_shared<Past>();
    past->known.assign(machine.num_agents, 0);
    past->known[0] = machine.options.overlaps_previous ? 0 : 1;
    beginning = past;
  }
  const dim3 c = machine.cluster;
  for (u32 rank = 0; rank < machine.num_blocks; rank++) {
    Block& b = machine.blocks.emplace_back();
    b.rank = rank;
    b.index = {first.x + rank % c.x, first.y + rank / c.x % c.y, first.z + rank / (c.x * c.y)};
    b.arena = machine.arenas + size_t{rank} * kArenaBytes;
    b.static_begin = b.static_end = kDynamicBase + 1024 + machine.shared_bytes + kRedZoneBytes;
    b.live = machine.num_threads;
    b.mbarrier_at.assign(kArenaBytes / 8, 0);
    poison(b, 0, b.static_begin);
    if (machine.checked()) b.shadow = shared_shadow(rank);
    for (u32 i = 0; i < machine.num_threads; i++) {
      ThreadState& t = machine.threads[rank * machine.num_threads + i];
      const dim3 n = machine.block_dim;
      t.thread_index = {i % n.x, i / n.x % n.y, i / (n.x * n.y)};
      t.block_index = b.index;
      t.block_dim = n;
      t.grid_dim = machine.grid;
      t.number = i;
      t.lane = i % 32;
      t.warp = i / 32;
      t.block = &b;
      t.view = {beginning, machine.run, machine.checked() ? thread_agent(rank, i) : 0, 1};
      b.warps[t.warp].live |= 1u << t.lane;
    }
  }
}

static void run_grid(const LaunchDescription& d) {
  machine.grid = {d.grid[0], d.grid[1], d.grid[2]};
  machine.block_dim = {d.block[0], d.block[1], d.block[2]};
  machine.cluster = {d.cluster[0], d.cluster[1], d.cluster[2]};
  machine.shared_bytes = d.shared_bytes;
  machine.num_threads = d.block[0] * d.block[1] * d.block[2];
  machine.num_blocks = d.cluster[0] * d.cluster[1] * d.cluster[2];
  if (!machine.num_threads || machine.num_threads > kMaxThreads) fail("a block of %u threads", machine.num_threads);
  if (machine.shared_bytes > kMaxSharedBytes) fail("%u bytes of dynamic shared memory", machine.shared_bytes);
  machine.arguments = d.arguments;
  machine.num_agents = num_agents();
  machine.atomics.clear();
  machine.global_sets.clear();
  prepare_memory(machine.num_blocks, machine.num_blocks * machine.num_threads, machine.options.stack_bytes);
  prepare_buffers(d);

  machine.random_state = (machine.options.seed + 1) * 0x9e3779b97f4a7c15ull;
  for (int i = 0; i < 8; i++) machine.random();
  std::vector<uint3> order;
  for (u32 z = 0; z < d.grid[2]; z += d.cluster[2])
    for (u32 y = 0; y < d.grid[1]; y += d.cluster[1])
      for (u32 x = 0; x < d.grid[0]; x += d.cluster[0]) order.push_back({x, y, z});
  const auto schedule = Schedule(machine.options.schedule);
  if (schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::random || schedule == Schedule::priority)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[machine.random(u32(i))]);
  machine.cluster_index = order;

  // Copies and wgmma are late or early together for odd seeds, opposite for even ones: each extreme hides the other's
  // mistakes.
  const auto delivery = Delivery(machine.options.delivery);
  machine.wgmma_delivery = delivery == Delivery::random || machine.options.seed % 2 ? delivery
                           : delivery == Delivery::early                            ? Delivery::late
                                                                                    : Delivery::early;
  for (machine.run = 0; machine.run < order.size(); machine.run++) {
    prepare_cluster(order[machine.run]);
    run_cluster();
    if (!machine.error.empty()) return;
    for (const Block& b : machine.blocks)
      if (machine.options.overlaps_previous && !b.waited_for_previous)
        fail(
            "block (%u,%u,%u) of a launch that overlaps the previous one never calls griddep_wait: "
            "the kernel after it would not wait for the one before",
            b.index.x, b.index.y, b.index.z);
  }
}

extern "C" __attribute__((visibility("default"))) int emu_launch(const KernelTable* kernel,
                                                                 const LaunchDescription* description,
                                                                 const Options* options) {
  machine.options = *options;
  machine.kernel = kernel->run;
  machine.error.clear();
  machine.num_switches = machine.order_hash = 0;
  current = nullptr;
  find_module(kernel);
  try {
    const FaultGuard guard;
    run_grid(*description);
  } catch (const Failure&) {
  }
  machine.buffers.clear();
  return machine.error.empty() ? 0 : 1;
}
extern "C" __attribute__((visibility("default"))) const char* emu_error() { return machine.error.c_str(); }
extern "C" __attribute__((visibility("default"))) u64 emu_num_switches() { return machine.num_switches; }
extern "C" __attribute__((visibility("default"))) u64 emu_order_hash() { return machine.order_hash; }

}  // namespace emu
