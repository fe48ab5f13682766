"""Counts of a request and why its choices ended, out of the last responses of its sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from client.gateway.errors import ApiError
from client.response import Response

_FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}


@dataclass
class Usage:
    """Tokens of the prompts and of all choices; the prompt of several choices counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, last: Response) -> None:
        """Take over the last response of a sequence."""
        self.completion_tokens += last.num_output_tokens or 0
        if last.sequence_index == 0:
            self.prompt_tokens += last.num_input_tokens or 0
            self.cached_tokens += last.num_cached_tokens or 0

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def finish_reason(response: Response) -> str | None:
    """OpenAI's word for an end (a deadline is a limit to it), None while it goes on; ApiError when it was taken back."""
    if not response.finish_reason:
        return None
    if response.finish_reason not in _FINISH_REASONS:
        raise ApiError(503, f"the answer was ended by the server: {response.finish_reason}", code="cancelled")
    return _FINISH_REASONS[response.finish_reason]
