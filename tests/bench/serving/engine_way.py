"""Our engine without Triton: in its own process as it is served, or on the emulator in a thread of this one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from backend.checkpoint.model_config import ModelConfig
from backend.engine import messages
from backend.engine.engine import Engine
from backend.engine.engine_process import EngineProcess
from backend.engine.events import EngineStats, Event, FailureKind
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.settings import Settings
from kernels.launch import Device
from tests.bench.gpu.models import pages_for, random_runner
from tests.bench.serving.way import Progress, ProgressQueue, ServingError

_IDLE_TIMEOUT_S = 60.0
_IDLE_POLL_S = 0.02
OnStep = Callable[[messages.Step], None]


class Requests(Protocol):
    """What EngineProcess and Engine have in common."""

    def submit(self, request: GenerationRequest) -> None: ...
    def abort(self, handle: int) -> None: ...
    def note_sent(self, counts: dict[int, int]) -> None: ...


class EngineWay:
    """Requests straight to an engine, which `start` makes: it gets what to call with each step and with the reason of a death.

    Ids are drawn at temperature 1, each request with a seed of its own.
    """

    def __init__(self, start: Callable[[OnStep, Callable[[str], None]], tuple[Requests, Callable[[], None]]]) -> None:
        self._queue = ProgressQueue()
        self._stats: EngineStats | None = None
        self._engine: Requests
        self._is_started = threading.Event()
        self._engine, self._close = start(self._on_step, lambda reason: self._queue.put(ServingError(reason)))
        self._is_started.set()

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Prompt tokens that the prefix cache has had so far."""
        return self._stats.num_prefix_hit_tokens if self._stats is not None else 0

    def submit(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Begin one."""
        sampling = SamplingParams(temperature=1.0, seed=handle)
        self._engine.submit(
            GenerationRequest(handle, "", prompt, max_tokens, sampling=sampling, ignore_eos=True, stream=True)
        )

    def take_back(self, handle: int) -> None:
        """Abort it."""
        self._engine.abort(handle)

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        """What the engine said."""
        return self._queue.take(timeout_s)

    def wait_until_idle(self) -> None:
        """Until the engine says that nothing runs or waits; ServingError when it does not."""
        end_s = time.monotonic() + _IDLE_TIMEOUT_S
        while (stats := self._stats) is not None and stats.num_requests_running + stats.num_requests_waiting:
            if time.monotonic() > end_s:
                raise ServingError(f"the engine is not idle after {_IDLE_TIMEOUT_S:g} s: {stats}")
            time.sleep(_IDLE_POLL_S)

    def close(self) -> None:
        """End the engine."""
        self._close()

    def _on_step(self, step: messages.Step) -> None:
        now_s = time.perf_counter()
        news = [Progress(each.handle, len(each.token_ids), now_s, each.is_request_end) for each in step.tokens]
        for failure in step.failed:
            if failure.kind is not FailureKind.CANCELLED:
                self._queue.put(ServingError(f"a request failed: {failure.message}"))
        sent: Counter[int] = Counter()
        for handle, num_tokens, _, _ in news:
            sent[handle] += num_tokens
        self._stats = step.stats
        if news:
            self._queue.put(news)
            self._is_started.wait()
            self._engine.note_sent(dict(sent))


def engine_in_its_process(settings: Settings) -> EngineWay:
    """As it is served, under `settings`; ConfigError or EngineFailure when it cannot be started."""

    def start(on_step: OnStep, on_death: Callable[[str], None]) -> tuple[Requests, Callable[[], None]]:
        process = EngineProcess(settings, on_step, on_death)
        process.start(lambda _: None)
        return process, process.close

    return EngineWay(start)


def emulated_engine(config: ModelConfig, device: Device, settings: dict[str, str]) -> EngineWay:
    """The CUDA runner with a random model on `device`, the emulator, in a thread of this process.

    Of the settings: max_num_seqs, max_model_len, max_step_tokens.
    """

    def start(on_step: OnStep, on_death: Callable[[str], None]) -> tuple[Requests, Callable[[], None]]:
        max_num_seqs, max_model_len, max_step_tokens = (
            int(settings[name]) for name in ("max_num_seqs", "max_model_len", "max_step_tokens")
        )
        sizes: dict[str, Any] = {"num_pages": max_num_seqs * pages_for(max_model_len), "max_num_seqs": max_num_seqs}
        sizes["max_step_tokens"] = max_step_tokens
        runner = random_runner(config, device, **sizes, max_model_len=max_model_len)
        limits = SchedulerLimits(**sizes, max_queued_requests=max_num_seqs, caches_outputs=runner.caches_outputs)

        def emit(events: list[Event], stats: EngineStats) -> None:
            on_step(messages.Step.of(events, stats))

        token_bytes = tuple(bytes([number % 256]) for number in range(config.vocab_size))
        engine = Engine(Scheduler(limits, token_bytes, eos_id=2), runner, emit)

        def run() -> None:
            try:
                engine.run()
            except Exception as error:  # the load is to say it, not this thread
                on_death(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=run, name="emulated-engine", daemon=True)
        thread.start()

        def close() -> None:
            engine.stop()
            thread.join()
            runner.close()

        return engine, close

    return EngineWay(start)


def settings_for(checkpoint: Path, values: dict[str, str]) -> Settings:
    """The settings that the server has with these values."""
    return Settings.load(values | {"checkpoint": str(checkpoint)}, {})
