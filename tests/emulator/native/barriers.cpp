// barriers.cpp - bar.sync, bar.arrive, the cluster barrier, and the dependency between kernels.
#include "machine.h"

namespace emu {

static constexpr u32 kWholeBlock = 0;  // expected count of __syncthreads: all threads that have not ended

static void complete(NamedBarrier& barrier) {
  if (machine.checked()) {
    const PastRef past = barrier.gathering.take();
    for (u32 t : barrier.waiting) {
      learn(machine.threads[t], past);
      tick(machine.threads[t]);
    }
  }
  barrier.result = barrier.operation == 1   ? barrier.sum == barrier.arrived
                   : barrier.operation == 2 ? barrier.sum != 0
                                            : int(barrier.sum);
  barrier.arrived = barrier.expected = barrier.warps = barrier.sum = 0;
  barrier.operation = -1;
  wake(barrier.waiting);
}

static void enter(u32 id, u32 num_threads, Location at, bool waits, int operation = -1, bool predicate = false) {
  ThreadState& t = me();
  Block& b = my_block();
  NamedBarrier& barrier = b.barriers[id];
  const bool divergent = barrier.warps >> t.warp & 1 && barrier.at[t.warp].line() != at.line();
  if (divergent)
    fail("divergent: another lane of warp %u waits for barrier %u at %s", t.warp, id,
         position(barrier.at[t.warp]).c_str());
  if (barrier.arrived && barrier.expected != num_threads)
    fail("barrier %u is used with %u and with %u threads at once", id, barrier.expected, num_threads);
  if (barrier.arrived && barrier.operation != operation) fail("__syncthreads and its _and, _or, _count forms meet");
  barrier.warps |= 1u << t.warp;
  barrier.at[t.warp] = at;
  barrier.expected = num_threads;
  barrier.operation = operation;
  barrier.arrived++;
  barrier.sum += predicate;
  if (num_threads != kWholeBlock && barrier.arrived > num_threads)
    fail("more than %u threads arrive at barrier %u", num_threads, id);
  if (machine.checked()) {
    barrier.gathering.add(t.view);
    if (!waits) tick(t);
  }
  if (waits) barrier.waiting.push_back(machine_index(t));
  if (barrier.arrived == (num_threads == kWholeBlock ? b.live : num_threads)) complete(barrier);
  if (waits) {
    t.waits_for = text("barrier %u", id);
    block_current();
    t.waits_for.clear();
  } else {
    preempt();
  }
}

static void check_count(u32 id, u32 num_threads) {
  if (id == 0) return;
  if (num_threads == 0 || num_threads % 32 || num_threads > machine.num_threads)
    fail("%u threads, expected a multiple of 32 up to the block's %u", num_threads, machine.num_threads);
}

void bar_sync(u32 id, u32 num_threads, Location at) {
  doing(id ? "bar.sync" : "__syncthreads", at);
  check_count(id, num_threads);
  enter(id, num_threads, at, true);
}

void bar_arrive(u32 id, u32 num_threads, Location at) {
  doing("bar.arrive", at);
  check_count(id, num_threads);
  enter(id, num_threads, at, false);
}

u32 bar_reduce(int operation, int predicate, Location at) {
  doing("__syncthreads_count/and/or", at);
  enter(0, kWholeBlock, at, true, operation, predicate != 0);
  return u32(my_block().barriers[0].result);
}

// ---- clusters

u32 cluster_rank() { return my_block().rank; }
u32 cluster_size() { return machine.num_blocks; }

static void complete_cluster() {
  machine.cluster_arrived = 0;
  machine.cluster_phase++;
  if (machine.checked()) {
    const PastRef past = machine.cluster_gathering.take();
    for (ThreadState& t : machine.threads) t.released_by_cluster = past;
  }
  wake(machine.cluster_waiting);
}

void cluster_arrive(Location at) {
  doing("cluster_arrive", at);
  ThreadState& t = me();
  u8& arrived = machine.cluster_has_arrived[machine_index(t)];
  if (arrived) fail("the thread arrives twice without cluster_wait between");
  arrived = 1;
  if (machine.checked()) {
    machine.cluster_gathering.add(t.view);
    tick(t);
  }
  if (++machine.cluster_arrived == machine.live) complete_cluster();
  preempt();
}

void cluster_wait(Location at) {
  doing("cluster_wait", at);
  ThreadState& t = me();
  u8& arrived = machine.cluster_has_arrived[machine_index(t)];
  if (!arrived) fail("cluster_wait without cluster_arrive");
  if (t.cluster_phase == machine.cluster_phase) {
    machine.cluster_waiting.push_back(machine_index(t));
    block_current();
  }
  t.cluster_phase++;
  arrived = 0;
  if (machine.checked()) learn(t, t.released_by_cluster);
}

uint64_t cluster_map(const void* p, u32 rank, Location at) {
  doing("cluster_map", at);
  u32 offset;
  if (!block_of(p, &offset)) fail("%p does not point into shared memory", p);
  if (rank >= machine.num_blocks) fail("rank %u, but the cluster has %u blocks", rank, machine.num_blocks);
  return reinterpret_cast<uint64_t>(machine.blocks[rank].arena + offset);
}

// A thread that has ended is not waited for.
void thread_left_barriers(ThreadState& t) {
  NamedBarrier& barrier = t.block->barriers[0];
  if (barrier.arrived && barrier.expected == kWholeBlock && barrier.arrived == t.block->live) complete(barrier);
  if (machine.cluster_arrived && machine.cluster_arrived == machine.live) complete_cluster();
}

// ---- programmatic dependent launch

void griddep_wait(Location at) {
  doing("griddep_wait", at);
  ThreadState& t = me();
  t.block->waited_for_previous = true;
  if (machine.checked()) t.view.past = with_own(t.view.past, 0, 1);
  preempt();
}

void griddep_launch(Location at) {
  doing("griddep_launch", at);
  preempt();
}

}  // namespace emu
