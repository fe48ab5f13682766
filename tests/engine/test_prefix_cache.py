"""The prefix cache: who shares what, how much is run again, and that nobody can tell from the ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backend.engine.plan import PAGE_TOKENS
from backend.engine.prefix_cache import PrefixCache, next_key, root_key
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import SchedulerLimits
from tests.engine.device import VOCAB_SIZE
from tests.engine.trace import Abort, Add, Trace

LIMITS = SchedulerLimits(num_pages=16, max_num_seqs=4, max_step_tokens=400, max_queued_requests=8, steady_from=1)
PROMPT = tuple(number * 3 % VOCAB_SIZE for number in range(200))


def ask(handle: int, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> GenerationRequest:
    request = GenerationRequest(handle, "", prompt, 3, ignore_eos=True, sampling=SamplingParams(seed=5))
    return replace(request, **fields)


def serve(trace: Trace, request: GenerationRequest) -> int:
    """Serve one request to its end; the tokens it found in the cache."""
    trace.play([[Add(request)]])
    return trace.finish_of(request.handle).num_cached_tokens


@pytest.mark.parametrize(
    ("num_prompt", "num_cached"), [(1, 0), (63, 0), (64, 0), (65, 64), (128, 64), (129, 128), (200, 192)]
)
def test_full_pages_are_found_but_the_last_token_is_always_run(num_prompt: int, num_cached: int) -> None:
    trace = Trace(LIMITS, 1)
    assert serve(trace, ask(1)) == 0
    num_run = trace.device.num_run_tokens
    assert serve(trace, ask(2, PROMPT[:num_prompt])) == num_cached
    assert trace.device.num_run_tokens == num_run + num_prompt + 2 - num_cached
    fresh = Trace(replace(LIMITS, has_prefix_cache=False), 1)
    assert serve(fresh, ask(2, PROMPT[:num_prompt])) == 0
    assert trace.ids_of(2) == fresh.ids_of(2)


def test_what_comes_behind_the_first_difference_is_not_shared() -> None:
    trace = Trace(LIMITS, 1)
    serve(trace, ask(1))
    other = (*PROMPT[:70], (PROMPT[70] + 1) % VOCAB_SIZE, *PROMPT[71:])
    assert serve(trace, ask(2, other)) == 64
    assert serve(trace, ask(3, PROMPT[1:])) == 0


def test_salts_never_share() -> None:
    trace = Trace(LIMITS, 1)
    assert [serve(trace, ask(handle, cache_salt=salt)) for handle, salt in enumerate(["a", "b", "", "a"])] == [
        *(0, 0, 0, 192),
    ]


def test_a_salt_that_looks_like_a_private_one_finds_nothing() -> None:
    trace = Trace(LIMITS, 1)
    serve(trace, ask(1, num_prompt_logprobs=0, num_return_sequences=2))
    assert serve(trace, ask(2, cache_salt="request:1")) == 0
    assert serve(trace, ask(3, cache_salt="1")) == 0


def test_requests_for_prompt_log_probabilities_run_their_whole_prompt() -> None:
    trace = Trace(LIMITS, 1)
    serve(trace, ask(1))
    assert serve(trace, ask(2, num_prompt_logprobs=1)) == 0
    assert len(trace.finish_of(2).prompt_log_probs) == len(PROMPT) - 1


def test_an_output_is_part_of_the_prefix_of_the_next_turn() -> None:
    trace = Trace(LIMITS, 1)
    serve(trace, ask(1, PROMPT[:100], max_tokens=60))
    history = (*PROMPT[:100], *trace.ids_of(1))
    # The last id was drawn but never run: 159 tokens lie in pages, two of them full.
    assert serve(trace, ask(2, (*history, 2, 3))) == 128


def test_no_prompt_finds_what_was_generated_where_that_would_show() -> None:
    trace = Trace(replace(LIMITS, caches_outputs=False), 1)
    serve(trace, ask(1, PROMPT[:100], max_tokens=100))
    history = (*PROMPT[:100], *trace.ids_of(1))
    assert serve(trace, ask(2, (*history, 2, 3))) == 64
    # The same tokens as part of a prompt are found, all 202 of them.
    assert serve(trace, ask(3, (*history, 2, 3, 4))) == 192


def test_an_aborted_request_leaves_what_it_had_run() -> None:
    trace = Trace(LIMITS, 1)
    trace.turn([Add(ask(1, max_tokens=50))])
    trace.turn([])
    trace.play([[Abort(1)]])
    assert serve(trace, ask(2)) == 192


def test_the_prefix_used_longest_ago_makes_room() -> None:
    trace = Trace(replace(LIMITS, num_pages=6), 1)
    first, second, third = (tuple((n * 3 + salt) % VOCAB_SIZE for n in range(190)) for salt in range(3))
    serve(trace, ask(1, first))
    serve(trace, ask(2, second))
    assert serve(trace, ask(3, first)) == 128
    serve(trace, ask(4, third))
    assert serve(trace, ask(5, first)) == 128, "used last but one"
    assert serve(trace, ask(6, second)) == 0, "used longest ago"


def test_samples_share_the_pages_of_their_prompt() -> None:
    trace = Trace(LIMITS, 1)
    request = ask(1, num_return_sequences=4, max_tokens=40)
    trace.turn([Add(request)])
    most_held = 0
    while not trace.is_ended(1):
        trace.turn([])
        most_held = max(most_held, trace.scheduler.stats().num_pages_held)
    assert most_held == 3 + 4 * 1, "three full pages of the prompt once, and a page of each sample's own"
    assert [trace.finish_of(1, index).num_cached_tokens for index in range(4)] == [0, 192, 192, 192]
    assert trace.device.num_run_tokens <= 200 + 3 * 8 + 4 * 40
    trace.play([])


@pytest.mark.parametrize("changes", [{"num_prompt_logprobs": 0}, {}])
def test_samples_share_among_themselves_even_without_a_cache(changes: dict[str, Any]) -> None:
    trace = Trace(replace(LIMITS, has_prefix_cache=bool(changes)), 1)
    serve(trace, ask(1, num_return_sequences=2, **changes))
    assert [trace.finish_of(1, index).num_cached_tokens for index in range(2)] == [0, 192]
    assert serve(trace, ask(2)) == 0, "but nobody else does"


def test_hits_and_queries_are_counted() -> None:
    trace = Trace(LIMITS, 1)
    serve(trace, ask(1))
    serve(trace, ask(2, PROMPT[:130]))
    stats = trace.scheduler.stats()
    assert (stats.num_prefix_queried_tokens, stats.num_prefix_hit_tokens) == (192 + 128, 128)
    assert (stats.num_pages_held, stats.num_pages_cached) == (0, 3)


def test_a_key_is_a_function_of_salt_and_all_tokens_before() -> None:
    page, other = tuple(range(PAGE_TOKENS)), tuple(range(1, PAGE_TOKENS + 1))
    keys = [
        next_key(next_key(root_key(salt), a), b) for salt in ("", "x") for a in (page, other) for b in (page, other)
    ]
    assert len(set(keys)) == 8
    assert next_key(root_key("x"), page) == next_key(root_key("x"), page)


def test_a_page_has_one_name_and_a_name_one_page() -> None:
    cache = PrefixCache()
    one, two = next_key(root_key(""), range(64)), next_key(root_key(""), range(1, 65))
    assert cache.add(one, 7)
    assert not cache.add(one, 8)
    assert not cache.add(two, 7)
    assert cache.find([one, two]) == [7]
    cache.forget(7)
    assert cache.find([one, two]) == []
