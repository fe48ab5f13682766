"""The inputs of `mistral_nemo` as a GenerationRequest, and the refusal of what this version does not do."""

from __future__ import annotations

import secrets
from typing import Any

from backend.engine.request import GenerationRequest, SamplingParams
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
    refuse_unsupported(inputs)
    prompt = tuple(inputs.numbers("prompt_token_ids") or ())
    room = max(1, max_model_len - len(prompt))
    max_tokens = _number(inputs, "max_tokens", min(default_max_tokens, room))
    return GenerationRequest(
        handle=new_handle(),
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
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
    )


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
    )


def refuse_unsupported(inputs: Inputs) -> None:
    """Refuse by name what the schema has and this version does not do yet; the value that means "off" is accepted."""
    for name in ("return_log_probs",):
        if inputs.number(name):
            raise RequestError(name, "log-probabilities are not supported by this version; leave it out or send false")
    for name in ("num_logprobs", "prompt_logprobs"):
        if inputs.number(name):
            raise RequestError(name, "log-probabilities are not supported by this version; leave it out or send 0")
    for name in ("guided_decoding_guide_type", "guided_decoding_guide"):
        if inputs.text(name):
            raise RequestError(name, "guided decoding is not supported by this version; leave it out")
    for name in ("bad_words", "embedding_bias_words"):
        if any(inputs.texts(name) or ()):
            raise RequestError(name, "is not supported by this version; leave it out or send an empty string")
    for name in ("logit_bias_ids", "logit_bias_values", "embedding_bias_weights"):
        values = inputs.numbers(name)
        if values and any(values):
            raise RequestError(name, f"logit bias is not supported by this version; leave it out, got {shown(values)}")
    if inputs.number("priority"):
        raise RequestError("priority", "priorities are not supported by this version; leave it out or send 0")
    if inputs.text("cache_salt"):
        raise RequestError("cache_salt", "there is no prefix cache in this version; leave it out")


def _number(inputs: Inputs, name: str, default: Any) -> Any:
    """The value of an input or of its alias; both with different values are refused."""
    value = inputs.number(name)
    for alias, meant in _ALIASES.items():
        other = inputs.number(alias) if meant == name else None
        if other is not None and value is not None and other != value:
            raise RequestError(alias, f"is another name of {name}; got {other} here and {value} there")
        value = other if value is None else value
    return default if value is None else value
