// fiber.cpp - the switch, by hand: 20-40 ns, where swapcontext makes two system calls.
#include "fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#error "the emulator runs on x86-64 only"
#endif

namespace emu {

// System V ABI: rbx, rbp, r12-r15 belong to the caller. The kernels never change the floating-point control words.
asm(R"(.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack,.-emu_switch_stack
)");

void* prepare_stack(void* top, void (*entry)()) {
  auto* p = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
  *--p = nullptr;  // a return address for entry, so that its stack is aligned as after a call
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--p = nullptr;
  return p;
}

}  // namespace emu
