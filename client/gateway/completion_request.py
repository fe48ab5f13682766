"""`/v1/completions`: the request, and the calls of the ensemble it becomes, one a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from client.gateway.ensemble import Call
from client.gateway.errors import bad_request
from client.gateway.fields import MAX_LOGPROBS, ResponseFormat, SharedFields, bias_tensors, made_tensor
from client.gateway.guides import Guide, requested_guide
from client.params import InputTensor

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for text completions
Prompt = str | list[int]


class CompletionRequest(SharedFields):
    """The body of a text completion."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, ids, or a list of either; a text gets a BOS in front, ids are taken as they are"
    )
    best_of: int | None = Field(None, ge=1, le=128, description="only the value of `n`")
    echo: bool | None = Field(None, description="the prompt before the answer; `max_tokens` 0 scores it")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="log-probabilities of the likeliest, 0 to 20")
    response_format: ResponseFormat | None = Field(None, description="extension; as in chats")
    suffix: Literal[""] | None = Field(None, description="not supported: null or empty")

    def prompts(self, most: int) -> list[Prompt]:
        """All prompts; ApiError for none, an empty one, or too many."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            found: list[Prompt] = [prompt]
        else:
            found = [*prompt]
        if not found or any(each == [] for each in found):
            raise bad_request("prompt", "must not be empty, and no list of ids in it")
        if len(found) > most:
            raise bad_request("prompt", f"may have at most {most} prompts, got {len(found)}")
        return found

    def check(self) -> None:
        """ApiError for fields that contradict each other."""
        if self.best_of not in (None, self.num_choices):
            raise bad_request(
                "best_of", f"must be n = {self.num_choices}, got {self.best_of}: no choices are thrown away"
            )
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens", "must be at least 1 without echo, got 0")


def plan_completion(request: CompletionRequest, max_prompts: int) -> list[Call]:
    """One call a prompt; ApiError for what cannot be meant."""
    request.check()
    guide = requested_guide(request, request.response_format)
    params = {"text_input": "prompt"} | (guide.params() if guide else {})
    shared = tuple(_shared_tensors(request, guide))
    return [Call((_prompt_tensor(prompt), *shared), params) for prompt in request.prompts(max_prompts)]


def _prompt_tensor(prompt: Prompt) -> InputTensor:
    if isinstance(prompt, str):
        return made_tensor("prompt", "text_input", "BYTES", prompt)
    return made_tensor("prompt", "prompt_token_ids", "INT32", *prompt)


def _shared_tensors(request: CompletionRequest, guide: Guide | None) -> Iterator[InputTensor]:
    yield from request.sampling_tensors()
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    yield made_tensor("max_tokens", "max_tokens", "INT32", max_tokens)
    yield from bias_tensors(request.biases())
    if request.echo:
        yield InputTensor("exclude_input_in_output", "BOOL", (False,))
    if request.logprobs is not None:
        # One alternative at least, since ids and bytes come along with them.
        yield InputTensor("num_logprobs", "INT32", (max(1, request.logprobs),))
    if request.echo and (request.logprobs is not None or max_tokens == 0):
        yield InputTensor("prompt_logprobs", "INT32", (max(1, request.logprobs or 0),))
    if guide is not None:
        yield from guide.tensors()
    # The prompt's log-probabilities come with the last response, so that they cannot stand first in a stream of several.
    is_scored = bool(request.echo) and request.logprobs is not None
    yield InputTensor("stream", "BOOL", (bool(request.stream) and not is_scored,))
