from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.plan import SlotStart
from backend.engine.request import SamplingParams
from backend.runner.sampler import Sampler
from tests.unit.runner.test_sampler import VOCAB_SIZE, chi_square, draw, logits_of, penalised, started

CPU = torch.device("cpu")


def mask_of(ids: set[int], vocab_size: int = VOCAB_SIZE) -> npt.NDArray[np.int32]:
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def draw_masked(sampler: Sampler, logits: torch.Tensor, position: int, mask: npt.NDArray[np.int32]) -> int:
    return int(sampler.sample(logits.clone(), np.array([0]), np.array([position]), {0: mask}).token_ids)


def test_bias_shifts_the_distribution_as_it_says() -> None:
    num_draws, vocab_size = 20_000, 8
    logits, biases = logits_of(3, vocab_size=vocab_size), ((1, 1.5), (4, -2.0), (6, 0.25))
    biased = logits[0].double()
    for token_id, value in biases:
        biased[token_id] += value
    probabilities = torch.softmax(biased / 1.4, dim=0).numpy()
    sampler = Sampler(num_draws, vocab_size, CPU)
    for slot in range(num_draws):
        params = SamplingParams(temperature=1.4, seed=slot, logit_bias=biases)
        sampler.start(slot, SlotStart(params, (0,)))
    ids = draw(sampler, logits.expand(num_draws, -1), list(range(num_draws)), [5] * num_draws)
    counts = np.bincount(ids, minlength=vocab_size)
    assert chi_square(counts, probabilities) < 24.3  # 7 degrees of freedom, p = 0.001
    assert chi_square(counts, torch.softmax(logits[0].double() / 1.4, dim=0).numpy()) > 1000


def test_bias_is_added_after_the_penalties() -> None:
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.4, logit_bias=((7, 4.0), (12, -3.0), (7, 0.5)))
    sampler = started(params)
    outputs: list[int] = []
    for position in range(3, 30):
        logits = logits_of(position % 3)
        expected = np.array(penalised(logits[0].tolist(), params, [1, 2, 3], outputs), dtype=np.float32)
        expected[7] += np.float32(4.5)  # an id that comes twice has the sum
        expected[12] += np.float32(-3.0)
        assert draw(sampler, logits, [0], [position]) == [int(expected.argmax())]
        outputs.append(int(expected.argmax()))
    assert 7 in outputs


def forbidden(words: tuple[tuple[int, ...], ...], outputs: list[int]) -> set[int]:
    """Straight from the definition."""
    return {word[-1] for word in words if len(word) == 1 or outputs[1 - len(word) :] == list(word[:-1])}


@settings(max_examples=40)
@given(
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=6).map(tuple),
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)
def test_bad_words_over_a_generation(words: tuple[tuple[int, ...], ...], prompt: tuple[int, ...], seed: int) -> None:
    sampler = started(SamplingParams(bad_words=words), vocab_size=6, prompt_token_ids=prompt)
    outputs: list[int] = []
    for step in range(25):
        logits = logits_of(seed + step, vocab_size=6)
        expected = logits[0].tolist()
        for token_id in forbidden(words, outputs):
            expected[token_id] = -math.inf
        outputs += draw(sampler, logits, [0], [step])
        assert outputs[-1] == int(np.argmax(expected))


def test_long_bad_words_beside_short_ones() -> None:
    """A word longer than any before widens what is remembered, also of slots that are in the middle of one."""
    words = (((9, 8),), ((1, 2, 3, 4, 5, 6),), ((3,),))
    sampler = Sampler(3, 16, CPU)
    for slot, bad_words in enumerate(words):
        sampler.start(slot, SlotStart(SamplingParams(bad_words=bad_words), (0,)))
        if slot == 0:
            logits = torch.zeros(1, 16)
            logits[0, 9] = 1.0
            assert draw(sampler, logits, [0], [1]) == [9]
    wanted = [(8, 1), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6)]
    drawn = []
    for position, best in enumerate(wanted):
        logits = torch.zeros(3, 16)
        logits[[1, 2], list(best)] = 1.0
        drawn.append(draw(sampler, logits, [2, 0, 1], [position] * 3))
    assert [ids[1] for ids in drawn] == [0, 2, 2, 2, 2, 2]  # 8 behind 9 was refused
    assert [ids[2] for ids in drawn] == [1, 2, 3, 4, 5, 0]


def test_a_slot_forgets_the_rules_of_the_sequence_before() -> None:
    logits = logits_of(0)
    best = int(logits.argmax())
    second = int(logits[0].topk(2).indices[1])
    strict = SamplingParams(bad_words=((best,), (best, second)), logit_bias=((second, 50.0),))
    sampler = started(strict, min_tokens=5, ending_ids=(best,))
    assert draw(sampler, logits, [0], [3]) == [second]
    sampler.start(0, SlotStart(SamplingParams(), (1,), 1, (best,)))
    assert draw(sampler, logits, [0], [3]) == [second]
    sampler.start(0, SlotStart(SamplingParams(), (1,)))
    assert draw(sampler, logits, [0], [3]) == [best]
    sampler.start(0, SlotStart(SamplingParams(bad_words=((best, second),)), (1,)))
    assert draw(sampler, logits, [0], [3]) == [best]
    sampler.start(0, SlotStart(SamplingParams(bad_words=((best, best),)), (1,)))
    assert draw(sampler, logits, [0], [3]) == [best]  # the best before does not count any more
    assert draw(sampler, logits, [0], [4]) == [second]


