// machine.h - the state of the emulated machine: one cluster of thread blocks runs at a time, one fiber for each CUDA
// thread.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "instructions.h"
#include "shadow.h"

namespace emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

enum class Schedule : u32 { forward, reverse, random, priority };  // in which order ready threads run
enum class Delivery : u32 { early, late, random };                 // when asynchronous operations happen

struct Options {  // mirrored by device.py
  u32 schedule, delivery, checked, spurious_waits, overlaps_previous, stack_bytes;
  u64 seed;
};

// Shared memory of a block: an arena whose offsets are the 32-bit shared addresses.
// Dynamic shared memory comes first, then the static arrays.
constexpr u32 kArenaBytes = 256 << 10, kDynamicBase = 2048, kMaxSharedBytes = 227 << 10, kMaxStaticBytes = 48 << 10;
constexpr u32 kRedZoneBytes = 48;
constexpr u32 kMaxBarriers = 64, kMaxStoreSlots = 32;  // per block, under the checker
constexpr u32 kMaxThreads = 1024;

// ---- failures (report.cpp)

// Ends the launch with this message; the place is the current thread's instruction, or the code at `caller`.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_at(void* caller, const std::string& message);
std::string position(Location at);
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- state

struct TensorMap {  // the emulator's 128 bytes; device.py encodes them
  u64 magic, base;
  u32 rank, element_bytes, swizzle, unused;
  u32 dims[5], box[5];
  u64 strides[4];  // in bytes, of dimensions 1 and up
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u64 kTensorMapMagic = 0x70614d726f736e54;

struct Copy16 {  // one cp.async
  u32 to;
  const u8* from;
  u32 num_bytes;
};
struct Store {  // one bulk or tensor store
  bool tensor;
  TensorMap map;
  Coordinates where;
  u32 from;
  u8* to;
  u32 num_bytes;
  bool done = false;
  View view;
};
struct Accumulator {  // a register array that belongs to wgmma until it is waited for
  float* registers;
  u32 count;
  u64 last_operation;
  std::vector<float> values;
};

struct Block;
struct ThreadState : Thread {
  Block* block = nullptr;
  void* stack_pointer = nullptr;
  bool done = false;
  const char* doing = nullptr;  // the instruction it executes or waits in
  Location at;
  std::string waits_for;  // what a deadlock report adds

  View view;  // checker: what this thread knows
  // By scope (0: this block, 1: the device): what the last fence lets atomics publish, and what they have read since.
  PastRef released[2], learnt[2];
  std::vector<u32> proxy_fences;  // clocks at which it executed fence_proxy_async

  std::vector<Copy16> copies;
  std::vector<std::vector<Copy16>> copy_groups;
  std::vector<Store> stores;
  std::vector<std::vector<Store>> store_groups;
  int store_slot = -1;
  u32 store_clock = 0;
  u32 cluster_phase = 0;
  PastRef released_by_cluster;

  std::vector<Accumulator> accumulators;
};

struct Collective {
  u32 mask = 0, arrived = 0;
  void (*run)(void** arguments, u32 mask) = nullptr;
  void* arguments[32] = {};
  const char* what = nullptr;
  Location at;
  bool used = false, orders_memory = false;
};
struct Warp {
  Collective collectives[4];
  u32 live = 0;
  u64 wgmma_issued = 0, wgmma_executed = 0;
  bool fenced = false;
  std::vector<u64> groups;  // by wgmma_commit: number of operations issued
};

struct NamedBarrier {
  u32 expected = 0, arrived = 0, warps = 0;
  u32 sum = 0;
  std::vector<u32> waiting;
  Location at[32];
  Gathering gathering;
  int operation = -1, result = 0;
};

struct MBarrier {
  u32 offset, count, pending, phase = 0;
  int64_t bytes = 0;
  bool live = true, fenced = false;
  std::vector<u32> waiting;  // threads, by machine index
  Gathering gathering;
  PastRef released;
  u32 agent = 0, clock = 0;  // clock counts loads
  u32 observed = 0;          // up to which a thread that has ended knew of them
};

struct Load {  // one bulk or tensor load on its way to one block
  bool tensor;
  TensorMap map;
  Coordinates where;
  const u8* from;
  u32 block, to, num_bytes, barrier;
};

struct WgmmaOperation {
  u64 a, b;
  u32 n;
  Element element;
  bool a_in_registers, accumulate, transpose_a, transpose_b;
  u32 warps = 0;  // which have issued it
  Location at{};
  View views[4]{};
  std::vector<u32> a_registers[4]{};  // 32 lanes x 4
  float* destination[4][32]{};
};
struct Warpgroup {
  std::deque<WgmmaOperation> operations;
  u64 first = 0;  // number of operations.front()
  std::vector<u32> waiting;
};

struct Block {
  u32 rank = 0;  // in the cluster
  uint3 index{};
  u8* arena = nullptr;
  Shadow* shadow = nullptr;
  u32 static_begin = 0, static_end = 0, dynamic_offset = 0, live = 0;
  std::map<const SharedArray*, u32> arrays;
  Warp warps[32];
  NamedBarrier barriers[16];
  std::vector<MBarrier> mbarriers;
  std::vector<u16> mbarrier_at;  // by offset / 8: number + 1
  Warpgroup warpgroups[8];
  u32 num_store_slots = 0;
  bool waited_for_previous = false;
};

struct Buffer {  // global memory of this launch
  std::string name;
  uintptr_t address;
  u64 num_bytes;
  bool writable, constant;
  Shadow shadow;
};

struct Machine {
  Options options{};
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
  dim3 grid, block_dim, cluster;
  u32 shared_bytes = 0, num_threads = 0, num_agents = 0;
  u32 num_blocks = 0;  // of the cluster
  u32 run = 0;         // which cluster of the launch this is
  Delivery wgmma_delivery = Delivery::early;

