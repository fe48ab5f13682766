// builtins.h - the names CUDA defines without a header: thread indices, synchronisation, shuffles, atomics, arithmetic.
#pragma once

#define threadIdx (emu::current->thread_index)
#define blockIdx (emu::current->block_index)
#define blockDim (emu::current->block_dim)
#define gridDim (emu::current->grid_dim)

#define EMU_AT emu::Location at = emu::Location::current()

// ---- synchronisation

inline void __syncthreads(EMU_AT) { emu::bar_sync(0, 0, at); }
inline int __syncthreads_count(int p, EMU_AT) { return (int)emu::bar_reduce(0, p, at); }
inline int __syncthreads_and(int p, EMU_AT) { return (int)emu::bar_reduce(1, p, at); }
inline int __syncthreads_or(int p, EMU_AT) { return (int)emu::bar_reduce(2, p, at); }
inline void __syncwarp(unsigned mask = ~0u, EMU_AT) { emu::sync_warp(mask, at); }
inline void __threadfence(EMU_AT) { emu::thread_fence(true, at); }
inline void __threadfence_block(EMU_AT) { emu::thread_fence(false, at); }

// ---- warps

namespace emu {
template <class T>
T shuffle_value(T value, int source, unsigned mask, Location at) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = shuffle(bits, source, mask, at);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emu
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_AT) {
  const int base = (int)emu::current->lane & ~(width - 1);
  return emu::shuffle_value(value, base + (source & (width - 1)), mask, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_AT) {
  const int lane = (int)emu::current->lane, source = lane ^ bits;
  return emu::shuffle_value(value, source < (lane & ~(width - 1)) + width ? source : lane, mask, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
  const int lane = (int)emu::current->lane;
  return emu::shuffle_value(value, (lane & (width - 1)) + (int)delta < width ? lane + (int)delta : lane, mask, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
  const int lane = (int)emu::current->lane;
  return emu::shuffle_value(value, (lane & (width - 1)) >= (int)delta ? lane - (int)delta : lane, mask, at);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_AT) { return emu::ballot(p, mask, at); }
inline int __any_sync(unsigned mask, int p, EMU_AT) { return emu::ballot(p, mask, at) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_AT) { return emu::ballot(!p, mask, at) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMU_AT) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return emu::match_any(bits, mask, at);
}
inline unsigned __activemask(EMU_AT) { return emu::active_mask(at); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, EMU_AT) {
  return emu::reduce(emu::Reduction::add, v, mask, at);
}
inline int __reduce_add_sync(unsigned mask, int v, EMU_AT) {
  return (int)emu::reduce(emu::Reduction::add, (unsigned)v, mask, at);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v, EMU_AT) {
  return emu::reduce(emu::Reduction::min_unsigned, v, mask, at);
}
inline int __reduce_min_sync(unsigned mask, int v, EMU_AT) {
  return (int)emu::reduce(emu::Reduction::min_signed, (unsigned)v, mask, at);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, EMU_AT) {
  return emu::reduce(emu::Reduction::max_unsigned, v, mask, at);
}
inline int __reduce_max_sync(unsigned mask, int v, EMU_AT) {
  return (int)emu::reduce(emu::Reduction::max_signed, (unsigned)v, mask, at);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v, EMU_AT) {
  return emu::reduce(emu::Reduction::bit_and, v, mask, at);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, EMU_AT) {
  return emu::reduce(emu::Reduction::bit_or, v, mask, at);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v, EMU_AT) {
  return emu::reduce(emu::Reduction::bit_xor, v, mask, at);
}

// ---- atomics (global or shared memory, relaxed; order them with __threadfence)

namespace emu {
using u64_t = unsigned long long;
template <class T>
T atomic_value(Atomic operation, T* p, T operand, T compare, Location at) {
  uint64_t bits = 0, expected = 0;
  __builtin_memcpy(&bits, &operand, sizeof operand);
  __builtin_memcpy(&expected, &compare, sizeof compare);
  const char type = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 'i' : 'u';
  bits = atomic(operation, p, sizeof(T), type, bits, expected, at);
  T old;
  __builtin_memcpy(&old, &bits, sizeof old);
  return old;
}
}  // namespace emu
#define EMU_ATOMIC(name, operation, T) \
  inline T name(T* p, T v, EMU_AT) { return emu::atomic_value(emu::Atomic::operation, p, v, T(0), at); }
#define EMU_ATOMIC_INTEGERS(name, operation) \
  EMU_ATOMIC(name, operation, int) EMU_ATOMIC(name, operation, unsigned) EMU_ATOMIC(name, operation, emu::u64_t)
EMU_ATOMIC_INTEGERS(atomicAdd, add)
EMU_ATOMIC(atomicAdd, add, float)
EMU_ATOMIC_INTEGERS(atomicMin, min)
EMU_ATOMIC_INTEGERS(atomicMax, max)
EMU_ATOMIC_INTEGERS(atomicExch, exchange)
EMU_ATOMIC(atomicExch, exchange, float)
EMU_ATOMIC_INTEGERS(atomicAnd, bit_and)
EMU_ATOMIC_INTEGERS(atomicOr, bit_or)
EMU_ATOMIC_INTEGERS(atomicXor, bit_xor)
EMU_ATOMIC(atomicInc, inc, unsigned)
EMU_ATOMIC(atomicDec, dec, unsigned)
inline int atomicSub(int* p, int v, EMU_AT) { return emu::atomic_value(emu::Atomic::add, p, -v, 0, at); }
inline unsigned atomicSub(unsigned* p, unsigned v, EMU_AT) {
  return emu::atomic_value(emu::Atomic::add, p, 0u - v, 0u, at);
}
inline int atomicCAS(int* p, int compare, int v, EMU_AT) {
  return emu::atomic_value(emu::Atomic::compare_swap, p, v, compare, at);
}
inline unsigned atomicCAS(unsigned* p, unsigned compare, unsigned v, EMU_AT) {
  return emu::atomic_value(emu::Atomic::compare_swap, p, v, compare, at);
}
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long compare, unsigned long long v, EMU_AT) {
  return emu::atomic_value(emu::Atomic::compare_swap, p, v, compare, at);
}

// ---- arithmetic
// g++ builds without contraction: a * b + c rounds twice, as with NVRTC's --fmad=false. __fmaf_rn rounds once in both
// worlds.

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frsqrt_rn(float a) { return (float)(1.0 / __builtin_sqrt((double)a)); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x >= 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }
inline unsigned __float_as_uint(float f) { return __builtin_bit_cast(unsigned, f); }
inline float __uint_as_float(unsigned u) { return __builtin_bit_cast(float, u); }
inline int __float_as_int(float f) { return __builtin_bit_cast(int, f); }
inline float __int_as_float(int i) { return __builtin_bit_cast(float, i); }
inline long long __double_as_longlong(double d) { return __builtin_bit_cast(long long, d); }
inline double __longlong_as_double(long long i) { return __builtin_bit_cast(double, i); }
inline float __uint2float_rn(unsigned u) { return (float)u; }
inline float __int2float_rn(int i) { return (float)i; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return (unsigned)(((unsigned long long)high << 32 | low) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return (unsigned)(((unsigned long long)high << 32 | low) >> (n & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i) & 15u, byte = (unsigned)(bytes >> (8 * (s & 7))) & 255u;
    r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return r;
}
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}
