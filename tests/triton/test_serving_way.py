"""The load of `make bench-serving` through a live server, in small."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

import pytest

from tests.bench.serving.load import Load, measure
from tests.bench.serving.scale import SMALL
from tests.bench.serving.scenarios import Scenario
from tests.bench.serving.triton_way import TritonWay
from tests.bench.serving.way import ServingError
from tests.triton.live_server import LiveServer

FEW = Scenario("few", 70, 20, 3)


@pytest.mark.parametrize(("model", "first"), [("ensemble", 1), ("mistral_nemo", 100_001)])
def test_steady_state_and_arrivals(idle_server: LiveServer, model: str, first: int) -> None:
    """Prompts differ by their numbers, so the prefix cache has none of them."""
    cells: list[dict[str, Any]] = []
    with closing(TritonWay(idle_server, model)) as way:
        hits = way.num_prefix_hit_tokens
        measure(way, FEW, itertools.count(first), SMALL, shares=(0.5,), time_is_left=lambda: True, keep=cells.append)
        assert way.num_prefix_hit_tokens == hits
    capacity, (poisson,) = cells[-1]["capacity"], cells[-1]["poisson"]
    assert capacity["output_tokens"] >= 3
    assert capacity["in_flight"] == pytest.approx(3, abs=0.01)
    assert poisson["load"] == 0.5
    assert poisson["rate_per_s"] > 0


def test_a_refused_request_ends_the_run(idle_server: LiveServer) -> None:
    with closing(TritonWay(idle_server, "ensemble")) as way:
        load = Load(way, Scenario("too long", 10**5, 20, 2), itertools.count(1), patience_s=30.0)
        with pytest.raises(ServingError, match="prompt_token_ids"):
            load.capacity(0.1)