  std::vector<ThreadState> threads;  // block by block
  std::deque<Block> blocks;
  std::vector<std::unique_ptr<Buffer>> buffers;
  Buffer* last_buffer = nullptr;
  std::vector<uint3> cluster_index;  // by run: the first block of the cluster
  ReaderSets shared_sets, global_sets;
  // What a location's atomics publish to the device, and after __threadfence_block to the block of this rank.
  std::map<uintptr_t, PastRef> atomics;
  std::map<std::pair<uintptr_t, u32>, PastRef> block_atomics;
  std::vector<Load> loads;
  Gathering cluster_gathering;
  u32 cluster_arrived = 0, cluster_phase = 0;
  std::vector<u32> cluster_waiting;
  std::vector<u8> cluster_has_arrived;

  u8* arenas = nullptr;
  u8* stacks = nullptr;
  u32 stack_bytes = 0, num_stacks = 0;
  uintptr_t module_begin = 0, module_end = 0;

  void* main_stack = nullptr;
  u32 live = 0;
  u64 random_state = 0, num_switches = 0, order_hash = 0;
  std::string error;

  u64 random();
  u32 random(u32 bound) { return u32(random() % bound); }
  bool checked() const { return options.checked != 0; }
};
extern Machine machine;

inline ThreadState& me() { return *static_cast<ThreadState*>(current); }
inline Block& my_block() { return *me().block; }
inline Warp& my_warp() { return me().block->warps[me().warp]; }
inline u32 machine_index(const ThreadState& t) { return t.block->rank * machine.num_threads + t.number; }
inline void doing(const char* what, Location at) {
  me().doing = what;
  me().at = at;
}

// ---- scheduler.cpp

void make_ready(u32 thread);
void wake(std::vector<u32>& threads);  // and empties the list
void block_current();                  // until somebody makes it ready
void preempt();                        // perhaps let others run, after something they may have waited for
void run_cluster();

// ---- agents of the checker (checker.cpp)

u32 thread_agent(u32 block, u32 thread);
u32 barrier_agent(u32 block, u32 number);
u32 wgmma_agent(u32 block, u32 warp);
u32 store_agent(u32 block, u32 slot);
u32 num_agents();
std::string agent_name(Epoch e);
std::string shared_name(const Block& b, u32 offset);

void tick(ThreadState& t);
PastRef snapshot(ThreadState& t);  // what t knows now, itself included; t's clock goes on
void learn(ThreadState& t, const PastRef& past);
View snapshot_view(ThreadState& t, u32 agent, u32 clock);  // an operation that t starts and that then acts on its own
bool unfenced(Epoch e, const View& v);

// Accesses by the named agent; `caller` (null: the current instruction) is where to report.
void shared_read(Block& b, u32 offset, u32 num_bytes, const View& v, Way way, void* caller = nullptr);
void shared_write(Block& b, u32 offset, u32 num_bytes, const View& v, Way way, Epoch mark, void* caller = nullptr);
void global_access(uintptr_t address, u64 num_bytes, bool write, const View& v, Way way, void* caller = nullptr);
void any_access(uintptr_t address, u64 num_bytes, bool write, void* caller);
Buffer* find_buffer(uintptr_t address, u64 num_bytes);
Block* block_of(const void* p, u32* offset);  // whose shared memory p points to; null: nobody's

// ---- pieces that act on their own

using CollectiveFunction = void (*)(void** arguments, u32 mask);
void collective(CollectiveFunction run, void* argument, u32 mask, const char* what, Location at,
                bool orders_memory = false);
void thread_left_collectives(ThreadState& t);
void thread_left_barriers(ThreadState& t);
void thread_left_mbarriers(ThreadState& t);
void poison(Block& b, u32 offset, u32 num_bytes);
void deliver_load(size_t i);
bool step_wgmma(Block& b, u32 warpgroup, u32 warp);  // executes one warp's part of its next operation, if issued
bool step_any_wgmma();
MBarrier& mbarrier_of(Block& b, const void* p);
void complete_bytes(Block& b, u32 number, u32 num_bytes);
std::string describe(const Block& b, const MBarrier& m);
u32 swizzled(u32 address, u32 mode);  // mode as in a tensor map: 0 none, 1 32 bytes, 2 64, 3 128
float decode_f16(u16 bits);
float decode_bf16(u16 bits);
float decode_e4m3(u8 bits);

}  // namespace emu
