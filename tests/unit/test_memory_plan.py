"""The memory plan: what fits, what is said, what is refused."""

from __future__ import annotations

import pytest

from backend.errors import ConfigError
from backend.runner.memory_plan import MemoryPlan, plan_memory

GIB = 2**30


def plan(budget_bytes: int, *, kv_cache_tokens: int = 0, most_tokens: int | None = None) -> MemoryPlan:
    return plan_memory(
        "cpu", budget_bytes, 4 * GIB, GIB, 2**20, kv_cache_tokens=kv_cache_tokens, most_tokens=most_tokens
    )


def test_pages_fill_what_is_left() -> None:
    made = plan(6 * GIB)
    assert made.num_pages == 1024
    assert made.kv_tokens == 65_536
    assert made.weight_bytes + made.workspace_bytes + made.num_pages * made.page_bytes == made.budget_bytes


def test_pages_are_bounded_by_what_is_wanted_and_by_the_most() -> None:
    assert plan(6 * GIB, kv_cache_tokens=700).num_pages == 10
    assert plan(6 * GIB, most_tokens=6400).num_pages == 100


@pytest.mark.parametrize(
    ("budget_bytes", "kv_cache_tokens"), [(5 * GIB, 0), (5 * GIB + 2**20 - 1, 0), (6 * GIB, 65_600)]
)
def test_what_does_not_fit_is_refused_with_the_numbers(budget_bytes: int, kv_cache_tokens: int) -> None:
    with pytest.raises(
        ConfigError, match=r"weights 4\.00 GiB \+ workspace 1\.00 GiB \+ KV .* more than the [56]\.00 GiB"
    ):
        plan(budget_bytes, kv_cache_tokens=kv_cache_tokens)


def test_less_than_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_tokens: must be at least one page of 64, got 63"):
        plan(6 * GIB, kv_cache_tokens=63)


def test_the_plan_is_said_in_words() -> None:
    lines = plan(6 * GIB).lines()
    assert lines["kv_cache"] == "1,024 pages = 65,536 tokens: 64 of 1,024, 16 of 4,096, 2 of 32,768 tokens each"
    assert "KV 1.00 GiB of 6.00 GiB on cpu" in lines["memory"]
    assert "1 of 64 tokens" in plan(5 * GIB + 2**20).lines()["kv_cache"]


def test_a_gather_is_as_long_as_the_longest_sequence_or_as_all_pages() -> None:
    def plan(max_model_len: int) -> MemoryPlan:
        return plan_memory(
            "x",
            1000,
            100,
            100,
            10,
            kv_cache_tokens=0,
            most_tokens=None,
            gathered_page_bytes=2,
            max_model_len=max_model_len,
        )

    assert (plan(640).workspace_bytes, plan(640).num_pages) == (100 + 10 * 2, 78)
    assert (plan(64_000).workspace_bytes, plan(64_000).num_pages) == (100 + 66 * 2, 66)
