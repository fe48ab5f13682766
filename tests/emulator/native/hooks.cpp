// hooks.cpp - the functions that g++ -fsanitize=thread calls at every memory access. libtsan is not linked: these are
// ours.
#include "machine.h"

using emu::u32;

static void access(void* p, size_t num_bytes, bool write, void* caller) {
  if (emu::current && emu::machine.checked()) emu::any_access(reinterpret_cast<uintptr_t>(p), num_bytes, write, caller);
}
static void aligned_access(void* p, u32 num_bytes, bool write, void* caller) {
  if (emu::current && reinterpret_cast<uintptr_t>(p) % num_bytes)
    emu::fail_at(caller, emu::text("misaligned access of %u bytes to %p", num_bytes, p));
  access(p, num_bytes, write, caller);
}

#define HERE __builtin_return_address(0)
#define HOOKS(n)                                                                          \
  extern "C" void __tsan_read##n(void* p) { aligned_access(p, n, false, HERE); }          \
  extern "C" void __tsan_write##n(void* p) { aligned_access(p, n, true, HERE); }          \
  extern "C" void __tsan_unaligned_read##n(void* p) { access(p, n, false, HERE); }        \
  extern "C" void __tsan_unaligned_write##n(void* p) { access(p, n, true, HERE); }        \
  extern "C" void __tsan_volatile_read##n(void* p) { aligned_access(p, n, false, HERE); } \
  extern "C" void __tsan_volatile_write##n(void* p) { aligned_access(p, n, true, HERE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { access(p, n, false, HERE); }
extern "C" void __tsan_write_range(void* p, size_t n) { access(p, n, true, HERE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
