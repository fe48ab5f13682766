"""One server kept busy for long, by every way in, while what each of its processes holds is sampled: `make soak MINUTES=30`.

Memory, open files and threads must not grow. How fast they do is the slope of a line by least squares through the samples after
the warm-up, in which caches, pools and connections reach their size; and every answer is still the one that came alone.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.triton.live_server import LiveServer
from tests.triton.soak_call import Call, Truth
from tests.triton.soak_run import SoakReport, make_truths, soak
from tests.triton.usage import QUANTITIES, History, UsageSampler

SETTINGS: dict[str, Any] = {
    "kv_cache_tokens": "2048",
    "kv_swap_ratio": "4",
    "max_num_seqs": "16",
    "max_step_tokens": "128",
}
"""32 pages for 16 sequences of up to 6: sometimes some are pushed out."""
NUM_TRUTHS = 60
GATEWAY_AT_ONCE = 4
WARM_UP_S = 180.0
"""But at most a third of the whole."""
MOST_GROWTH = {"rss_mb": 32.0, "open_files": 20.0, "threads": 10.0}
"""An hour, of one process. A slope within three standard errors of none is no growth."""
_GATEWAY_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class LongSoakReport:
    """What happened, what the processes held, and everything that was not as it must be."""

    soak: SoakReport
    num_gateway_calls: int
    warm_up_s: float
    histories: dict[str, History]
    problems: tuple[str, ...]

    def numbers(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "soak": self.soak.numbers(),
            "num_gateway_calls": self.num_gateway_calls,
            "warm_up_s": self.warm_up_s,
            "processes": {name: history.numbers(self.warm_up_s) for name, history in self.histories.items()},
            "problems": self.problems,
        }

    def __str__(self) -> str:
        lines = [str(self.soak), f"{self.num_gateway_calls} requests through the gateway beside them"]
        lines.append(f"{'growth an hour':24}{'MB':>20}{'open files':>20}{'threads':>20}{'MB at the end':>16}")
        for name, history in sorted(self.histories.items()):
            slopes = [history.slope(quantity, self.warm_up_s) for quantity in QUANTITIES]
            cells = "".join(f"{slope.per_hour:+10.1f} +- {slope.error_per_hour:5.1f}" for slope in slopes)
            lines.append(f"{name:24}{cells}{history.values['rss_mb'][-1]:16.0f}")
        return "\n".join([*lines, *self.problems])


def long_soak(checkpoint: Path, folder: Path, seed: int, at_once: int, seconds: float) -> LongSoakReport:
    """Keep a server of its own busy for so long; it must end as it promises."""
    warm_up_s = min(WARM_UP_S, seconds / 3)
    server = LiveServer(checkpoint, folder / "long", has_gateway=True, **SETTINGS)
    try:
        server.start().wait_until_ready()
        server.wait_until_gateway_ready()
        truths = make_truths(server, seed, NUM_TRUTHS, progress=True)
        print(f"soak for {seconds:.0f} s: {SETTINGS}", file=sys.stderr, flush=True)
        load = _GatewayLoad(server)
        with UsageSampler(server) as sampler:
            calls = _calls_for(seconds, truths, seed)
            report = soak(server, calls, at_once, 2 * seconds + 600, progress=True, beside=load)
        server.stop()
    finally:
        server.kill_everything()
    problems = [*report.problems, *load.problems, *growth_of(sampler.histories, warm_up_s)]
    return LongSoakReport(report, load.num_calls, warm_up_s, sampler.histories, tuple(problems))


def growth_of(histories: dict[str, History], warm_up_s: float) -> list[str]:
    """What grows faster than it may."""
    problems = []
    for name, history in histories.items():
        for quantity, most in MOST_GROWTH.items():
            slope = history.slope(quantity, warm_up_s)
            if slope.per_hour > most and slope.per_hour > 3 * slope.error_per_hour:
                problems.append(f"{name}: {quantity} grows by {slope.per_hour:.1f} an hour, at most {most:g}")
    return problems


def _calls_for(seconds: float, truths: Sequence[Truth], seed: int) -> Iterator[Call]:
    """Calls of random requests, until the time is over."""
    rng, end_s = random.Random(seed), time.monotonic() + seconds
    return itertools.takewhile(
        lambda _: time.monotonic() < end_s,
        (Call.draw(rng, number, rng.choice(truths)) for number in itertools.count()),
    )


class _GatewayLoad:
    """The same completion again and again through the gateway, streamed and not."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(GATEWAY_AT_ONCE)
        self._lock = threading.Lock()
        self.num_calls = 0
        self.problems: list[str] = []
        self._expected = self._complete(is_streamed=False)

    def start(self) -> None:
        """Ask until `end`."""
        for _ in range(GATEWAY_AT_ONCE):
            self._pool.submit(self._run, self._expected)

    def end(self) -> int:
        """Ask nothing more; the number of requests that were."""
        self._is_over.set()
        self._pool.shutdown()
        return self.num_calls

    def _run(self, expected: str) -> None:
        for number in itertools.count():
            if self._is_over.is_set():
                return
            try:
                text = self._complete(is_streamed=number % 2 == 0)
                assert text == expected, f"another text: {text!r}"
            except Exception as error:  # whatever it is, it is an answer that is not right
                self.problems.append(f"gateway: {type(error).__name__}: {error}")
            with self._lock:
                self.num_calls += 1

    def _complete(self, *, is_streamed: bool) -> str:
        body = {"model": "mistral-nemo", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
        connection = http.client.HTTPConnection("127.0.0.1", self._server.openai_port, timeout=_GATEWAY_TIMEOUT_S)
        try:
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(body | {"stream": is_streamed}),
                {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            content = response.read().decode()
        finally:
            connection.close()
        assert response.status == 200, content
        if not is_streamed:
            return str(json.loads(content)["choices"][0]["text"])
        *events, done = [event.removeprefix("data: ") for event in content.split("\n\n") if event]
        assert done == "[DONE]", content
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)
