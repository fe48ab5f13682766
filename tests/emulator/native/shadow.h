// shadow.h - what is remembered of every byte: who wrote it last and who has read it since.
//
// An access that conflicts with one it does not know to have happened before is a race, whatever order this run
// happened to take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"

namespace emu {

enum class Way { plain, atomic, async };  // async: through the async proxy, as copies and wgmma do

// Sets of readers by number, because millions of bytes share a few sets.
class ReaderSets {
 public:
  ReaderSets() { clear(); }
  void clear();
  const std::vector<Epoch>& operator[](uint32_t set) const { return sets_[set]; }
  uint32_t with(uint32_t set, Epoch e, const View& v);

 private:
  struct Hash {
    size_t operator()(const std::vector<Epoch>& s) const;
  };
  std::vector<std::vector<Epoch>> sets_;
  std::unordered_map<std::vector<Epoch>, uint32_t, Hash> number_;
  struct Step {
    uint32_t set;
    Epoch epoch;
    bool operator==(const Step&) const = default;
  };
  struct StepHash {
    size_t operator()(const Step& s) const {
      return (s.epoch * 0x9e3779b97f4a7c15ull ^ s.set) * 0xd1342543de82ef95ull >> 7;
    }
  };
  std::unordered_map<Step, uint32_t, StepHash> steps_;
  Step last_{~0u, 0};
  uint32_t last_result_ = 0;
};

class Shadow {
 public:
  Shadow() = default;
  ~Shadow() { release(); }
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  // What an access did wrong: a text and the other access (0: none).
  struct Conflict {
    const char* what = nullptr;
    size_t offset = 0;
    Epoch with = 0;
    explicit operator bool() const { return what != nullptr; }
  };

  void reserve(size_t num_bytes, ReaderSets* sets);  // all bytes kOutside
  void release();
  void fill(size_t offset, size_t num_bytes, Epoch e);
  size_t size() const { return size_; }
  Epoch last_write(size_t offset) const { return writes_[offset]; }

  Conflict read(size_t offset, size_t num_bytes, const View& v, Way way);
  // `mark` becomes the last write: the view's own epoch, or kPending while a copy is in flight.
  Conflict write(size_t offset, size_t num_bytes, const View& v, Way way, Epoch mark);
  Conflict update(size_t offset, size_t num_bytes, const View& v);  // an atomic operation

 private:
  Epoch* writes_ = nullptr;
  uint32_t* readers_ = nullptr;
  size_t size_ = 0;
  ReaderSets* sets_ = nullptr;
};

}  // namespace emu
