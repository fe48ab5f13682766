// noise.cuh - Gumbel noise from a counter: (seed, position, token id) give the same number whatever else runs.
//
//   key = mix(mix(seed + GAMMA) + (position + 1) GAMMA)      bits = mix(key + (token_id + 1) GAMMA)      modulo 2^64
//   u = (bits >> 12 + 0.5) / 2^52                            noise = -log(-log(u))                       in FP64
//
// mix is SplitMix64's (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014). The bits equal those of
// the PyTorch sampler; the logarithms are this project's own (transcendental.cuh), at most an ulp away from PyTorch's.
#pragma once
#include "transcendental.cuh"

namespace noise {
using hw::u64;
constexpr u64 GAMMA = 0x9E3779B97F4A7C15ull;

HW u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

HW u64 row_key(u64 seed, int position) { return mix(mix(seed + GAMMA) + ((u64)position + 1) * GAMMA); }

// The 52 bits that count.
HW u64 uniform_bits(u64 key, int token_id) { return mix(key + ((u64)token_id + 1) * GAMMA) >> 12; }

HW double gumbel(u64 bits) {
  const double u = ((double)bits + 0.5) * 0x1p-52;
  return -transcendental::log_f64(-transcendental::log_f64(u));
}

// -log(1 - u), never below the noise but for an error of 1e-5, and 40 times cheaper. Where u >= 1/2 it is tight: at most
// log(2 log 2) = 0.3266 above.
HW float gumbel_bound(u64 bits) {
  const float complement = (float)(0xFFFFFFFFFFFFFull - bits) + 0.5f;  // 1 - u in units of 2^-52
  return (52.f - hw::log2_approx(complement)) * 0.69314718f;
}
constexpr float GUMBEL_BOUND_EXCESS = 0.3267f;
HW bool is_bound_tight(u64 bits) { return bits >> 51; }
}  // namespace noise
