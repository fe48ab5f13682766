#include "shadow.h"

#include <sys/mman.h>

#include <algorithm>

#include "machine.h"

namespace emu {

void ReaderSets::clear() {
  sets_.assign(1, {});
  number_.clear();
  steps_.clear();
  last_ = {~0u, 0};
}

size_t ReaderSets::Hash::operator()(const std::vector<Epoch>& s) const {
  size_t h = s.size();
  for (Epoch e : s) h = (h ^ e) * 0x9e3779b97f4a7c15ull;
  return h;
}

uint32_t ReaderSets::with(uint32_t set, Epoch e, const View& v) {
  const Step step{set, e};
  if (step == last_) return last_result_;
  last_ = step;
  if (const auto it = steps_.find(step); it != steps_.end()) return last_result_ = it->second;
  // A reader that happened before this one need not be kept: who knows of this one knows of that one. Except: an atomic
  // access does not stand for a plain read, because atomics may follow it unordered.
  std::vector<Epoch> next;
  uint32_t others = 0;
  for (Epoch x : sets_[set]) {
    const bool same = (x & ~kAtomic) == (e & ~kAtomic);
    if ((!(e & kAtomic) || x & kAtomic) && (same || v.knows(x & ~kAtomic))) continue;
    if (epoch_cluster(x) != v.cluster && ++others > 4) continue;  // of other clusters a few witnesses are enough
    next.push_back(x);
  }
  next.insert(std::lower_bound(next.begin(), next.end(), e), e);
  next.erase(std::unique(next.begin(), next.end()), next.end());
  const auto [it, fresh] = number_.try_emplace(next, uint32_t(sets_.size()));
  if (fresh) sets_.push_back(std::move(next));
  return last_result_ = steps_[step] = it->second;
}

void Shadow::reserve(size_t num_bytes, ReaderSets* sets) {
  release();
  size_ = num_bytes;
  sets_ = sets;
  if (!num_bytes) return;
  const auto map = [](size_t n) {
    void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("emulator: no memory for the shadow of %zu bytes", n);
    return p;
  };
  writes_ = static_cast<Epoch*>(map(num_bytes * sizeof(Epoch)));
  readers_ = static_cast<uint32_t*>(map(num_bytes * sizeof(uint32_t)));
}

void Shadow::release() {
  if (writes_) munmap(writes_, size_ * sizeof(Epoch)), munmap(readers_, size_ * sizeof(uint32_t));
  writes_ = nullptr;
  readers_ = nullptr;
  size_ = 0;
}

void Shadow::fill(size_t offset, size_t num_bytes, Epoch e) {
  std::fill_n(writes_ + offset, num_bytes, e);
  std::fill_n(readers_ + offset, num_bytes, 0u);
}

Shadow::Conflict Shadow::read(size_t offset, size_t num_bytes, const View& v, Way way) {
  Epoch good = ~Epoch{2};
  uint32_t set = ~0u, next = 0;
  for (size_t i = offset; i < offset + num_bytes; i++) {
    const Epoch x = writes_[i];
    if (x != good) {
      if (x == kOutside) return {"out-of-bounds read", i, 0};
      if (x == kPending) return {"read before the asynchronous copy was waited for", i, x};
      if (x == kUninitialised) return {"read of memory nobody has written", i, 0};
      if (!v.knows(x)) return {"data race: read of a value another agent writes, without synchronisation", i, x};
      if (way == Way::async && unfenced(x, v))
        return {"async-proxy read of ordinary writes without fence_proxy_async in the writer", i, x};
      good = x;
    }
    if (readers_[i] != set) {
      for (Epoch r : (*sets_)[readers_[i]])
        if (r & kAtomic && !v.knows(r & ~kAtomic))
          return {"data race: plain read of a value another agent changes atomically", i, r};
      next = sets_->with(set = readers_[i], v.epoch(), v);
    }
    readers_[i] = next;
  }
  return {};
}

Shadow::Conflict Shadow::write(size_t offset, size_t num_bytes, const View& v, Way way, Epoch mark) {
  Epoch good = kUninitialised;
  uint32_t good_set = 0;
  for (size_t i = offset; i < offset + num_bytes; i++) {
    const Epoch x = writes_[i];
    if (x != good) {
      if (x == kOutside) return {"out-of-bounds write", i, 0};
      if (x == kPending) return {"write over an asynchronous copy in flight", i, x};
      if (x != kUninitialised && !v.knows(x))
        return {"data race: write over a value another agent writes, without synchronisation", i, x};
      if (x != kUninitialised && way == Way::async && unfenced(x, v))
        return {"async-proxy write over ordinary writes without fence_proxy_async in the writer", i, x};
      good = x;
    }
    if (readers_[i] != good_set) {
      for (Epoch r : (*sets_)[readers_[i]])
        if (!v.knows(r & ~kAtomic)) return {"data race: write over a value another agent still reads", i, r};
      good_set = readers_[i];
    }
    writes_[i] = mark;
    readers_[i] = 0;
  }
  return {};
}

Shadow::Conflict Shadow::update(size_t offset, size_t num_bytes, const View& v) {
  for (size_t i = offset; i < offset + num_bytes; i++) {
    const Epoch x = writes_[i];
    if (x == kOutside) return {"out-of-bounds atomic operation", i, 0};
    if (x == kPending) return {"atomic operation over an asynchronous copy in flight", i, x};
    if (x == kUninitialised) return {"atomic operation on memory nobody has written", i, 0};
    if (!v.knows(x))
      return {"data race: atomic operation on a value another agent writes plainly, without synchronisation", i, x};
    for (Epoch r : (*sets_)[readers_[i]])
      if (!(r & kAtomic) && !v.knows(r))
        return {"data race: atomic operation on a value another agent reads plainly", i, r};
    readers_[i] = sets_->with(readers_[i], v.epoch() | kAtomic, v);
  }
  return {};
}

}  // namespace emu
