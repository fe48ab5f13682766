// faults.cpp - a kernel that runs into unmapped memory, out of its stack or divides by zero ends its launch with a
// message, not the process.
#include "faults.h"

#include <ucontext.h>

#include "machine.h"

namespace emu {

static constexpr size_t kHandlerStackBytes = 256 << 10;

static std::string describe(int number, const siginfo_t* info) {
  if (number == SIGFPE) return "integer division by zero";
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(machine.stacks);
  if (offset < uintptr_t{machine.stack_bytes} * machine.num_stacks && offset % machine.stack_bytes < 4096)
    return text("stack overflow: more than %u KiB of local memory", machine.stack_bytes >> 10);
  return text("access to unmapped memory at %p", info->si_addr);
}

static void handle(int number, siginfo_t* info, void* context) {
  if (!current) {  // not a kernel's: let it fault again without us
    signal(number, SIG_DFL);
    return;
  }
  sigset_t faults;
  sigemptyset(&faults);
  sigaddset(&faults, number);
  pthread_sigmask(SIG_UNBLOCK, &faults, nullptr);
  const auto pc = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  fail_at(reinterpret_cast<void*>(pc + 1), describe(number, info));
}

FaultGuard::FaultGuard() {
  static u8 memory[kHandlerStackBytes];  // the faulting fiber may have no stack left
  stack_t ours{};
  ours.ss_sp = memory;
  ours.ss_size = sizeof memory;
  sigaltstack(&ours, &old_stack_);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < kNumSignals; i++) sigaction(kSignals[i], &action, &old_[i]);
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < kNumSignals; i++) sigaction(kSignals[i], &old_[i], nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace emu
