"""What a load run measured: counts, speeds and percentiles, as a table or as JSON."""

from __future__ import annotations

import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Grows while the load runs; tokens and responses count from every request, also from those that failed later."""

    num_streams: int
    num_prompt_tokens: int
    num_done: int = 0
    num_unfinished: int = 0
    num_responses: int = 0
    num_output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_token_s: array[float] = field(default_factory=lambda: array("d"))
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    _started_s: float = 0.0
    _started_cpu_s: float = 0.0
    _wall_s: float | None = None
    _cpu_s: float = 0.0

    def start(self) -> None:
        """Starts the clocks."""
        self._started_s, self._started_cpu_s = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stops the clocks."""
        self._wall_s, self._cpu_s = self.wall_s, time.process_time() - self._started_cpu_s

    def add_response(self, num_tokens: int, waited_s: float, is_first: bool) -> None:
        """Notes a response with tokens, `waited_s` after the request (the first) or after the response before it."""
        self.num_responses += 1
        self.num_output_tokens += num_tokens
        (self.first_token_s if is_first else self.gaps_s).append(waited_s)

    def add_failure(self, kind: str) -> None:
        """Notes a request that did not come back whole."""
        self.errors[kind] += 1

    @property
    def num_failed(self) -> int:
        """Requests that did not come back whole."""
        return self.errors.total()

    @property
    def wall_s(self) -> float:
        """Seconds from start to end, or to now."""
        return time.perf_counter() - self._started_s if self._wall_s is None else self._wall_s

    def progress(self, num_requests: int) -> str:
        """One line about the run so far."""
        return (
            f"{self.wall_s:6.1f} s  {self.num_done}/{num_requests} requests, {self.num_failed} failed, "
            f"{self.num_output_tokens / max(self.wall_s, 1e-9):.0f} tokens/s"
        )

    def numbers(self) -> dict[str, float | int | None]:
        """Every number by name, units in the name; None where nothing was measured."""
        wall_s = max(self.wall_s, 1e-9)
        return {
            "streams": self.num_streams,
            "prompt_tokens": self.num_prompt_tokens,
            "requests_done": self.num_done,
            "requests_failed": self.num_failed,
            "requests_unfinished": self.num_unfinished,
            "wall_s": round(wall_s, 3),
            "output_tokens": self.num_output_tokens,
            "responses": self.num_responses,
            "tokens_per_s": round(self.num_output_tokens / wall_s, 1),
            "responses_per_s": round(self.num_responses / wall_s, 1),
            "tokens_per_response": _ratio(self.num_output_tokens, self.num_responses),
            "first_token_p50_ms": percentile_ms(self.first_token_s, 50),
            "first_token_p90_ms": percentile_ms(self.first_token_s, 90),
            "first_token_p99_ms": percentile_ms(self.first_token_s, 99),
            "gap_p50_ms": percentile_ms(self.gaps_s, 50),
            "gap_p99_ms": percentile_ms(self.gaps_s, 99),
            "client_cpu_s": round(self._cpu_s, 3),
            "client_cpu_us_per_response": _ratio(self._cpu_s * 1e6, self.num_responses),
        }

    def as_json(self) -> str:
        """One JSON object: the numbers, and the failures by kind under `errors`."""
        return json.dumps({**self.numbers(), "errors": dict(self.errors.most_common())})

    def as_table(self) -> str:
        """One line per number, then one per kind of failure."""
        lines = [f"{name:28}{'-' if value is None else value:>14}" for name, value in self.numbers().items()]
        lines += [f"{count} x {kind}" for kind, count in self.errors.most_common()]
        return "\n".join(lines)


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile in milliseconds: the smallest value that `percent` of all do not exceed.

    >>> percentile_ms([0.4, 0.1, 0.2, 0.3], 50)
    200.0
    """
    if not seconds:
        return None
    rank = max(math.ceil(len(seconds) * percent / 100), 1)
    return round(sorted(seconds)[rank - 1] * 1e3, 3)


def _ratio(value: float, count: int) -> float | None:
    return round(value / count, 2) if count else None
