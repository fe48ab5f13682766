"""Answers of `/v1/completions`: pieces of all prompts' calls become chunks, or one object."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from client.gateway.completion_request import CompletionRequest
from client.gateway.ensemble import Call, Ensemble, Piece
from client.gateway.log_probs import CompletionLogProbs, Place
from client.gateway.usage import Usage, finish_reason

_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionChoice:
    """One choice while it comes."""

    def __init__(self, request: CompletionRequest) -> None:
        self._log_probs = None if request.logprobs is None else CompletionLogProbs(request.logprobs)
        self._is_scored = bool(request.echo) and self._log_probs is not None
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None

    def take(
        self, piece: Piece, prompt_places: list[Place | None] | None, first_text: str
    ) -> tuple[str, dict[str, Any] | None]:
        """What a piece adds: text, and log-probabilities if asked for (an echoed prompt's before its answer's)."""
        self.finish_reason = finish_reason(piece.response)
        if self.finish_reason is not None:
            self.stop_reason = piece.response.stop_reason or None
        if self._log_probs is None:
            return piece.response.text, None
        places: list[Place | None] = [*(prompt_places or ()), *piece.places] if self._is_scored else [*piece.places]
        return piece.response.text, self._log_probs.add(places, first_text)


class CompletionAnswer:
    """All choices of all prompts; those of prompt p are p * n to p * n + n - 1."""

    def __init__(
        self, request: CompletionRequest, calls: list[Call], ensemble: Ensemble, answer_id: str, model: str
    ) -> None:
        self._request = request
        self._ensemble = ensemble
        self._head = {"id": answer_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._choices = [CompletionChoice(request) for _ in range(len(calls) * request.num_choices)]
        # Of each prompt, kept for its further choices: the prompt's log-probabilities come once.
        self._scores: dict[int, tuple[list[Place | None], str]] = {}
        self.usage = Usage()

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each choice ended."""
        return [choice.finish_reason for choice in self._choices]

    async def chunks(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncGenerator[dict[str, Any], None]:
        """A chunk for each piece that says something."""
        head = self._head | ({"usage": None} if self._request.has_usage_chunk else {})
        async for prompt_index, piece in self._scored_first(pieces):
            choice = await self._take(prompt_index, piece)
            if choice["text"] or choice["finish_reason"] is not None or (choice["logprobs"] or {}).get("tokens"):
                yield head | {"choices": [choice]}
        if self._request.has_usage_chunk:
            yield head | {"choices": [], "usage": self.usage.body()}

    async def whole(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict[str, Any]:
        """The whole answer as one object."""
        choices: list[dict[str, Any]] = [{} for _ in self._choices]
        async for prompt_index, piece in self._scored_first(pieces):
            taken = await self._take(prompt_index, piece)
            choice = choices[taken["index"]]
            if not choice:
                choice |= taken
                continue
            choice["text"] += taken["text"]
            for name in _LISTS if taken["logprobs"] else ():
                choice["logprobs"][name] += taken["logprobs"][name]
            choice |= {name: taken[name] for name in ("finish_reason", "stop_reason")}
        return self._head | {"choices": choices, "usage": self.usage.body()}

    async def _scored_first(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces, but where an echoed prompt is scored, those with its scores before its other choices."""
        waiting: dict[int, list[Piece]] = {}
        is_scored = bool(self._request.echo) and self._request.logprobs is not None
        async for prompt_index, piece in pieces:
            if is_scored and piece.prompt_places is None and prompt_index not in self._scores:
                waiting.setdefault(prompt_index, []).append(piece)
                continue
            yield prompt_index, piece
            for held in waiting.pop(prompt_index, ()):
                yield prompt_index, held

    async def _take(self, prompt_index: int, piece: Piece) -> dict[str, Any]:
        response = piece.response
        if piece.prompt_places is not None and self._request.logprobs is not None:
            # Nothing stands before the first id, so it comes without a place, and its text is asked for.
            first_text = await self._ensemble.text(response.token_ids[:1], {})
            self._scores[prompt_index] = (piece.prompt_places, first_text)
        index = prompt_index * self._request.num_choices + response.sequence_index
        choice = self._choices[index]
        text, log_probs = choice.take(piece, *self._scores.get(prompt_index, (None, "")))
        if choice.finish_reason is not None:
            self.usage.add(response)
        return {
            "index": index,
            "text": text,
            "logprobs": log_probs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
