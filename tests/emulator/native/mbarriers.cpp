// mbarriers.cpp - barriers in shared memory that count arrivals and bytes. Their state lives here; the kernel's 8 bytes
// hold a mark.
#include <algorithm>

#include "machine.h"

namespace emu {

static constexpr u64 kMark = 0x4d42617272696572;
static constexpr int64_t kMaxBytes = (1 << 20) - 1;  // PTX ISA, mbarrier: range of the tx-count

static u64 mark(u32 number) {
  return kMark ^ u64 { number } << 8;
}

static std::string name_of(const Block& b, u32 offset) { return shared_name(b, offset); }

MBarrier& mbarrier_of(Block& b, const void* p) {
  u32 offset;
  Block* owner = block_of(p, &offset);
  if (!owner) fail("%p does not point into shared memory", p);
  if (offset % 8) fail("%s is not 8-byte aligned", name_of(b, offset).c_str());
  const u32 number = b.mbarrier_at[offset / 8];
  if (!number) fail("the mbarrier at %s is not initialised", name_of(b, offset).c_str());
  if (*reinterpret_cast<const u64*>(b.arena + offset) != mark(number))
    fail("the mbarrier at %s was overwritten", name_of(b, offset).c_str());
  return b.mbarriers[number - 1];
}

std::string describe(const Block& b, const MBarrier& m) {
  return text("mbarrier at %s: phase %u, %u of %u arrivals and %lld bytes missing", name_of(b, m.offset).c_str(),
              m.phase, m.pending, m.count, (long long)m.bytes);
}

static void must_know_init(Block& b, const MBarrier& m) {
  if (machine.checked() && !me().view.knows(b.shadow->last_write(m.offset)))
    fail("the mbarrier at %s is used without synchronisation with its initialisation", name_of(b, m.offset).c_str());
}

void mbarrier_init(Barrier* p, u32 count, Location at) {
  doing("mbarrier_init", at);
  u32 offset;
  Block* b = block_of(p, &offset);
  if (!b || b != &my_block()) fail("%p does not point into this block's shared memory", static_cast<void*>(p));
  if (offset % 8) fail("%s is not 8-byte aligned", name_of(*b, offset).c_str());
  if (!count || count > (1u << 20) - 1) fail("count %u, expected 1 to 1048575", count);
  u16& number = b->mbarrier_at[offset / 8];
  if (number && b->mbarriers[number - 1].live)
    fail("the mbarrier at %s is initialised twice", name_of(*b, offset).c_str());
  MBarrier m{};
  m.offset = offset;
  m.count = m.pending = count;
  if (machine.checked()) {
    m.agent = barrier_agent(b->rank, u32(b->mbarriers.size()));
    shared_write(*b, offset, 8, me().view, Way::plain, me().view.epoch());
  }
  b->mbarriers.push_back(std::move(m));
  number = u16(b->mbarriers.size());
  *p = mark(number);
}

void mbarrier_inval(Barrier* p, Location at) {
  doing("mbarrier_inval", at);
  MBarrier& m = mbarrier_of(my_block(), p);
  must_know_init(my_block(), m);
  if (!m.waiting.empty()) fail("threads wait for it");
  m.live = false;
  my_block().mbarrier_at[m.offset / 8] = 0;
  if (machine.checked()) shared_write(my_block(), m.offset, 8, me().view, Way::plain, me().view.epoch());
}

// Called by whoever makes the barrier's operations visible to copies and to other blocks.
void fence_mbarrier_init(Location at) {
  doing("fence_mbarrier_init", at);
  for (MBarrier& m : my_block().mbarriers)
    if (!machine.checked() || epoch_agent(my_block().shadow->last_write(m.offset)) == me().view.agent) m.fenced = true;
}

static void check_phase(Block&, MBarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.count;
  if (machine.checked()) m.released = join(m.released, m.gathering.take());
  wake(m.waiting);
}

static void add_bytes(Block& b, MBarrier& m, int64_t num_bytes) {
  m.bytes += num_bytes;
  if (m.bytes > kMaxBytes || m.bytes < -kMaxBytes) fail("%s: the byte count leaves its range", describe(b, m).c_str());
}

static void arrive(Block& b, MBarrier& m, u32 expect_bytes) {
  must_know_init(b, m);
  if (!m.pending) fail("%s: more arrivals than its count in one phase", describe(b, m).c_str());
  if (machine.checked()) {
    m.gathering.add(me().view);
    tick(me());
  }
  add_bytes(b, m, expect_bytes);
  m.pending--;
  check_phase(b, m);
  preempt();
}

void mbarrier_arrive(Barrier* p, u32 expect_bytes, Location at) {
  doing(expect_bytes ? "mbarrier_arrive_expect_tx" : "mbarrier_arrive", at);
  arrive(my_block(), mbarrier_of(my_block(), p), expect_bytes);
}

void mbarrier_arrive_cluster(Barrier* p, u32 rank, Location at) {
  doing("mbarrier_arrive_cluster", at);
  if (rank >= machine.num_blocks) fail("rank %u, but the cluster has %u blocks", rank, machine.num_blocks);
  Block& b = machine.blocks[rank];
  if (!b.live) fail("block rank %u has ended: its shared memory is gone", rank);
  MBarrier& m = mbarrier_of(b, p);
  if (&b != &my_block() && !m.fenced)
    fail("%s is used by another block without fence_mbarrier_init after its initialisation", describe(b, m).c_str());
  arrive(b, m, 0);
}

void mbarrier_expect_tx(Barrier* p, u32 num_bytes, Location at) {
  doing("mbarrier_expect_tx", at);
  MBarrier& m = mbarrier_of(my_block(), p);
  must_know_init(my_block(), m);
  add_bytes(my_block(), m, num_bytes);
}

// A load has arrived: its bytes count, and whoever waits for the phase may read them.
void complete_bytes(Block& b, u32 number, u32 num_bytes) {
  MBarrier& m = b.mbarriers[number];
  if (machine.checked()) {
    auto arrived = std::make_shared<Past>();
    arrived->known.assign(machine.num_agents, 0);
    arrived->known[m.agent] = m.clock;
    m.gathering.add(PastRef(arrived));
  }
  add_bytes(b, m, -int64_t{num_bytes});
  check_phase(b, m);
}

// Bytes that arrive after the block has ended land in somebody else's shared memory.
void thread_left_mbarriers(ThreadState& t) {
  Block& b = *t.block;
  if (!b.live)
    for (const Load& l : machine.loads)
      if (l.block == b.rank)
        fail("the block ends with a bulk load that nobody waited for: %s", describe(b, b.mbarriers[l.barrier]).c_str());
  if (!machine.checked()) return;
  for (MBarrier& m : b.mbarriers) {
    m.observed = std::max(m.observed, t.view.past->known[m.agent]);
    if (!b.live && m.observed < m.clock)
      fail("the block ends with a bulk load that nobody waited for: %s", describe(b, m).c_str());
  }
}

bool mbarrier_try_wait(Barrier* p, u32 parity, Location at) {
  doing("mbarrier_try_wait", at);
  Block& b = my_block();
  ThreadState& t = me();
  MBarrier* m = &mbarrier_of(b, p);
  const u32 number = b.mbarrier_at[m->offset / 8];
  must_know_init(b, *m);
  if (parity > 1) fail("parity %u, expected 0 or 1", parity);
  if (machine.options.spurious_waits && machine.random(8) == 0) {
    preempt();
    return false;
  }
  while ((b.mbarriers[number - 1].phase & 1) == parity) {
    b.mbarriers[number - 1].waiting.push_back(machine_index(t));
    t.waits_for = text("parity %u of ", parity) + describe(b, b.mbarriers[number - 1]);
    block_current();
    t.waits_for.clear();
  }
  if (machine.checked()) learn(t, b.mbarriers[number - 1].released);
  return true;
}

}  // namespace emu
