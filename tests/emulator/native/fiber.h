// fiber.h - a stack for every CUDA thread, and the switch between two of them.
#pragma once

namespace emu {

struct Failure {};  // thrown only outside of kernels, to leave the launcher

// Saves the callee-saved registers and the stack pointer at *save, and goes on where `load` was saved.
extern "C" void emu_switch_stack(void** save, void* load);
inline void switch_stack(void** save, void* load) { emu_switch_stack(save, load); }

// A stack, ending at `top`, that begins to run `entry` when it is first switched to.
void* prepare_stack(void* top, void (*entry)());

}  // namespace emu
