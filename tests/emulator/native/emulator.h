// emulator.h - what a kernel sees of the emulator. kernels/hopper.cuh includes this file instead of PTX when g++
// compiles it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <source_location>
#include <type_traits>
#include <utility>

#include <vector_functions.h>
#include <vector_types.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "instructions.h"

// Every standard and CUDA header must be read before these words change their meaning.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __shared__ static_assert(false, "shared memory is declared by SHARED_ARRAY or SHARED_DYNAMIC");

// ---- shared memory

#define SHARED_ARRAY(T, name, dims)                                                                        \
  static emu::SharedArray name##_site{sizeof(T dims), alignof(T dims) < 16 ? 16 : alignof(T dims), #name}; \
  T(&name) dims = *(T(*) dims)emu::shared_array(&name##_site)
#define SHARED_DYNAMIC(name, alignment) unsigned char* name = (unsigned char*)emu::shared_dynamic(alignment)

// ---- a kernel as the launcher sees it

namespace emu {

enum class Kind : uint32_t { pointer, const_pointer, integer, real, structure };
struct Parameter {
  Kind kind;
  uint32_t size;
};
struct KernelTable {  // read by launch.cpp and, through ctypes, by device.py
  void (*run)(void** arguments);
  uint32_t num_parameters;
  const Parameter* parameters;
};

template <class T>
constexpr Parameter parameter() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_pointer_v<U>)
    return {std::is_const_v<std::remove_pointer_t<U>> ? Kind::const_pointer : Kind::pointer, 8};
  else if constexpr (std::is_floating_point_v<U>)
    return {Kind::real, sizeof(U)};
  else if constexpr (std::is_integral_v<U>)
    return {Kind::integer, sizeof(U)};
  else
    return {Kind::structure, sizeof(U)};
}
template <class F>
struct Signature;
template <class... A>
struct Signature<void (*)(A...)> {
  static constexpr Parameter parameters[sizeof...(A) + 1] = {parameter<A>()..., {}};
  static constexpr uint32_t count = sizeof...(A);
  // Not hooked: it reads the launcher's argument array, as the hardware does.
  template <size_t... I>
  __attribute__((no_sanitize("thread"))) static void call(void (*f)(A...), void** arguments,
                                                          std::index_sequence<I...>) {
    f(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread"))) static void call(void (*f)(A...), void** arguments) {
    call(f, arguments, std::index_sequence_for<A...>{});
  }
};

}  // namespace emu

#define EXPORT_KERNEL(name)                                                                                        \
  extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void emu_run_##name(void** arguments) { \
    emu::Signature<decltype(&name)>::call(&name, arguments);                                                       \
  }                                                                                                                \
  extern "C" __attribute__((visibility("default"))) const emu::KernelTable emu_kernel_##name;                      \
  const emu::KernelTable emu_kernel_##name = {emu_run_##name, emu::Signature<decltype(&name)>::count,              \
                                              emu::Signature<decltype(&name)>::parameters};

#include "builtins.h"
