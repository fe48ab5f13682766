"""The inputs of `mistral_nemo` as a GenerationRequest."""

from __future__ import annotations

import itertools
import secrets
from typing import Any

from backend.engine.request import GenerationRequest, GuideSpec, SamplingParams
from backend.errors import RequestError, shown
from backend.triton_adapter.tensors import Inputs

_ALIASES = {"min_length": "min_tokens", "random_seed": "seed"}


def new_handle() -> int:
    """A key for one request that nobody can guess: whoever knows it can take the request back."""
    return secrets.randbits(64)


def generation_request(
    inputs: Inputs, request_id: str, *, default_max_tokens: int, max_model_len: int
) -> GenerationRequest:
    """Decode one request; RequestError for values that cannot be decoded. Bounds are checked by `validate`."""
    prompt = tuple(inputs.numbers("prompt_token_ids") or ())
    room = max(1, max_model_len - len(prompt))
    return GenerationRequest(
        handle=new_handle(),
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=_number(inputs, "max_tokens", min(default_max_tokens, room)),
        min_tokens=_number(inputs, "min_tokens", 0),
        sampling=sampling_params(inputs),
        num_return_sequences=_number(inputs, "num_return_sequences", 1),
        stop_strings=tuple(text.encode() for text in inputs.texts("stop_words") or () if text),
        stop_token_ids=tuple(inputs.numbers("stop_token_ids") or ()),
        end_id=inputs.number("end_id"),
        ignore_eos=_number(inputs, "ignore_eos", False),
        deadline_ms=inputs.number("deadline_ms"),
        echo=not _number(inputs, "exclude_input_in_output", True),
        stream=_number(inputs, "stream", False),
        priority=_number(inputs, "priority", 0),
        cache_salt=inputs.text("cache_salt") or "",
        num_logprobs=_num_logprobs(inputs),
        num_prompt_logprobs=inputs.number("prompt_logprobs"),
        guide=_guide(inputs),
    )


def _num_logprobs(inputs: Inputs) -> int | None:
    """`num_logprobs`, or 0 (the drawn token's alone) for `return_log_probs`, or None."""
    num_logprobs: int | None = inputs.number("num_logprobs")
    if inputs.number("return_log_probs"):
        return num_logprobs or 0
    return num_logprobs or None


def _guide(inputs: Inputs) -> GuideSpec | None:
    kind, text = inputs.text("guided_decoding_guide_type"), inputs.text("guided_decoding_guide")
    if text and not kind:
        raise RequestError("guided_decoding_guide_type", "must be given with guided_decoding_guide, got none")
    return GuideSpec(kind, text or "") if kind else None


def _bad_words(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """Words as ids: `bad_word_ids` is all of them in a row, `bad_word_lengths` cuts it."""
    ids = inputs.numbers("bad_word_ids") or []
    lengths = inputs.numbers("bad_word_lengths") or []
    if sum(lengths) != len(ids) or any(length < 1 for length in lengths):
        raise RequestError(
            "bad_word_lengths", f"must be positive and add up to the {len(ids)} bad_word_ids, got {shown(lengths)}"
        )
    ends = itertools.accumulate(lengths, initial=0)
    return tuple(tuple(ids[start:end]) for start, end in itertools.pairwise(ends))


def _logit_bias(inputs: Inputs) -> tuple[tuple[int, float], ...]:
    ids, values = inputs.numbers("logit_bias_ids") or [], inputs.numbers("logit_bias_values") or []
    if len(ids) != len(values):
        raise RequestError("logit_bias_values", f"must be as many as logit_bias_ids = {len(ids)}, got {len(values)}")
    merged: dict[int, float] = {}
    for token_id, value in zip(ids, values, strict=True):
        merged[token_id] = merged.get(token_id, 0.0) + value
    return tuple(sorted(merged.items()))


def sampling_params(inputs: Inputs) -> SamplingParams:
    """How to draw: greedy when none of temperature, top_k, top_p, min_p is given; temperature 1 when only others are."""
    is_sampled = any(inputs.has(name) for name in ("top_k", "top_p", "min_p"))
    seed = _number(inputs, "seed", None)
    return SamplingParams(
        temperature=_number(inputs, "temperature", 1.0 if is_sampled else 0.0),
        top_k=_number(inputs, "top_k", 0),
        top_p=_number(inputs, "top_p", 1.0),
        min_p=_number(inputs, "min_p", 0.0),
        repetition_penalty=_number(inputs, "repetition_penalty", 1.0),
        presence_penalty=_number(inputs, "presence_penalty", 0.0),
        frequency_penalty=_number(inputs, "frequency_penalty", 0.0),
        seed=secrets.randbits(64) if seed is None else seed,
        logit_bias=_logit_bias(inputs),
        bad_words=_bad_words(inputs),
    )


def _number(inputs: Inputs, name: str, default: Any) -> Any:
    """The value of an input or of its alias; both with different values are refused."""
    value = inputs.number(name)
    for alias, meant in _ALIASES.items():
        other = inputs.number(alias) if meant == name else None
        if other is not None and value is not None and other != value:
            raise RequestError(alias, f"is another name of {name}; got {other} here and {value} there")
        value = other if value is None else value
    return default if value is None else value
