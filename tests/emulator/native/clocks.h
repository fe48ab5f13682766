// clocks.h - vector clocks: who knows of whose accesses.
//
// An agent is anything that accesses memory on its own: a thread, the copies that arrive at one mbarrier, one warp's
// wgmma, one thread's bulk stores, the kernel before this one. Each counts its own clock. `Past` says, for every agent,
// up to which clock its accesses happened before now. Pasts are shared and never changed, so that a barrier of a
// thousand threads makes one, not a thousand.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emu {

struct Past;
using PastRef = std::shared_ptr<const Past>;

struct Past {
  std::vector<uint32_t> known;  // by agent, in this cluster
  std::shared_ptr<const std::map<uint32_t, PastRef>>
      other;  // by cluster of this launch: learnt through atomics and fences; often null
};

// One access: atomic (1 bit), cluster (23), agent (16), clock (24). Zero and the two largest are not accesses.
using Epoch = uint64_t;
constexpr Epoch kUninitialised = 0, kPending = ~Epoch{0}, kOutside = ~Epoch{1};
constexpr Epoch kAtomic = Epoch{1} << 63;
constexpr Epoch kBefore = 1;  // written before this launch: everybody knows
constexpr uint32_t kMaxClock = (1u << 24) - 1;
inline Epoch make_epoch(uint32_t cluster, uint32_t agent, uint32_t clock) {
  return Epoch{cluster & 0x7fffff} << 40 | Epoch{agent} << 24 | clock;
}
inline uint32_t epoch_cluster(Epoch e) { return uint32_t(e >> 40) & 0x7fffff; }
inline uint32_t epoch_agent(Epoch e) { return uint32_t(e >> 24) & 0xffff; }
inline uint32_t epoch_clock(Epoch e) { return uint32_t(e) & kMaxClock; }

// Who accesses, and what it knows.
struct View {
  PastRef past;
  uint32_t cluster = 0, agent = 0, clock = 0;

  Epoch epoch() const { return make_epoch(cluster, agent, clock); }
  bool knows(Epoch e) const {
    const uint32_t a = epoch_agent(e);
    if (e == kBefore) return true;
    if (epoch_cluster(e) == cluster) return epoch_clock(e) <= (a == agent ? clock : past->known[a]);
    if (!past->other) return false;
    const auto it = past->other->find(epoch_cluster(e));
    return it != past->other->end() && epoch_clock(e) <= it->second->known[a];
  }
  bool knows(uint32_t a, uint32_t c) const { return c <= (a == agent ? clock : past->known[a]); }
};

PastRef join(const PastRef& a, const PastRef& b);  // either may be null
PastRef meet(const std::vector<View>& views);      // what all of them know
PastRef with_own(const PastRef& past, uint32_t agent, uint32_t clock);
// Agents are numbered anew in every cluster: what an atomic publishes is kept as `other` of the publisher's cluster,
// and read back.
PastRef as_other(const PastRef& past, uint32_t cluster);
PastRef from_other(const PastRef& past, uint32_t cluster);
uint32_t next_clock(uint32_t clock);

// Collects what the participants of a barrier know.
class Gathering {
 public:
  void add(const View& v);
  void add(const PastRef& past);
  PastRef take();  // the sum; null when nothing was added
  bool empty() const { return !started_; }

 private:
  std::vector<uint32_t> known_;
  std::vector<PastRef> seen_;
  std::shared_ptr<const std::map<uint32_t, PastRef>> other_;
  bool started_ = false;
};

}  // namespace emu
