#include "clocks.h"

#include <algorithm>

#include "machine.h"

namespace emu {

using Others = std::shared_ptr<const std::map<uint32_t, PastRef>>;

__attribute__((optimize("O3"))) static void raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  uint32_t* a = to.data();
  const uint32_t* b = from.data();
  for (size_t i = 0; i < from.size(); i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}

static Others join_others(const Others& a, const Others& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto sum = std::make_shared<std::map<uint32_t, PastRef>>(*a);
  for (const auto& [cluster, past] : *b) {
    PastRef& mine = (*sum)[cluster];
    mine = join(mine, past);
  }
  return sum;
}

PastRef join(const PastRef& a, const PastRef& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  const bool nothing_new =
      std::equal(b->known.begin(), b->known.end(), a->known.begin(), [](uint32_t x, uint32_t y) { return x <= y; });
  if (nothing_new && (!b->other || a->other == b->other)) return a;
  // The threads of a block learn the same from the same barrier, one after the other.
  static PastRef last_a, last_b, last_sum;
  if (a == last_a && b == last_b) return last_sum;
  auto sum = std::make_shared<Past>(*a);
  raise(sum->known, b->known);
  sum->other = join_others(a->other, b->other);
  last_a = a;
  last_b = b;
  return last_sum = sum;
}

PastRef meet(const std::vector<View>& views) {
  auto common = std::make_shared<Past>(*views[0].past);
  const auto own = [](const View& v, uint32_t agent) { return agent == v.agent ? v.clock : v.past->known[agent]; };
  for (const View& v : views)
    if (v.past != views[0].past)
      for (size_t i = 0; i < common->known.size(); i++) common->known[i] = std::min(common->known[i], v.past->known[i]);
  for (const View& v : views) {  // an agent's own clock is not in its past
    uint32_t least = v.clock;
    for (const View& other : views) least = std::min(least, own(other, v.agent));
    common->known[v.agent] = least;
  }
  return common;
}

PastRef with_own(const PastRef& past, uint32_t agent, uint32_t clock) {
  if (past->known[agent] == clock) return past;
  auto copy = std::make_shared<Past>(*past);
  copy->known[agent] = clock;
  return copy;
}

PastRef as_other(const PastRef& past, uint32_t cluster) {
  auto others = std::make_shared<std::map<uint32_t, PastRef>>();
  if (past->other) *others = *past->other;
  auto plain = std::make_shared<Past>();
  plain->known = past->known;
  (*others)[cluster] = plain;
  auto seen = std::make_shared<Past>();
  seen->known.assign(past->known.size(), 0);
  seen->other = others;
  return seen;
}

PastRef from_other(const PastRef& past, uint32_t cluster) {
  auto mine = std::make_shared<Past>(*past);
  if (past->other)
    if (const auto it = past->other->find(cluster); it != past->other->end()) mine->known = it->second->known;
  return mine;
}

uint32_t next_clock(uint32_t clock) {
  if (clock >= kMaxClock) fail("emulator: a thread synchronises more than %u times", kMaxClock);
  return clock + 1;
}

void Gathering::add(const PastRef& past) {
  if (!past) return;
  if (!started_) {
    known_.assign(past->known.size(), 0);
    other_ = nullptr;
    started_ = true;
  }
  if (std::find(seen_.begin(), seen_.end(), past) != seen_.end()) return;
  if (seen_.size() < 64) seen_.push_back(past);
  raise(known_, past->known);
  other_ = join_others(other_, past->other);
}

void Gathering::add(const View& v) {
  add(v.past);
  known_[v.agent] = std::max(known_[v.agent], v.clock);
}

PastRef Gathering::take() {
  if (!started_) return nullptr;
  auto sum = std::make_shared<Past>();
  sum->known = std::move(known_);
  sum->other = std::move(other_);
  seen_.clear();
  started_ = false;
  return sum;
}

}  // namespace emu
