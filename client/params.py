"""What a request asks for, and the input tensors of the model `ensemble` that say it.

A field of GenerationParams has the name of its tensor, so that one quantity has one name from here to the engine.
What is not set is not sent: the server's defaults hold. Bounds are the server's business and are refused there by name;
here only what cannot be written into the tensor's datatype is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scalar = int | float | bool | str

_STRUCT_CODES = {"INT32": "i", "UINT64": "Q", "FP32": "f", "BOOL": "?"}
_INTEGER_BOUNDS = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1)}
_FP32_MAX = 3.4028234663852886e38

_PARAM_DATATYPES = {
    "max_tokens": "INT32",
    "min_tokens": "INT32",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "min_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "seed": "UINT64",
    "stop_words": "BYTES",
    "bad_words": "BYTES",
    "stop_token_ids": "INT32",
    "end_id": "INT32",
    "ignore_eos": "BOOL",
    "num_return_sequences": "INT32",
    "exclude_input_in_output": "BOOL",
    "priority": "INT32",
    "deadline_ms": "INT32",
    "cache_salt": "BYTES",
    "return_log_probs": "BOOL",
    "num_logprobs": "INT32",
    "prompt_logprobs": "INT32",
    "guided_decoding_guide_type": "BYTES",
    "guided_decoding_guide": "BYTES",
}
_PAIRED_TENSORS = {
    "logit_bias": (("logit_bias_ids", "INT32"), ("logit_bias_values", "FP32")),
    "embedding_bias": (("embedding_bias_words", "BYTES"), ("embedding_bias_weights", "FP32")),
}


@dataclass(frozen=True)
class GenerationParams:
    """How to generate; None and empty mean: not sent, the server's default holds (greedy when nothing is given).

    `seed` makes sampling repeatable, `deadline_ms` counts from the arrival at the server, a lower `priority` runs
    first, `num_return_sequences` samples share the prompt and are told apart by `Response.sequence_index`.
    `logit_bias` is added to the logits of ids, `embedding_bias` to those of the ids of words. `num_logprobs` and
    `prompt_logprobs` ask for that many alternatives (0: none besides the token itself); with `prompt_logprobs`, `max_tokens`
    may be 0. `guided_decoding_guide_type` is json, json_schema, regex, ebnf_grammar or choice.
    Raises TypeError for a list field given as one string.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop_words: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    end_id: int | None = None
    ignore_eos: bool | None = None
    logit_bias: Mapping[int, float] | None = None
    embedding_bias: Mapping[str, float] | None = None
    num_return_sequences: int | None = None
    exclude_input_in_output: bool | None = None
    priority: int | None = None
    deadline_ms: int | None = None
    cache_salt: str | None = None
    return_log_probs: bool | None = None
    num_logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided_decoding_guide_type: str | None = None
    guided_decoding_guide: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop_words", "bad_words", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name}: a list is wanted, not the one string {value!r}")

    def tensors(self) -> list[InputTensor]:
        """The input tensors of all fields that are set."""
        tensors: list[InputTensor] = []
        for name, datatype in _PARAM_DATATYPES.items():
            value = getattr(self, name)
            if value is None:
                continue
            values = (value,) if isinstance(value, (int, float, str)) else tuple(value)
            if values:
                tensors.append(InputTensor(name, datatype, values))
        for name, (keys, values_of_keys) in _PAIRED_TENSORS.items():
            if bias := getattr(self, name):
                tensors.append(InputTensor(*keys, tuple(bias)))
                tensors.append(InputTensor(*values_of_keys, tuple(bias.values())))
        return tensors


@dataclass(frozen=True)
class InputTensor:
    """One input of the ensemble: shape [1, len(values)]; `datatype` as KServe spells it (strings are BYTES).

    Raises TypeError for a value of another type, ValueError for one that the datatype cannot hold.
    """

    name: str
    datatype: str
    values: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            _check_fits(self.name, self.datatype, value)

    def raw(self) -> bytes:
        """The content as KServe's little-endian bytes; each string is preceded by its length in four bytes."""
        if self.datatype == "BYTES":
            encoded = [str(value).encode() for value in self.values]
            return b"".join(struct.pack("<I", len(data)) + data for data in encoded)
        return struct.pack(f"<{len(self.values)}{_STRUCT_CODES[self.datatype]}", *self.values)

    def json_value(self) -> Scalar | list[Scalar]:
        """The content as `generate_stream` takes it: one element is a scalar."""
        return self.values[0] if len(self.values) == 1 else list(self.values)


def _check_fits(name: str, datatype: str, value: Scalar) -> None:
    """Refuses a value that `datatype` cannot hold; NOTE: bool is an int to Python, but not to a tensor."""
    if datatype == "BYTES":
        fitting = isinstance(value, str)
    elif datatype == "BOOL":
        fitting = isinstance(value, bool)
    elif datatype == "FP32":
        fitting = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fitting = isinstance(value, int) and not isinstance(value, bool)
    if not fitting:
        raise TypeError(f"{name}: {datatype} is wanted, not {type(value).__name__} {value!r:.80}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: not text that UTF-8 can hold: {error}") from error
        return
    if datatype == "FP32" and not abs(value) <= _FP32_MAX:  # not `>`: NaN is to be refused too
        raise ValueError(f"{name}: {value} is not a finite 32-bit float")
    if datatype in _INTEGER_BOUNDS:
        low, high = _INTEGER_BOUNDS[datatype]
        if not low <= value <= high:
            raise ValueError(f"{name}: {value} does not fit {datatype} ({low} to {high})")
