from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.runner import filters as filters_module
from backend.runner.filters import Filters, filter_candidates


def kept_ids(
    logits: torch.Tensor, temperature: list[float], top_k: list[int], top_p: list[float], min_p: list[float]
) -> list[list[int]]:
    """What is kept of each row, most likely first."""
    filters = Filters(np.array(top_k), np.array(top_p), np.array(min_p))
    kept = filter_candidates(logits, torch.tensor(temperature, dtype=torch.float64), filters)
    return [
        [token_id for token_id, score in zip(ids, scores, strict=True) if score > -math.inf]
        for ids, scores in zip(kept.ids.tolist(), kept.scores.tolist(), strict=True)
    ]


def expected_ids(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The same, written down straight from the definition."""
    largest = max(logits)
    weights = [math.exp((value - largest) / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))[:top_k]
    total = math.fsum(weights[token_id] for token_id in order)
    kept: list[int] = []
    for token_id in order:
        if top_p < 1.0 and math.fsum(weights[i] for i in kept) >= top_p * total:
            break
        kept.append(token_id)
    return [token_id for token_id in kept if weights[token_id] >= min_p]


@settings(max_examples=150)
@given(
    logits=st.lists(
        st.sampled_from([-3.0, -1.0, 0.0, -0.0, 0.5, 2.0, 2.25]) | st.floats(-8, 8, width=32), min_size=1, max_size=40
    ),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(1, 50),
    top_p=st.floats(0.001, 0.999) | st.just(1.0),
    min_p=st.floats(0.0, 1.0) | st.just(0.0),
)
def test_filters_keep_what_their_definition_says(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    top_k = min(top_k, len(logits))
    actual = kept_ids(torch.tensor([logits]), [temperature], [top_k], [top_p], [min_p])[0]
    expected = expected_ids(logits, temperature, top_k, top_p, min_p)
    if actual != expected:  # a boundary that lies within rounding of the definition's own sums
        nudged = [
            expected_ids(logits, temperature, top_k, top_p * x, min_p * y)
            for x in (1 - 1e-9, 1 + 1e-9)
            for y in (1 - 1e-9, 1 + 1e-9)
        ]
        assert actual in nudged


def test_equal_logits_keep_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 3.0, 0.0]])
    assert kept_ids(logits, [1.0], [2], [1.0], [0.0]) == [[1, 2]]
    assert kept_ids(logits, [1.0], [4], [0.5], [0.0]) == [[1, 2]]
    assert kept_ids(logits, [1.0], [6], [1.0], [1.0]) == [[1, 2, 3, 4]]


def test_order_is_that_of_the_logits_for_all_signs_and_sizes() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1e-38, 1e-38, -3e38, 3e38, -torch.inf, 5.0, -5.0]])
    ids = filter_candidates(
        logits, torch.ones(1, dtype=torch.float64), Filters(np.array([9]), np.ones(1), np.zeros(1))
    ).ids
    assert ids.tolist() == [[5, 7, 3, 0, 1, 2, 8, 4, 6]]


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("top_k", [1, 127, 128, 129, 900, 3000])
def test_long_prefixes_do_not_depend_on_the_first_look(
    top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    temperature, top_ks, top_ps, min_ps = [1.3] * 3, [top_k, 3000, 5], [top_p, top_p, 1.0], [0.0, 0.0, 0.01]
    actual = kept_ids(logits, temperature, top_ks, top_ps, min_ps)
    for ids, values, *its in zip(actual, logits.tolist(), temperature, top_ks, top_ps, min_ps, strict=True):
        assert ids == expected_ids(values, *its)
    # The same with a first look of its own, and with everything in the first look.
    assert kept_ids(logits[:1], temperature[:1], top_ks[:1], top_ps[:1], min_ps[:1]) == actual[:1]
    monkeypatch.setattr(filters_module, "_FIRST_NUM_CANDIDATES", 3000)
    assert kept_ids(logits, temperature, top_ks, top_ps, min_ps) == actual


def test_padding_changes_nothing() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    padded = torch.cat((logits, torch.full((2, 24), -torch.inf)), dim=1)
    for top_k in (1000, 40):
        plain = kept_ids(logits, [1.0, 2.0], [top_k] * 2, [0.95, 0.8], [0.0, 0.001])
        assert kept_ids(padded, [1.0, 2.0], [1024 if top_k == 1000 else top_k] * 2, [0.95, 0.8], [0.0, 0.001]) == plain
