from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from backend.engine.plan import SlotStart
from backend.engine.request import SamplingParams
from backend.runner.noise import gumbel_noise, row_keys
from backend.runner.sampler import Sampler, sampler_bytes

CPU = torch.device("cpu")
VOCAB_SIZE = 61


def logits_of(seed: int, num_rows: int = 1, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return 2.0 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def started(params: SamplingParams, vocab_size: int = VOCAB_SIZE, **start: Any) -> Sampler:
    """A sampler with one slot in use."""
    sampler = Sampler(1, vocab_size, CPU)
    sampler.start(0, SlotStart(params, **({"prompt_token_ids": (1, 2, 3)} | start)))
    return sampler


def draw(sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> list[int]:
    ids: list[int] = sampler.sample(logits.clone(), np.array(slots), np.array(positions), {}).token_ids.tolist()
    return ids


def noise_of(seed: int, position: int, vocab_size: int) -> list[float]:
    keys = torch.from_numpy(row_keys(np.array([seed], dtype=np.uint64), np.array([position])))
    values: list[float] = gumbel_noise(keys, torch.arange(vocab_size))[0].tolist()
    return values


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    sampler = Sampler(2, 4, CPU)
    for slot in (0, 1):
        sampler.start(slot, SlotStart(SamplingParams(), (0,)))
    assert draw(sampler, logits, [1, 0], [1, 1]) == [1, 0]
    assert sampler.last_ids.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.01, 0.7, 3.0])
@pytest.mark.parametrize("position", [0, 17, 131071])
def test_temperature_alone_is_gumbel_max(temperature: float, position: int) -> None:
    for seed in range(20):
        logits = logits_of(seed)
        scores = [
            logit / temperature + noise
            for logit, noise in zip(logits[0].tolist(), noise_of(seed, position, VOCAB_SIZE), strict=True)
        ]
        sampler = started(SamplingParams(temperature=temperature, seed=seed))
        assert draw(sampler, logits, [0], [position]) == [scores.index(max(scores))]


def test_filters_that_keep_all_draw_as_none() -> None:
    for seed in range(40):
        logits = logits_of(seed)
        plain = draw(started(SamplingParams(temperature=1.0, seed=seed)), logits, [0], [seed])
        for params in (
            SamplingParams(temperature=1.0, top_k=VOCAB_SIZE, seed=seed),
            SamplingParams(temperature=1.0, top_k=10**9, seed=seed),
            SamplingParams(temperature=1.0, top_p=1.0 - 1e-16, min_p=1e-30, seed=seed),
        ):
            assert draw(started(params), logits, [0], [seed]) == plain


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=5.0, top_k=3), {4, 7, 2}),
        (SamplingParams(temperature=1.0, top_p=0.85), {4, 7}),  # 0.6 + 0.3
        (SamplingParams(temperature=1.0, min_p=0.1), {4, 7, 2}),  # at least 0.06
        (SamplingParams(temperature=1.0, top_k=2, top_p=0.6), {4}),  # 0.6 of 0.9 reaches 0.6
        (SamplingParams(temperature=1.0, top_p=1e-9), {4}),
        (SamplingParams(temperature=1.0, top_k=1), {4}),
    ],
)
def test_only_what_the_filters_keep_is_drawn(params: SamplingParams, allowed: set[int]) -> None:
    logits = torch.full((1, 9), math.log(0.001))
    for token_id, probability in ((4, 0.6), (7, 0.3), (2, 0.094)):
        logits[0, token_id] = math.log(probability)
    sampler = started(params, vocab_size=9)
    assert {draw(sampler, logits, [0], [position])[0] for position in range(300)} == allowed


def chi_square(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("axis", ["positions", "seeds"])
def test_frequencies_are_the_probabilities(axis: str) -> None:
    num_draws, vocab_size = 20_000, 8
    logits = logits_of(3, vocab_size=vocab_size)
    probabilities = torch.softmax(logits[0].double() / 1.4, dim=0).numpy()
    sampler = Sampler(num_draws, vocab_size, CPU)
    for slot in range(num_draws):
        seed = slot if axis == "seeds" else 7
        sampler.start(slot, SlotStart(SamplingParams(temperature=1.4, seed=seed), (0,)))
    slots = list(range(num_draws))
    positions = [5] * num_draws if axis == "seeds" else slots
    ids = np.array(draw(sampler, logits.expand(num_draws, -1), slots, positions))
    assert chi_square(np.bincount(ids, minlength=vocab_size), probabilities) < 24.3  # 7 degrees of freedom, p = 0.001
    pairs = np.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2)
    assert chi_square(pairs, np.outer(probabilities, probabilities).ravel()) < 103.4  # 63 degrees of freedom


def penalised(logits: list[float], params: SamplingParams, prompt: list[int], outputs: list[int]) -> list[float]:
    """Straight from the definition."""
    result = []
    for token_id, logit in enumerate(logits):
        if token_id in prompt or token_id in outputs:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.presence_penalty * (token_id in outputs)
        result.append(logit - params.frequency_penalty * outputs.count(token_id))
    return result


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.3),
    ],
)
def test_penalties_over_a_generation(params: SamplingParams) -> None:
    prompt = [5, 9, 5]
    sampler = started(params, prompt_token_ids=tuple(prompt))
    outputs: list[int] = []
    for position in range(3, 40):
        logits = logits_of(position % 3)
        expected = penalised(logits[0].tolist(), params, prompt, outputs)
        (token_id,) = draw(sampler, logits, [0], [position])
        assert token_id == int(np.argmax(np.array(expected, dtype=np.float32)))
        outputs.append(token_id)
    assert len(set(outputs)) < len(outputs)  # counts above one were reached


