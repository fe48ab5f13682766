"""Request fields that chat and text completions share, and the tensors of the ensemble they become.

What no model here has is refused by name. The description of each field is what README.md's table says of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from client.gateway.errors import bad_request
from client.params import InputTensor, Scalar

MAX_CHOICES = 128
MAX_LOGPROBS = 20
_MAX_TOKENS = 2**31 - 1
_LEAST_TEMPERATURE = 0.01
_LEAST_TOP_P = 1e-6
_TOKEN_ID = re.compile(r"\d{1,9}")


class Model(BaseModel):
    """A JSON object whose keys are all known; numbers are numbers, never strings."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Model):
    """What a stream has besides its answer."""

    include_usage: bool | None = Field(None, description="a last chunk with the counts and no choices")


class SchemaFormat(Model):
    """The schema of `response_format` json_schema."""

    name: str = Field(max_length=64)
    description: str | None = None
    json_schema: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="enforced whatever it says")


class ResponseFormat(Model):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class GuidedFields(Model):
    """Guided decoding as vLLM and NIM name it."""

    guided_json: dict[str, JsonValue] | str | None = Field(None, description="the answer is JSON of this schema")
    guided_regex: str | None = Field(None, description="the answer matches this regular expression, whole")
    guided_choice: list[str] | None = Field(None, min_length=1, description="the answer is one of these texts")
    guided_grammar: str | None = Field(None, description="the answer follows this grammar (Lark or GBNF)")


class NvExt(GuidedFields):
    """NIM's way to send extensions; the same as beside it."""

    top_k: int | None = None
    repetition_penalty: float | None = None


class SharedFields(GuidedFields):
    """What both kinds of request have."""

    model: str = Field(description="a name the model is served under; another is refused with 404")
    stream: bool | None = Field(None, description="server-sent events that end in `[DONE]`")
    stream_options: StreamOptions | None = Field(None, description="`include_usage`; only with `stream`")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices, 1 to 128; they share the prompt's pages")
    max_tokens: int | None = Field(None, ge=0, le=_MAX_TOKENS, description="most tokens of a choice")
    temperature: float | None = Field(
        None, ge=0, le=2, description="default 1, as OpenAI's; 0 is greedy; between, at least 0.01 is used"
    )
    top_p: float | None = Field(None, ge=0, le=1, description="default 1; 0 keeps the likeliest token")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="over the answer, per occurrence")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="over the answer, once")
    logit_bias: dict[str, float] | None = Field(None, description="ids as keys, -100 to 100")
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1, description="same seed, same request: same answer")
    stop: str | list[str] | None = Field(None, description="texts the answer ends before; up to 64")
    top_k: int | None = Field(None, ge=-1, description="extension; 0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1, description="extension")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="extension; over prompt and answer")
    min_tokens: int | None = Field(None, ge=0, le=_MAX_TOKENS, description="extension; no end before")
    ignore_eos: bool | None = Field(None, description="extension; go on behind the end of the answer")
    stop_token_ids: list[int] | None = Field(None, description="extension; ids that end the answer")
    bad_words: list[str] | None = Field(None, description="extension; never said")
    priority: int | None = Field(None, ge=-1000, le=1000, description="extension; a lower number runs first")
    cache_salt: str | None = Field(None, max_length=256, description="extension; prefix pages shared only within it")
    nvext: NvExt | None = Field(None, description="NIM's place for `guided_*`, `top_k`, `repetition_penalty`")
    user: str | None = Field(None, description="accepted, has no effect")

    # Tensor and datatype of each field that is passed on as it is.
    _TENSORS: ClassVar[dict[str, tuple[str, str]]] = {
        "n": ("num_return_sequences", "INT32"),
        "frequency_penalty": ("frequency_penalty", "FP32"),
        "presence_penalty": ("presence_penalty", "FP32"),
        "min_p": ("min_p", "FP32"),
        "min_tokens": ("min_tokens", "INT32"),
        "ignore_eos": ("ignore_eos", "BOOL"),
        "stop_token_ids": ("stop_token_ids", "INT32"),
        "bad_words": ("bad_words", "BYTES"),
        "priority": ("priority", "INT32"),
        "cache_salt": ("cache_salt", "BYTES"),
    }

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def extension(self, name: str) -> Any:
        """A field that may also stand in `nvext`; both are refused."""
        value, other = getattr(self, name), getattr(self.nvext, name, None)
        if value is not None and other is not None:
            raise bad_request(f"nvext.{name}", f"is given twice, here and as {name}")
        return other if value is None else value

    def sampling_tensors(self) -> Iterator[InputTensor]:
        """How to draw and where to stop; ApiError for a value that no tensor can hold."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "is only allowed when stream is true")
        for name, (tensor, datatype) in self._TENSORS.items():
            value = getattr(self, name)
            # n = 1 is not sent: the answer then has a tensor less.
            if value not in (None, []) and (name, value) != ("n", 1):
                yield made_tensor(name, tensor, datatype, *(value if isinstance(value, list) else (value,)))
        temperature = 1.0 if self.temperature is None else self.temperature
        yield made_tensor(
            "temperature", "temperature", "FP32", max(_LEAST_TEMPERATURE, temperature) if temperature else 0.0
        )
        if self.top_p is not None:
            yield made_tensor("top_p", "top_p", "FP32", max(_LEAST_TOP_P, self.top_p))
        if (top_k := self.extension("top_k")) is not None:
            yield made_tensor("top_k", "top_k", "INT32", max(0, top_k))
        if (penalty := self.extension("repetition_penalty")) is not None:
            yield made_tensor("repetition_penalty", "repetition_penalty", "FP32", penalty)
        if self.seed is not None:
            yield made_tensor("seed", "seed", "UINT64", self.seed % 2**64)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops:
            yield made_tensor("stop", "stop_words", "BYTES", *stops)

    def biases(self) -> dict[int, float]:
        """`logit_bias` by id."""
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            if not _TOKEN_ID.fullmatch(key):
                raise bad_request("logit_bias", f"keys must be token ids, got {key[:40]!r}")
            if not -100 <= bias <= 100:
                raise bad_request("logit_bias", f"must be in [-100, 100], got {bias} for id {key}")
            biases[int(key)] = bias
        return biases


def made_tensor(param: str, name: str, datatype: str, *values: Scalar) -> InputTensor:
    """A tensor [1, n]; ApiError that names the parameter when a value does not fit."""
    try:
        return InputTensor(name, datatype, values)
    except (TypeError, ValueError) as error:
        raise bad_request(param, str(error).partition(": ")[2]) from None


def bias_tensors(biases: dict[int, float]) -> Iterator[InputTensor]:
    """`logit_bias` as the ensemble's two tensors."""
    if biases:
        yield made_tensor("logit_bias", "logit_bias_ids", "INT32", *biases)
        yield made_tensor("logit_bias", "logit_bias_values", "FP32", *biases.values())
