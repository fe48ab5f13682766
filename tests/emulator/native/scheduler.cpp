// scheduler.cpp - which thread runs next. A thread that blocks picks its successor itself; there is no scheduler fiber.
#include <sys/mman.h>

#include <algorithm>
#include <map>

#include "fiber.h"
#include "machine.h"

namespace emu {

Machine machine;
Thread* current;

// Ready threads: a queue, or for the priority schedule a bitmap by rank (warps in random order, lanes in order).
static std::vector<u32> queue;
static size_t queue_head;
static std::vector<u64> ready_ranks;
static std::vector<u32> rank_of, thread_of;
static u32 num_ready;

u64 Machine::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static bool by_priority() { return machine.options.schedule == u32(Schedule::priority); }

void make_ready(u32 thread) {
  if (by_priority()) {
    const u32 rank = rank_of[thread];
    ready_ranks[rank / 64] |= u64{1} << rank % 64;
  } else {
    queue.push_back(thread);
  }
  num_ready++;
}

void wake(std::vector<u32>& threads) {
  if (machine.options.schedule == u32(Schedule::reverse)) std::sort(threads.begin(), threads.end(), std::greater<>());
  for (u32 t : threads) make_ready(t);
  threads.clear();
}

[[noreturn]] static void report_deadlock() {
  std::map<std::string, std::pair<u32, u32>> groups;  // what they wait in -> how many, the first
  u32 first = ~0u;
  for (u32 i = 0; i < machine.threads.size(); i++) {
    const ThreadState& t = machine.threads[i];
    if (t.done) continue;
    if (first == ~0u) first = i;
    std::string s = std::string(t.doing ? t.doing : "?") + " at " + position(t.at);
    if (!t.waits_for.empty()) s += " (" + t.waits_for + ")";
    const auto [it, fresh] = groups.try_emplace(s, 0, t.number);
    it->second.first++;
  }
  std::string s = "deadlock:";
  for (const auto& [what, who] : groups)
    s += text(" %u threads (first: %u) wait in %s;", who.first, who.second, what.c_str());
  s.pop_back();
  current = &machine.threads[first];
  fail("%s", s.c_str());
}

// An asynchronous operation that nothing waits for yet happens at some moment of the scheduler's choosing.
static void happen_at_random() {
  if (machine.options.delivery == u32(Delivery::random) && !machine.loads.empty() && machine.random(64) == 0)
    deliver_load(machine.random(u32(machine.loads.size())));
  if (machine.wgmma_delivery == Delivery::random && machine.random(64) == 0) step_any_wgmma();
}

static u32 pick() {
  happen_at_random();
  while (!num_ready) {
    if (!machine.loads.empty()) {
      const size_t n = machine.loads.size();
      deliver_load(machine.options.delivery == u32(Delivery::random)    ? machine.random(u32(n))
                   : machine.options.schedule == u32(Schedule::reverse) ? n - 1
                                                                        : 0);
    } else if (!step_any_wgmma()) {
      report_deadlock();
    }
  }
  num_ready--;
  if (by_priority()) {
    for (size_t i = 0;; i++) {
      if (!ready_ranks[i]) continue;
      const u32 rank = u32(i * 64) + u32(__builtin_ctzll(ready_ranks[i]));
      ready_ranks[i] &= ready_ranks[i] - 1;
      return thread_of[rank];
    }
  }
  if (machine.options.schedule == u32(Schedule::random)) {
    const size_t i = machine.random(u32(queue.size()));
    std::swap(queue[i], queue.back());
    const u32 t = queue.back();
    queue.pop_back();
    return t;
  }
  const u32 t = queue[queue_head++];
  if (queue_head == queue.size()) {
    queue.clear();
    queue_head = 0;
  } else if (queue_head > 4096) {
    queue.erase(queue.begin(), queue.begin() + long(queue_head));
    queue_head = 0;
  }
  return t;
}

static void go_to(void** save, u32 thread) {
  machine.num_switches++;
  machine.order_hash = (machine.order_hash ^ thread) * 0x9e3779b97f4a7c15ull;
  current = &machine.threads[thread];
  switch_stack(save, machine.threads[thread].stack_pointer);
}

void block_current() {
  ThreadState& t = me();
  const u32 next = pick();
  if (&machine.threads[next] != &t) go_to(&t.stack_pointer, next);
}

void preempt() {
  const auto s = Schedule(machine.options.schedule);
  if (s != Schedule::priority && !(s == Schedule::random && machine.random(4) == 0)) return;
  make_ready(machine_index(me()));
  block_current();
}

static void leave() {
  ThreadState& t = me();
  Block& b = *t.block;
  t.doing = "end of the kernel";
  if (!t.copies.empty() || !t.copy_groups.empty()) fail("the thread ends with cp.async copies it has not waited for");
  if (!t.stores.empty() || !t.store_groups.empty())
    fail("the thread ends with bulk stores it has not waited for (their shared memory may be reused)");
  if (!t.accumulators.empty()) fail("the thread ends with wgmma in flight");
  t.done = true;
  b.live--;
  machine.live--;
  thread_left_collectives(t);
  thread_left_barriers(t);
  thread_left_mbarriers(t);
  if (machine.live) go_to(&t.stack_pointer, pick());
  current = nullptr;
  switch_stack(&t.stack_pointer, machine.main_stack);
}

static void thread_main() {
  machine.kernel(machine.arguments);
  leave();
  __builtin_unreachable();
}

static void order_ranks() {
  const u32 n = u32(machine.threads.size()), num_warps = (n + 31) / 32;
  rank_of.resize(num_warps * 32);
  thread_of.resize(num_warps * 32);
  ready_ranks.assign((num_warps * 32 + 63) / 64, 0);
  std::vector<u32> order(num_warps);
  for (u32 i = 0; i < num_warps; i++) order[i] = i;
  for (u32 i = num_warps; i > 1; i--) std::swap(order[i - 1], order[machine.random(i)]);
  for (u32 i = 0; i < num_warps * 32; i++) {
    rank_of[i] = order[i / 32] * 32 + i % 32;
    thread_of[rank_of[i]] = i;
  }
}

void run_cluster() {
  const u32 n = u32(machine.threads.size());
  queue.clear();
  queue_head = num_ready = 0;
  if (by_priority()) order_ranks();
  for (u32 i = 0; i < n; i++) {
    // Stack tops are staggered: all at the same offset would share a few cache sets.
    u8* top = machine.stacks + size_t(i + 1) * machine.stack_bytes - 256 - i % 61 * 192;
    machine.threads[i].stack_pointer = prepare_stack(top, thread_main);
  }
  const bool reverse = machine.options.schedule == u32(Schedule::reverse);
  for (u32 i = 0; i < n; i++) make_ready(reverse ? n - 1 - i : i);
  machine.live = n;
  go_to(&machine.main_stack, pick());
  current = nullptr;
}

}  // namespace emu
