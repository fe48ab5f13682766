"""`/v1/chat/completions`: the request, and the call of the ensemble it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, JsonValue

from client.gateway.ensemble import Call, Ensemble
from client.gateway.errors import bad_request
from client.gateway.fields import MAX_LOGPROBS, Model, ResponseFormat, SharedFields, bias_tensors, made_tensor
from client.gateway.guides import Guide, json_text, requested_guide, tool_call_guide
from client.gateway.tool_calls import TOOL_CALLS_ID
from client.params import InputTensor

# Prompts are `messages` here, whatever the ensemble makes of them.
_PARAMS = {"prompt_token_ids": "messages", "text_input": "messages", "num_logprobs": "top_logprobs"}


class ToolFunction(Model):
    """A function the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Model):
    """One tool offered to the model."""

    type: Literal["function"]
    function: ToolFunction


class FunctionName(Model):
    """Names a function."""

    name: str


class NamedTool(Model):
    """`tool_choice` of one function."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(SharedFields):
    """The body of a chat completion."""

    messages: list[dict[str, JsonValue]] = Field(
        min_length=1, description="system, developer, user, assistant (also `prefix`), tool; text content only"
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="newer name of `max_tokens`")
    logprobs: bool | None = Field(None, description="log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="and of the likeliest, 0 to 20")
    tools: list[Tool] | None = Field(
        None, max_length=128, description="functions; `strict` true only where the call is enforced (`tool_choice`)"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="required and a named function are enforced by guided decoding"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    response_format: ResponseFormat | None = Field(None, description="text, json_object, json_schema: enforced")
    metadata: dict[str, str] | None = Field(None, description="accepted, has no effect")
    store: Literal[False] | None = Field(None, description="false: nothing is stored")
    service_tier: Literal["auto", "default"] | None = Field(None, description="accepted, has no effect")
    safety_identifier: str | None = Field(None, description="accepted, has no effect")
    prompt_cache_key: str | None = Field(None, description="accepted, has no effect: equal beginnings are found anyway")
    modalities: list[Literal["text"]] | None = Field(None, description="text only")

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools the model is told of: none with `tool_choice` none."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools one of which must be called: those of required, or the named one."""
        if self.tool_choice == "required":
            return self.offered_tools
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.offered_tools if tool.function.name == self.tool_choice.function.name]
        return []

    def check(self) -> None:
        """ApiError for fields that contradict each other."""
        if self.max_tokens == 0:
            raise bad_request("max_tokens", "must be at least 1, got 0")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_request("max_completion_tokens", "is another name of max_tokens, which is given and differs")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs", "needs logprobs to be true")
        if self.tools == []:
            raise bad_request("tools", "must have at least one tool, got none")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise bad_request("tool_choice", "needs tools")
        if isinstance(self.tool_choice, NamedTool) and not self.forced_tools:
            raise bad_request(
                "tool_choice", f"{self.tool_choice.function.name[:64]!r} is the name of none of the tools"
            )
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise bad_request("tools", "names must differ")
        if not self.forced_tools:
            for index, tool in enumerate(self.offered_tools):
                if tool.function.strict:
                    raise bad_request(
                        f"tools[{index}].function.strict",
                        "true is enforced only with tool_choice required or a named function",
                    )


@dataclass(frozen=True)
class ChatPlan:
    """How a chat request is carried out."""

    call: Call
    tool_mode: Literal["off", "auto", "forced"]
    max_calls: int | None


async def plan_chat(request: ChatRequest, ensemble: Ensemble) -> ChatPlan:
    """The call that answers a request; ApiError for what cannot be meant.

    Calls that are forced begin behind a [TOOL_CALLS] in the prompt, as the model was trained to write them; a guide alone
    could not write that control token.
    """
    request.check()
    guide, mode = requested_guide(request, request.response_format), "off"
    if request.offered_tools:
        mode = "forced" if request.forced_tools else "auto"
        if guide is not None:
            raise bad_request(guide.param, "cannot be combined with tools, unless tool_choice is none")
    prompt = list(_prompt_tensors(request))
    if mode == "forced":
        guide = tool_call_guide(
            [(tool.function.name, tool.function.parameters) for tool in request.forced_tools],
            is_parallel=request.parallel_tool_calls is not False,
        )
        ids = await ensemble.token_ids(prompt, _PARAMS)
        prompt = [InputTensor("prompt_token_ids", "INT32", (*ids, TOOL_CALLS_ID))]
    tensors = (*prompt, *_other_tensors(request, guide, mode))
    return ChatPlan(
        Call(tensors, _PARAMS | (guide.params() if guide else {})),
        mode,  # type: ignore[arg-type]
        1 if request.parallel_tool_calls is False else None,
    )


def _prompt_tensors(request: ChatRequest) -> Iterator[InputTensor]:
    yield made_tensor("messages", "messages", "BYTES", json_text(request.messages))
    if request.offered_tools:
        # `strict` is dealt with here; the template has no place for it.
        tools: list[dict[str, Any]] = [tool.model_dump(exclude_none=True) for tool in request.offered_tools]
        for tool in tools:
            tool["function"].pop("strict", None)
        yield made_tensor("tools", "tools", "BYTES", json_text(tools))


def _other_tensors(request: ChatRequest, guide: Guide | None, mode: str) -> Iterator[InputTensor]:
    yield from request.sampling_tensors()
    max_tokens = request.max_tokens or request.max_completion_tokens
    if max_tokens is not None:
        yield made_tensor("max_tokens", "max_tokens", "INT32", max_tokens)
    biases = request.biases()
    if request.tool_choice == "none" and request.tools and guide is None:
        biases[TOOL_CALLS_ID] = -100.0
    yield from bias_tensors(biases)
    if request.logprobs:
        # One alternative at least, since ids and bytes come along with them.
        yield made_tensor("top_logprobs", "num_logprobs", "INT32", max(1, request.top_logprobs or 0))
    if guide is not None:
        yield from guide.tensors()
    # Only a stream keeps the place of [TOOL_CALLS] in the text.
    yield InputTensor("stream", "BOOL", (bool(request.stream) or mode == "auto",))
