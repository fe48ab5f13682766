"""Sampling noise from a counter, not from a state: (seed, position, token id) give the same number whatever else runs.

The 64 random bits of a token are one output of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", 2014), whose n-th output is mix(state + (n + 1) * GAMMA) and so needs no loop:

    key  = mix(mix(seed + GAMMA) + (position + 1) * GAMMA)         one per row
    bits = mix(key + (token_id + 1) * GAMMA)                       one per candidate
    u    = (bits >> 12 + 0.5) / 2^52                               exact in FP64, never 0 or 1
    noise = -log(-log(u))                                          standard Gumbel

All integer arithmetic is modulo 2^64, so the bits are identical on every device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def row_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Keys [S], as int64 bit patterns, of rows with `seeds` [S] whose new token stands at `positions` [S]."""
    gamma = np.uint64(GAMMA)
    counter = (positions.astype(np.uint64) + np.uint64(1)) * gamma
    return _mix_on_host(_mix_on_host(seeds + gamma) + counter).view(np.int64)


def gumbel_noise(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [S, n], FP64 in [-3.7, 36.8], of `token_ids` [S, n] or [n] int64 under `keys` [S] int64."""
    return gumbel_of_bits(_mix(keys.unsqueeze(1) + (token_ids + 1) * _signed(GAMMA)))


def gumbel_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, FP64, of 64 random bits each, int64; finite for all of them."""
    uniform = _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mix_on_host(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The same on int64 tensors, in place: PyTorch multiplies int64 modulo 2^64 but has no unsigned shift."""
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(_FIRST))
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_SECOND))
    return z.bitwise_xor_(_shift_right(z, 31))


def _shift_right(z: torch.Tensor, num_bits: int) -> torch.Tensor:
    return (z >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
