"""Counts the tokens of one answer and how fast they came."""

from __future__ import annotations

import time

from client.response import Response


class Meter:
    """Watches the responses of one request; the clock starts when it is made."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = self._started_s
        self._num_first_tokens = 0
        self._num_tokens = 0
        self._num_input_tokens: int | None = None
        self._num_cached_tokens: int | None = None
        self.finish_reasons: dict[int, str] = {}

    def add(self, response: Response) -> None:
        """Notes one response at the moment it came."""
        if response.token_ids:
            self._last_token_s = time.perf_counter()
            if self._first_token_s is None:
                self._first_token_s = self._last_token_s
                self._num_first_tokens = len(response.token_ids)
            self._num_tokens += len(response.token_ids)
        if response.finish_reason:
            self.finish_reasons[response.sequence_index] = response.finish_reason
            if response.stop_reason:
                self.finish_reasons[response.sequence_index] += f" at {response.stop_reason!r}"
            self._num_input_tokens = response.num_input_tokens
            self._num_cached_tokens = response.num_cached_tokens

    def summary(self) -> str:
        """One line: tokens in and out, time to first token, tokens per second after it, why it ended."""
        parts = [f"{self._num_tokens} output tokens"]
        if self._num_input_tokens is not None:
            cached = f" ({self._num_cached_tokens} cached)" if self._num_cached_tokens else ""
            parts.insert(0, f"{self._num_input_tokens} prompt tokens{cached}")
        if self._first_token_s is not None:
            parts.append(f"first token after {self._first_token_s - self._started_s:.3f} s")
            parts.append(f"{self._tokens_per_s():.1f} tokens/s")
        if self.finish_reasons:
            parts.append("finished: " + ", ".join(reason for _, reason in sorted(self.finish_reasons.items())))
        return ", ".join(parts)

    def _tokens_per_s(self) -> float:
        """Speed after the first response; of the whole when there was only one."""
        if self._first_token_s is not None and self._last_token_s > self._first_token_s:
            return (self._num_tokens - self._num_first_tokens) / (self._last_token_s - self._first_token_s)
        return self._num_tokens / max(self._last_token_s - self._started_s, 1e-9)
