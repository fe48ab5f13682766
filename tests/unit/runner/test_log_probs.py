from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.plan import SlotStart
from backend.engine.request import SamplingParams
from backend.runner.log_probs import LogProbs, measure
from backend.runner.sampler import Sampler


def random_logits(seed: int, num_rows: int, vocab_size: int) -> torch.Tensor:
    """Rounded to eighths, so that many are equal."""
    logits = 3.0 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return logits.mul_(8.0).round_().mul_(0.125)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 131072])
def test_every_id_against_log_softmax(vocab_size: int, scale: float) -> None:
    logits = scale * torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(1))
    expected = torch.log_softmax(logits.double(), dim=1)
    for row in range(2):
        ids = torch.arange(vocab_size)[:: max(1, vocab_size // 20)]
        actual = measure(logits[row].expand(len(ids), -1), ids, 0).log_probs
        assert (actual.double() - expected[row, ids]).abs().max() < 1e-6 * max(
            1.0, float(expected[row, ids].abs().max())
        )
    everything = measure(logits, torch.tensor([0, 0]), vocab_size)
    assert (everything.top_log_probs.double().exp().sum(dim=1) - 1.0).abs().max() < 1e-6


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), vocab_size=st.integers(1, 40), num_top=st.integers(0, 20))
def test_ranks_and_order_among_equals(seed: int, vocab_size: int, num_top: int) -> None:
    num_top = min(num_top, vocab_size)
    logits = random_logits(seed, 3, vocab_size)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, vocab_size, 3))
    for values, token_id, place in zip(
        logits.tolist(), ids.tolist(), measure(logits, ids, num_top).for_plan([num_top] * 3), strict=True
    ):
        assert place.rank == 1 + sum(value > values[token_id] for value in values)
        assert list(place.top_ids) == sorted(range(vocab_size), key=lambda i: (-values[i], i))[:num_top]
        for top_id, top_log_prob in zip(place.top_ids, place.top_log_probs, strict=True):
            assert (top_log_prob == place.log_prob) == (values[top_id] == values[token_id])


def assert_same(actual: LogProbs, expected: LogProbs, rows: slice) -> None:
    for part in fields(LogProbs):
        assert torch.equal(getattr(actual, part.name), getattr(expected, part.name)[rows])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size at which PyTorch splits the sum of a lone row between threads."""
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    logits = torch.randn(20, 50_001, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = 11.0  # so likely that its log-probability has bits enough to show how the sum was rounded
    ids = torch.full((20,), 3)
    expected = measure(logits, ids, 5)
    for rows in (*(slice(row, row + 1) for row in range(20)), slice(3, 5)):
        assert_same(measure(logits[rows], ids[rows], 5), expected, rows)
    monkeypatch.setattr("backend.runner.row_blocks._MAX_ELEMENTS", 1)
    assert_same(measure(logits, ids, 5), expected, slice(None))
    torch.set_num_threads(num_threads_before)


def test_they_are_of_the_models_own_logits_and_of_rows_that_ask() -> None:
    vocab_size = 61
    asked: list[tuple[int | None, dict[str, Any]]] = [
        (None, {"temperature": 1.0}),
        (0, {"presence_penalty": 2.0, "repetition_penalty": 2.0, "bad_words": ((4,), (5,))}),
        (5, {"temperature": 1.0, "top_k": 2, "logit_bias": ((7, 30.0),)}),
        (None, {}),
        (3, {"temperature": 0.01}),
    ]
    sampler = Sampler(len(asked), vocab_size, torch.device("cpu"))
    for slot, (num_logprobs, params) in enumerate(asked):
        start = SlotStart(SamplingParams(**params), (1, 2, 3), 1, (6,), num_logprobs)
        sampler.start(slot, start)
    logits = 2.0 * torch.randn(len(asked), vocab_size, generator=torch.Generator().manual_seed(0))
    mask = np.array([-1, 0], dtype=np.int32)
    slots = np.arange(len(asked))
    drawn = sampler.sample(logits.clone(), slots, slots, {1: mask})
    assert drawn.num_tops.tolist() == [-1, 0, 5, -1, 3]
    assert int(drawn.token_ids[2]) == 7  # drawn for its bias, which is not in its log-probability
    assert drawn.log_probs is not None
    asking = torch.tensor([1, 2, 4])
    assert_same(drawn.log_probs, measure(logits[asking], drawn.token_ids[asking], 5), slice(None))
    assert [len(place.top_ids) for place in drawn.log_probs.for_plan([0, 5, 3])] == [0, 5, 3]


def test_nobody_asks() -> None:
    sampler = Sampler(1, 61, torch.device("cpu"))
    sampler.start(0, SlotStart(SamplingParams(), (1,), num_logprobs=2))
    sampler.start(0, SlotStart(SamplingParams(), (1,)))
    assert sampler.sample(torch.zeros(1, 61), np.array([0]), np.array([1]), {}).log_probs is None
