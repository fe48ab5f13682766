"""Every bound of a request: the value on it is taken, the value beyond it is refused with field, bound and value."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from backend.engine.request import GenerationRequest, GuideSpec, SamplingParams, mix_seed
from backend.errors import RequestError

VOCAB_SIZE = 100
MAX_MODEL_LEN = 32
REQUEST = GenerationRequest(handle=1, request_id="", prompt_token_ids=(1, 2), max_tokens=4)
NAN = float("nan")
GUIDE = GuideSpec("regex", "a")
CONTRADICTION = "cannot be combined with guided decoding: leave one of them out"


def validate(**changes: Any) -> None:
    replace(REQUEST, **changes).validate(VOCAB_SIZE, MAX_MODEL_LEN)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": (0, 99)},
        {"prompt_token_ids": (1,) * 31, "max_tokens": 1},
        {"max_tokens": 30},
        {"min_tokens": 4},
        {"stop_token_ids": tuple(range(100)) * 2 + tuple(range(56))},
        {"end_id": 99},
        {"end_id": 0},
        {"num_return_sequences": 128},
        {"stop_strings": (b"x" * 1024,) * 64},
        {"deadline_ms": 1},
        {"priority": 1000},
        {"priority": -1000},
        {"cache_salt": "x" * 256},
        {"num_logprobs": 20, "num_prompt_logprobs": 0},
        {"max_tokens": 0, "num_prompt_logprobs": 0},
        {"prompt_token_ids": (1,) * 32, "max_tokens": 0, "num_prompt_logprobs": 20},
        {"sampling": SamplingParams(logit_bias=((99, 100.0), (0, -100.0)), bad_words=((0, 99),) * 1024)},
        {"guide": GUIDE, "stop_token_ids": (1,), "stop_strings": (b"x",)},
    ],
)
def test_values_on_the_bounds_are_taken(changes: dict[str, Any]) -> None:
    validate(**changes)


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"prompt_token_ids": ()}, "prompt_token_ids", "must hold at least 1 id, got 0"),
        ({"prompt_token_ids": (1, 100)}, "prompt_token_ids", "ids must be in [0, 99], got 100 at index 1"),
        ({"prompt_token_ids": (-1,)}, "prompt_token_ids", "ids must be in [0, 99], got -1 at index 0"),
        ({"stop_token_ids": (1, 2, 100)}, "stop_token_ids", "ids must be in [0, 99], got 100 at index 2"),
        ({"stop_token_ids": (1,) * 257}, "stop_token_ids", "at most 256 ids, got 257"),
        ({"end_id": 100}, "end_id", "ids must be in [0, 99], got 100 at index 0"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1 (0 needs prompt_logprobs), got 0"),
        ({"max_tokens": -1, "num_prompt_logprobs": 0}, "max_tokens", "must be at least 0, got -1"),
        (
            {"max_tokens": 31},
            "max_tokens",
            "at most 30 fit behind a prompt of 2 tokens in the served max_model_len 32, got 31",
        ),
        ({"min_tokens": -1}, "min_tokens", "must be in [0, max_tokens = 4], got -1"),
        ({"min_tokens": 5}, "min_tokens", "must be in [0, max_tokens = 4], got 5"),
        (
            {"prompt_token_ids": (1,) * 32, "max_tokens": 1},
            "prompt_token_ids",
            "the prompt has 32 tokens, at most 31 fit with 1 more into the served max_model_len 32",
        ),
        ({"num_return_sequences": 0}, "num_return_sequences", "must be in [1, 128], got 0"),
        ({"num_return_sequences": 129}, "num_return_sequences", "must be in [1, 128], got 129"),
        ({"stop_strings": (b"x",) * 65}, "stop_words", "at most 64 strings, got 65"),
        ({"stop_strings": (b"x", b"")}, "stop_words", "each must have 1 to 1024 bytes, got 0"),
        ({"stop_strings": (b"x" * 1025,)}, "stop_words", "each must have 1 to 1024 bytes, got 1025"),
        ({"deadline_ms": 0}, "deadline_ms", "must be at least 1, got 0"),
        ({"priority": 1001}, "priority", "must be in [-1000, 1000], got 1001"),
        ({"priority": -1001}, "priority", "must be in [-1000, 1000], got -1001"),
        ({"cache_salt": "x" * 257}, "cache_salt", "at most 256 characters, got 257"),
        ({"num_logprobs": 21}, "num_logprobs", "must be in [0, 20], got 21"),
        ({"num_prompt_logprobs": -1}, "prompt_logprobs", "must be in [0, 20], got -1"),
        (
            {"sampling": SamplingParams(logit_bias=((100, 1.0),))},
            "logit_bias_ids",
            "ids must be in [0, 99], got 100 at index 0",
        ),
        (
            {"sampling": SamplingParams(logit_bias=((1, 100.5),))},
            "logit_bias_values",
            "must be in [-100.0, 100.0], got 100.5",
        ),
        ({"sampling": SamplingParams(logit_bias=((1, 0.0),) * 1025)}, "logit_bias_ids", "at most 1024 ids, got 1025"),
        (
            {"sampling": SamplingParams(bad_words=((1, 100),))},
            "bad_words",
            "ids must be in [0, 99], got 100 at index 1",
        ),
        ({"sampling": SamplingParams(bad_words=((1,),) * 1025)}, "bad_words", "at most 1024 words, got 1025"),
        ({"guide": GUIDE, "ignore_eos": True}, "ignore_eos", CONTRADICTION),
        ({"guide": GUIDE, "end_id": 0}, "end_id", CONTRADICTION),
        ({"guide": GUIDE, "min_tokens": 1}, "min_tokens", CONTRADICTION),
        ({"guide": GUIDE, "sampling": SamplingParams(bad_words=((1,),))}, "bad_words", CONTRADICTION),
        ({"sampling": SamplingParams(top_k=-1)}, "top_k", "must be in [0, 2147483647], got -1"),
    ],
)
def test_values_beyond_the_bounds_are_refused(changes: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(f'{field}: {problem}')}$") as caught:
        validate(**changes)
    assert (caught.value.field, caught.value.problem) == (field, problem)


@pytest.mark.parametrize(
    ("field", "allowed", "refused", "bound"),
    [
        ("temperature", [0.0, 0.01, 100.0], [-0.1, 100.1, NAN, float("inf")], "must be in [0.0, 100.0]"),
        ("temperature", [0.01], [0.0099, 1e-30], "must be 0 (greedy) or at least 0.01"),
        ("top_k", [0, 1, 2**31 - 1], [-1, 2**31], "must be in [0, 2147483647]"),
        ("top_p", [1e-6, 1.0], [0.0, -0.1, 1.0001, NAN], "must be in (0, 1]"),
        ("min_p", [0.0, 1.0], [-0.1, 1.1, NAN], "must be in [0.0, 1.0]"),
        ("repetition_penalty", [1e-6, 100.0], [0.0, -1.0, 100.1, NAN], "must be in (0, 100]"),
        ("presence_penalty", [-100.0, 100.0], [-100.1, 100.1, NAN], "must be in [-100.0, 100.0]"),
        ("frequency_penalty", [-100.0, 100.0], [-100.1, 100.1, NAN], "must be in [-100.0, 100.0]"),
        ("seed", [0, 2**64 - 1], [-1, 2**64], "must be in [0, 18446744073709551615]"),
    ],
)
def test_bounds_of_sampling(field: str, allowed: list[Any], refused: list[Any], bound: str) -> None:
    for value in allowed:
        replace(SamplingParams(), **{field: value}).validate()
    for value in refused:
        with pytest.raises(RequestError, match=f"^{re.escape(f'{field}: {bound}, got {value!r}')}$"):
            replace(SamplingParams(), **{field: value}).validate()


@pytest.mark.parametrize(
    ("changes", "is_greedy", "has_penalties"),
    [
        ({}, True, False),
        ({"temperature": 0.5}, False, False),
        ({"repetition_penalty": 1.1}, True, True),
        ({"presence_penalty": -0.1}, True, True),
        ({"frequency_penalty": 0.1}, True, True),
    ],
)
def test_what_sampling_needs(changes: dict[str, Any], is_greedy: bool, has_penalties: bool) -> None:
    sampling = replace(SamplingParams(), **changes)
    assert (sampling.is_greedy, sampling.has_penalties) == (is_greedy, has_penalties)


def test_samples_of_neighbouring_seeds_do_not_share_seeds() -> None:
    seeds = {mix_seed(seed, index) for seed in range(32) for index in range(32)}
    assert len(seeds) == 32 * 32
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert mix_seed(2**64 - 1, 0) == 2**64 - 1