MASKED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=3.0, top_k=5, seed=2),
    SamplingParams(temperature=3.0, top_p=0.7, seed=3),
    SamplingParams(temperature=1.0, min_p=0.3, seed=4),
    SamplingParams(repetition_penalty=1.4, logit_bias=((3, 2.0),), bad_words=((5,),)),
]


@settings(max_examples=40)
@given(
    ids=st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=VOCAB_SIZE),
    params=st.sampled_from(MASKED),
    seed=st.integers(0, 1000),
)
def test_a_mask_is_a_vocabulary_of_the_allowed_ids(ids: set[int], params: SamplingParams, seed: int) -> None:
    logits = logits_of(seed)
    removed = torch.full_like(logits, -torch.inf)
    allowed = torch.tensor(sorted(ids))
    removed[:, allowed] = logits[:, allowed]
    expected = draw(started(params), removed, [0], [seed])[0]
    if ids == {5}:
        expected = 5  # also where it is a bad word: see below
    assert draw_masked(started(params), logits, seed, mask_of(ids)) == expected


def test_ids_behind_the_end_of_a_mask_are_not_allowed_and_bits_behind_the_vocabulary_do_nothing() -> None:
    logits = logits_of(0)
    everything = np.full(3, -1, dtype=np.int32)  # 96 bits for 61 ids
    assert draw_masked(started(SamplingParams()), logits, 0, everything) == int(logits.argmax())
    logits[0, 40] = 50.0
    assert draw_masked(started(SamplingParams()), logits, 0, everything[:1]) == int(logits[0, :32].argmax())
    with pytest.raises(AssertionError, match="allows nothing"):
        draw_masked(started(SamplingParams()), logits, 0, np.array([0, -(2**31), 7], dtype=np.int32))


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
def test_a_mask_wins_over_everything_else_that_forbids(params: SamplingParams) -> None:
    logits = logits_of(0)
    words = tuple((token_id,) for token_id in (7, 8, 9, 10))
    strict = SamplingParams(temperature=params.temperature, top_p=params.top_p, bad_words=words)
    for position in range(20):
        sampler = started(strict, min_tokens=3, ending_ids=(10, 11))
        best = max((7, 8, 10, 11), key=lambda token_id: float(logits[0, token_id]))
        assert draw_masked(sampler, logits, position, mask_of({7, 8, 10, 11})) == best
        assert draw_masked(started(strict), logits, position, mask_of({7, 8, 10, 11})) == 11


def test_a_vocabulary_of_bad_words() -> None:
    words = tuple((token_id,) for token_id in range(VOCAB_SIZE))
    logits = logits_of(0)
    assert draw(started(SamplingParams(temperature=1.0, bad_words=words)), logits, [0], [0]) == [int(logits.argmax())]


def test_a_mask_for_a_row_that_is_not_there_is_refused() -> None:
    sampler = Sampler(2, VOCAB_SIZE, CPU)
    with pytest.raises(AssertionError, match="draws nothing"):
        sampler.sample(logits_of(0), np.array([0]), np.array([1]), {1: mask_of({3})})


def test_masked_rows_do_not_depend_on_the_others() -> None:
    generator = np.random.default_rng(1)
    params = MASKED * 4
    alone = [started(p) for p in params]
    together = Sampler(len(params), VOCAB_SIZE, CPU)
    for slot, p in enumerate(params):
        together.start(slot, SlotStart(p, (1, 2, 3)))
    for step in range(6):
        slots = generator.permutation(len(params))
        logits = logits_of(step, len(params))
        masks = {
            slot: mask_of(set(generator.integers(0, VOCAB_SIZE, 9).tolist()))
            for slot in slots[: len(slots) // 2].tolist()
        }
        drawn = together.sample(logits[slots], slots, slots + step, masks).token_ids.tolist()
        for slot, token_id in zip(slots.tolist(), drawn, strict=True):
            row = logits[slot : slot + 1].clone()
            its_masks = {0: masks[slot]} if slot in masks else {}
            expected = alone[slot].sample(row, np.array([0]), np.array([slot + step]), its_masks).token_ids
            assert token_id == int(expected)


def test_forced_ids_count_as_if_drawn() -> None:
    params = SamplingParams(
        temperature=0.8, seed=3, repetition_penalty=1.3, frequency_penalty=0.7, bad_words=((20, 21, 22), (21, 23))
    )
    for forced in ((20,), (20, 21), (5, 20, 21, 20, 21)):
        start: dict[str, Any] = {"min_tokens": len(forced) + 2, "ending_ids": (22, 24)}
        one_by_one, at_once = started(params, **start), started(params, **start)
        for position, token_id in enumerate(forced):
            assert draw_masked(one_by_one, logits_of(position), position, mask_of({token_id})) == token_id
        at_once.force(0, forced)
        drawn = []
        for position in range(len(forced), len(forced) + 30):
            logits = logits_of(position)
            logits[0, [22, 23, 24]] += 4.0
            drawn.append(draw(at_once, logits, [0], [position])[0])
            assert draw(one_by_one, logits, [0], [position]) == drawn[-1:]
        assert not {22, 24} & set(drawn[:2])
        assert 24 in drawn
