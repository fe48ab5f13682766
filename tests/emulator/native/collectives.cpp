// collectives.cpp - what the lanes of a warp do together: each lane leaves its arguments, the last to arrive computes
// for all.
#include <algorithm>

#include "machine.h"

namespace emu {

static void complete(Block& b, u32 warp, Collective& c) {
  const u32 mask = c.arrived;
  if (c.run) c.run(c.arguments, mask);
  const u32 first = b.rank * machine.num_threads + warp * 32;
  if (machine.checked() && c.orders_memory) {
    Gathering gathering;
    for (u32 lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) gathering.add(machine.threads[first + lane].view);
    const PastRef past = gathering.take();
    for (u32 lane = 0; lane < 32; lane++)
      if (mask >> lane & 1) {
        learn(machine.threads[first + lane], past);
        tick(machine.threads[first + lane]);
      }
  }
  c.used = false;
  std::vector<u32> lanes;
  for (u32 lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) lanes.push_back(first + lane);
  wake(lanes);
}

void collective(CollectiveFunction run, void* argument, u32 mask, const char* what, Location at, bool orders_memory) {
  doing(what, at);
  ThreadState& t = me();
  Warp& warp = my_warp();
  if (!(mask >> t.lane & 1)) fail("lane %u calls with mask %08x, which leaves it out", t.lane, mask);
  Collective* mine = nullptr;
  for (Collective& c : warp.collectives) {
    if (!c.used || !(c.mask & mask)) continue;
    if (c.mask != mask || c.run != run || c.at.line() != at.line())
      fail("divergent: mask %08x, while lanes %08x wait in %s at %s with mask %08x", mask, c.arrived, c.what,
           position(c.at).c_str(), c.mask);
    mine = &c;
    break;
  }
  if (!mine) {
    for (Collective& c : warp.collectives)
      if (!c.used) mine = &c;
    if (!mine) fail("emulator: more than 4 parts of a warp diverge");
    *mine = Collective{};
    mine->mask = mask;
    mine->run = run;
    mine->what = what;
    mine->at = at;
    mine->used = true;
    mine->orders_memory = orders_memory;
  }
  mine->arguments[t.lane] = argument;
  mine->arrived |= 1u << t.lane;
  if (mine->arrived == (mask & warp.live)) complete(my_block(), t.warp, *mine);
  block_current();
}

// A lane that has ended takes part in no collective: the others go on without it, as on the hardware.
void thread_left_collectives(ThreadState& t) {
  Warp& warp = t.block->warps[t.warp];
  warp.live &= ~(1u << t.lane);
  for (Collective& c : warp.collectives)
    if (c.used && c.arrived == (c.mask & warp.live)) complete(*t.block, t.warp, c);
}

void sync_warp(u32 mask, Location at) { collective(nullptr, nullptr, mask, "__syncwarp", at, true); }

uint64_t shuffle(uint64_t bits, int source_lane, u32 mask, Location at) {
  struct Lane {
    u64 in, out;
    int source;
  } lane{bits, 0, source_lane};
  collective(
      [](void** arguments, u32 arrived) {
        auto** lanes = reinterpret_cast<Lane**>(arguments);
        for (u32 i = 0; i < 32; i++) {
          if (!(arrived >> i & 1)) continue;
          if (!(arrived >> lanes[i]->source & 1))
            fail("lane %u reads lane %d, which does not take part", i, lanes[i]->source);
          lanes[i]->out = lanes[lanes[i]->source]->in;
        }
      },
      &lane, mask, "__shfl_sync", at);
  return lane.out;
}

u32 ballot(bool value, u32 mask, Location at) {
  struct Lane {
    bool in;
    u32 out;
  } lane{value, 0};
  collective(
      [](void** arguments, u32 arrived) {
        u32 votes = 0;
        for (u32 i = 0; i < 32; i++)
          if (arrived >> i & 1 && static_cast<Lane*>(arguments[i])->in) votes |= 1u << i;
        for (u32 i = 0; i < 32; i++)
          if (arrived >> i & 1) static_cast<Lane*>(arguments[i])->out = votes;
      },
      &lane, mask, "a warp vote", at);
  return lane.out;
}

static u32 combine(Reduction operation, u32 a, u32 b) {
  switch (operation) {
    case Reduction::add: return a + b;
    case Reduction::min_signed: return u32(std::min(int(a), int(b)));
    case Reduction::max_signed: return u32(std::max(int(a), int(b)));
    case Reduction::min_unsigned: return std::min(a, b);
    case Reduction::max_unsigned: return std::max(a, b);
    case Reduction::bit_and: return a & b;
    case Reduction::bit_or: return a | b;
    case Reduction::bit_xor: return a ^ b;
  }
  return 0;
}

u32 reduce(Reduction operation, u32 value, u32 mask, Location at) {
  struct Lane {
    Reduction operation;
    u32 value, out;
  } lane{operation, value, 0};
  collective(
      [](void** arguments, u32 arrived) {
        auto** lanes = reinterpret_cast<Lane**>(arguments);
        bool first = true;
        u32 sum = 0;
        for (u32 i = 0; i < 32; i++) {
          if (!(arrived >> i & 1)) continue;
          sum = first ? lanes[i]->value : combine(lanes[i]->operation, sum, lanes[i]->value);
          first = false;
        }
        for (u32 i = 0; i < 32; i++)
          if (arrived >> i & 1) lanes[i]->out = sum;
      },
      &lane, mask, "__reduce_sync", at);
  return lane.out;
}

u32 match_any(uint64_t value, u32 mask, Location at) {
  struct Lane {
    u64 value;
    u32 out;
  } lane{value, 0};
  collective(
      [](void** arguments, u32 arrived) {
        auto** lanes = reinterpret_cast<Lane**>(arguments);
        for (u32 i = 0; i < 32; i++)
          if (arrived >> i & 1)
            for (u32 j = 0; j < 32; j++)
              if (arrived >> j & 1 && lanes[j]->value == lanes[i]->value) lanes[i]->out |= 1u << j;
      },
      &lane, mask, "__match_any_sync", at);
  return lane.out;
}

u32 active_mask(Location at) {
  doing("__activemask", at);
  fail("which lanes are active is not defined between them: pass masks explicitly");
}

bool elect_one(Location at) {
  collective(nullptr, nullptr, ~0u, "elect_one", at);
  return current->lane == 0;
}

void setmaxnreg(u32 registers, Location at) {
  if (registers < 24 || registers > 256 || registers % 8) {
    doing("setmaxnreg", at);
    fail("%u registers, expected a multiple of 8 from 24 to 256", registers);
  }
  collective(nullptr, nullptr, ~0u, "setmaxnreg", at);
}

}  // namespace emu
