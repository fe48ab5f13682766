"""Answers of `/v1/chat/completions`: pieces of the ensemble become deltas; deltas become chunks, or one message."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from client.gateway.chat_request import ChatPlan, ChatRequest
from client.gateway.ensemble import Piece
from client.gateway.log_probs import chat_entries
from client.gateway.tool_calls import TOOL_CALLS_ID, ToolCallReader, ToolEvent, new_call_id
from client.gateway.usage import Usage, finish_reason

Delta = dict[str, Any]


class ChatChoice:
    """One choice while it comes."""

    def __init__(self, request: ChatRequest, plan: ChatPlan) -> None:
        self._num_top = (request.top_logprobs or 0) if request.logprobs else None
        self._may_call = plan.tool_mode == "auto"
        self._reader = ToolCallReader(plan.max_calls) if plan.tool_mode != "off" else None
        self._is_calling = plan.tool_mode == "forced"
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None

    def take(self, piece: Piece) -> tuple[Delta, dict[str, Any] | None]:
        """What a piece adds to the message, and its log-probabilities if asked for."""
        response, delta = piece.response, Delta()
        if self._is_calling and self._reader is not None:
            self._add_events(delta, self._reader.feed(response.text))
        elif response.text:
            delta["content"] = response.text
        # The engine ends a response behind a control token, so what follows is in the next one.
        if self._may_call and TOOL_CALLS_ID in response.token_ids:
            self._is_calling = True
        reason = finish_reason(response)
        if reason is not None:
            self.stop_reason = response.stop_reason or None
            if self._is_calling and self._reader is not None:
                self._add_events(delta, self._reader.finish())
                reason = "tool_calls" if self._reader.num_calls and reason == "stop" else reason
            self.finish_reason = reason
        log_probs = None if self._num_top is None else {"content": chat_entries(piece.places, self._num_top)}
        return delta, log_probs

    def _add_events(self, delta: Delta, events: list[ToolEvent]) -> None:
        calls: list[dict[str, Any]] = []
        for event in events:
            if event.content:
                delta["content"] = delta.get("content", "") + event.content
            elif event.name:
                function = {"name": event.name, "arguments": ""}
                calls.append({"index": event.index, "id": new_call_id(), "type": "function", "function": function})
            elif calls and calls[-1]["index"] == event.index:
                calls[-1]["function"]["arguments"] += event.arguments
            else:
                calls.append({"index": event.index, "function": {"arguments": event.arguments}})
        if calls:
            delta["tool_calls"] = delta.get("tool_calls", []) + calls


class ChatAnswer:
    """All choices of one request."""

    def __init__(self, request: ChatRequest, plan: ChatPlan, answer_id: str, model: str) -> None:
        self._request = request
        self._head = {"id": answer_id, "object": "", "created": int(time.time()), "model": model}
        self._choices = [ChatChoice(request, plan) for _ in range(request.num_choices)]
        self.usage = Usage()

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each choice ended."""
        return [choice.finish_reason for choice in self._choices]

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[dict[str, Any], None]:
        """A chunk for each piece that says something; each choice begins with its role."""
        head = self._head | {"object": "chat.completion.chunk"}
        if self._request.has_usage_chunk:
            head["usage"] = None
        has_begun = [False] * len(self._choices)
        async for piece in pieces:
            index = piece.response.sequence_index
            choice = self._choices[index]
            delta, log_probs = choice.take(piece)
            if not has_begun[index]:
                delta = {"role": "assistant", "content": ""} | delta
                has_begun[index] = True
            if choice.finish_reason is not None:
                self.usage.add(piece.response)
            if delta or choice.finish_reason is not None or (log_probs and log_probs["content"]):
                made: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": choice.finish_reason}
                made["logprobs"] = log_probs
                if choice.finish_reason is not None:
                    made["stop_reason"] = choice.stop_reason
                yield head | {"choices": [made]}
        if self._request.has_usage_chunk:
            yield head | {"choices": [], "usage": self.usage.body()}

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """The whole answer as one object."""
        messages: list[dict[str, Any]] = [{"role": "assistant", "content": None} for _ in self._choices]
        log_probs: list[list[Any]] = [[] for _ in self._choices]
        async for piece in pieces:
            index = piece.response.sequence_index
            delta, found = self._choices[index].take(piece)
            _merge(messages[index], delta)
            log_probs[index] += found["content"] if found else []
            if self._choices[index].finish_reason is not None:
                self.usage.add(piece.response)
        choices = [
            {
                "index": index,
                "message": _finished(messages[index]),
                "logprobs": {"content": log_probs[index]} if self._request.logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self.usage.body()}


def _merge(message: dict[str, Any], delta: Delta) -> None:
    if "content" in delta:
        message["content"] = (message["content"] or "") + delta["content"]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in call:
            calls.append({name: value for name, value in call.items() if name != "index"})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def _finished(message: dict[str, Any]) -> dict[str, Any]:
    """An answer without calls has a content, if only an empty one."""
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message
