// faults.h - handlers of memory faults while kernels run.
#pragma once
#include <csignal>

namespace emu {

class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  static constexpr int kNumSignals = 3;
  static constexpr int kSignals[kNumSignals] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction old_[kNumSignals];
  stack_t old_stack_;
};

}  // namespace emu
