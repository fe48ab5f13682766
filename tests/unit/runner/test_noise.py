from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backend.runner.noise import gumbel_noise, gumbel_of_bits, row_keys

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def expected_noise(seed: int, position: int, token_id: int) -> float:
    key = mix((mix((seed + GAMMA) & MASK) + (position + 1) * GAMMA) & MASK)
    bits = mix((key + (token_id + 1) * GAMMA) & MASK)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def test_mix_is_splitmix64() -> None:
    # The first outputs of the published generator from state 1234567.
    outputs = [mix((1234567 + n * GAMMA) & MASK) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_the_documented_formula() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1, 12345678901234567890]
    positions = [0, 1, 131071, 5, 77]
    token_ids = [0, 1, 2, 4095, 131071]
    keys = torch.from_numpy(row_keys(np.array(seeds, dtype=np.uint64), np.array(positions)))
    noise = gumbel_noise(keys, torch.tensor(token_ids))
    expected = [[expected_noise(s, p, t) for t in token_ids] for s, p in zip(seeds, positions, strict=True)]
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_noise_has_gumbels_moments_and_is_finite() -> None:
    keys = torch.from_numpy(row_keys(np.arange(8, dtype=np.uint64), np.arange(8)))
    noise = gumbel_noise(keys, torch.arange(131072))
    assert bool(torch.isfinite(noise).all())
    assert abs(float(noise.mean()) - 0.5772157) < 0.005
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.01
    rows = noise - noise.mean()
    assert abs(float((rows[:-1] * rows[1:]).mean())) < 0.01  # neighbouring seeds
    assert abs(float((rows[:, :-1] * rows[:, 1:]).mean())) < 0.01  # neighbouring ids


def test_the_most_extreme_bits_stay_finite() -> None:
    lowest, highest = gumbel_of_bits(torch.tensor([0, -1])).tolist()
    assert lowest == pytest.approx(-math.log(53 * math.log(2)))
    assert highest == pytest.approx(53 * math.log(2))