def test_penalties_come_before_temperature_and_noise() -> None:
    params = SamplingParams(temperature=2.0, presence_penalty=3.0, seed=11)
    sampler = started(params)
    outputs: list[int] = []
    for position in range(3, 30):
        logits = logits_of(0)
        values = np.array(penalised(logits[0].tolist(), params, [1, 2, 3], outputs), dtype=np.float32)
        scores = values.astype(np.float64) / 2.0 + np.array(noise_of(11, position, VOCAB_SIZE))
        assert draw(sampler, logits, [0], [position]) == [int(np.argmax(scores))]
        outputs.append(int(np.argmax(scores)))


def test_the_smallest_and_largest_penalties_stay_finite() -> None:
    for penalty in (5e-324, 1e-300, 100.0):
        params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=penalty)
        sampler = started(params, prompt_token_ids=tuple(range(VOCAB_SIZE)))
        logits = logits_of(0)
        result = sampler.sample(logits, np.array([0]), np.array([3]), {})
        assert bool(torch.isfinite(logits).all())
        assert logits_of(0)[0, result.token_ids[0]] > (0.0 if penalty < 1.0 else -1.0)


def test_a_slot_forgets_the_sequence_before() -> None:
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    sampler = started(params)
    first = [draw(sampler, logits_of(0), [0], [position])[0] for position in range(3, 20)]
    sampler.start(0, SlotStart(params, (1, 2, 3)))
    assert [draw(sampler, logits_of(0), [0], [position])[0] for position in range(3, 20)] == first
    sampler.start(0, SlotStart(SamplingParams(), (1, 2, 3)))
    assert draw(sampler, logits_of(0), [0], [3]) == [int(logits_of(0).argmax())]


def test_no_ending_before_min_tokens() -> None:
    logits = logits_of(0)
    best = int(logits.argmax())
    for params in (SamplingParams(), SamplingParams(temperature=0.01), SamplingParams(temperature=1.0, top_k=1)):
        sampler = started(params, min_tokens=3, ending_ids=(best, 0))
        ids = [draw(sampler, logits, [0], [position])[0] for position in range(3, 8)]
        assert best not in ids[:3]
        assert ids[3:] == [best, best]
        sampler.start(0, SlotStart(params, (1, 2, 3), min_tokens=1, ending_ids=(best,)))
        assert draw(sampler, logits, [0], [3]) != [best]


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.5, top_p=0.8, seed=2),
    SamplingParams(temperature=2.0, top_k=7, seed=3),
    SamplingParams(temperature=2.0, min_p=0.05, seed=4, repetition_penalty=1.3),
    SamplingParams(frequency_penalty=0.4),
    SamplingParams(temperature=1.0, seed=2**64 - 1, presence_penalty=-1.0),
    SamplingParams(temperature=100.0, top_p=0.999, seed=5),
    SamplingParams(logit_bias=((7, 3.0), (60, -2.0)), presence_penalty=0.5),
    SamplingParams(temperature=1.0, seed=6, bad_words=((4,), (9, 8), (7, 9, 8))),
    SamplingParams(temperature=1.0, top_k=40, seed=7, bad_words=((5,),), logit_bias=((11, 1.5),)),
]


@pytest.mark.parametrize("vocab_size", [61, 1000])
def test_a_row_does_not_depend_on_the_others(vocab_size: int) -> None:
    generator = np.random.default_rng(0)
    params = MIXED * 5
    alone = [started(p, vocab_size) for p in params]
    together = Sampler(len(params), vocab_size, CPU)
    for slot, p in enumerate(params):
        together.start(slot, SlotStart(p, (1, 2, 3)))
    for step in range(6):
        slots = generator.permutation(len(params))[: generator.integers(1, len(params) + 1)].tolist()
        logits = logits_of(step, len(params), vocab_size)
        ids = draw(together, logits[slots], slots, [slot + step for slot in slots])
        assert ids == [draw(alone[slot], logits[slot : slot + 1], [0], [slot + step])[0] for slot in slots]


def test_padding_of_the_vocabulary_does_not_change_the_draw() -> None:
    padding = torch.full((1, 67), -torch.inf)
    for seed, params in enumerate(MIXED * 4):
        logits = logits_of(seed)
        plain = draw(started(params), logits, [0], [seed])
        assert draw(started(params, VOCAB_SIZE + 67), torch.cat((logits, padding), dim=1), [0], [seed]) == plain


def test_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def ids() -> list[int]:
        sampler = Sampler(len(MIXED) * 3, VOCAB_SIZE, CPU)
        for slot, params in enumerate(MIXED * 3):
            sampler.start(slot, SlotStart(params, (1, 2, 3)))
        slots = list(range(len(MIXED) * 3))
        logits = logits_of(9, len(slots))
        return draw(sampler, logits, slots, slots) + draw(sampler, logits, slots, slots)

    expected = ids()
    monkeypatch.setattr("backend.runner.row_blocks._MAX_ELEMENTS", 2 * VOCAB_SIZE)
    assert ids() == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_are_told(value: float) -> None:
    logits = logits_of(0, 3)
    logits[1, 5] = value
    sampler = Sampler(3, VOCAB_SIZE, CPU)
    for slot in range(3):
        sampler.start(slot, SlotStart(SamplingParams(), (1,), min_tokens=2, ending_ids=(4,)))
    result = sampler.sample(logits, np.array([0, 1, 2]), np.array([1, 1, 1]), {})
    assert result.is_finite.tolist() == [True, False, True]


def test_bytes_of_the_state() -> None:
    sampler = Sampler(3, VOCAB_SIZE, CPU)
    assert sampler_bytes(3, VOCAB_SIZE) == sampler._is_seen.nbytes + sampler._output_counts.nbytes
