"""Many different requests at once: each gets the answer it gets alone, and everything is given back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.triton.calls import ask, post
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer
from tests.triton.soak import TIGHT
from tests.triton.soak_call import Truth
from tests.triton.soak_run import make_calls, make_truths, soak

NUM_TRUTHS, NUM_CALLS, AT_ONCE, SEED = 60, 200, 48, 1
MAX_SECONDS = 300.0


@pytest.fixture(scope="module")
def truths(server: LiveServer) -> list[Truth]:
    """Requests, each served alone."""
    return make_truths(server, SEED, NUM_TRUTHS)


def test_a_soak_in_small(idle_server: LiveServer, truths: list[Truth]) -> None:
    report = soak(idle_server, make_calls(truths, SEED, NUM_CALLS), AT_ONCE, MAX_SECONDS, progress=False)
    assert not report.problems, report
    assert report.fates["whole"] > NUM_CALLS // 2
    assert len(report.fates) >= 4
    assert {each.finish_reason for truth in truths for each in truth.spoken} == {"length", "stop"}


def test_a_soak_in_small_with_too_few_pages(start_server: StartServer, truths: list[Truth]) -> None:
    small = start_server(**TIGHT)
    report = soak(small, make_calls(truths, SEED + 1, NUM_CALLS // 2), AT_ONCE, MAX_SECONDS, progress=False)
    assert not report.problems, report
    assert report.num_preemptions > 5  # how many depends on how fast the requests come
    small.stop()


def test_bad_requests_do_not_disturb_good_ones(idle_server: LiveServer) -> None:
    good: dict[str, Any] = {"text_input": "Hello", "max_tokens": 60, "temperature": 1.0, "seed": 8}
    bad = {"text_input": "Hello", "top_p": 7.0}
    expected = ask(idle_server, **good).summary()

    def alternate(index: int) -> Any:
        if index % 2:
            return post(idle_server, "ensemble/generate", bad)[0]
        return ask(idle_server, **good, stream=True).summary()

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(alternate, range(16)))
    assert outcomes[1::2] == [400] * 8
    assert outcomes[::2] == [expected] * 8
