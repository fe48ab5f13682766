"""The engine as a process of its own: start, streams, aborts, signals, and every way in which either side can die."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backend.checkpoint.vocabulary import read_vocabulary
from backend.engine import engine_process, messages
from backend.engine.engine_process import EngineProcess
from backend.engine.events import FailureKind, Finish, FinishReason, RequestFailed, TokenEvent
from backend.engine.request import GenerationRequest, GuideSpec, SamplingParams
from backend.errors import ConfigError, EngineFailure
from backend.settings import Settings
from backend.text.detokenizer import cut_text
from tests.checkpoints import make_checkpoint, write_tekken

TIMEOUT_S = 30.0
FIRST_ID = 1000
NUM_KV_TOKENS = 2**22
LONG = 2**20


def fake_settings(checkpoint: Path, **changes: Any) -> Settings:
    settings = Settings(checkpoint=str(checkpoint), runner="fake", log_level="warning", kv_cache_tokens=NUM_KV_TOKENS)
    return replace(settings, **changes)


def ask(handle: int, max_tokens: int = 5, **changes: Any) -> GenerationRequest:
    request = GenerationRequest(
        handle=handle,
        request_id="",
        prompt_token_ids=(FIRST_ID + 65,) * 3,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=1.0, seed=handle),
        deadline_ms=60_000,
    )
    return replace(request, **changes)


class Owner:
    """An engine process and everything it said.

    By handle: an engine that costs nothing takes tens of thousands of steps a second, and a search through all of them at
    each would fall behind for good.
    """

    def __init__(self, settings: Settings) -> None:
        self.deaths: list[str] = []
        self.events: defaultdict[int, list[TokenEvent]] = defaultdict(list)
        self.finishes: dict[int, Finish] = {}
        self.failed: list[RequestFailed] = []
        self.progress: list[messages.Loading] = []
        self.last_stats: Any = None
        self._changed = threading.Condition()
        self.engine = EngineProcess(settings, self._on_step, self._on_death)
        self.ready = self.engine.start(self.progress.append)

    def _on_step(self, step: messages.Step) -> None:
        with self._changed:
            for event in step.tokens:
                self.events[event.handle].append(event)
                if event.finish is not None:
                    self.finishes.setdefault(event.handle, event.finish)
            self.failed += step.failed
            self.last_stats = step.stats
            self._changed.notify_all()

    def _on_death(self, reason: str) -> None:
        with self._changed:
            self.deaths.append(reason)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, TIMEOUT_S), "the engine process did not get there"

    def of(self, handle: int) -> list[TokenEvent]:
        return self.events[handle]

    def finish(self, handle: int) -> Finish | None:
        return self.finishes.get(handle)

    def wait_for_finish(self, handle: int) -> Finish:
        self.wait_for(lambda: self.finish(handle))
        finish = self.finish(handle)
        assert finish is not None
        return finish


@contextmanager
def owning(settings: Settings) -> Iterator[Owner]:
    owner = Owner(settings)
    try:
        yield owner
    finally:
        owner.engine.close()


@pytest.fixture(scope="module")
def shared(tekken_checkpoint: Path) -> Iterator[Owner]:
    """One engine for the tests that leave it as they found it; handles differ by test."""
    with owning(fake_settings(tekken_checkpoint)) as owner:
        yield owner
        assert owner.deaths == []


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while is_running(pid):
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.01)


def test_ready_tells_the_bounds(shared: Owner) -> None:
    assert (shared.ready.vocab_size, shared.ready.max_num_seqs, shared.ready.num_pages) == (
        1400,
        256,
        NUM_KV_TOKENS // 64,
    )
    assert shared.ready.max_model_len <= shared.ready.num_pages * 64
    assert shared.ready.description["runner"] == "fake"


def test_a_stream_comes_back_whole(shared: Owner, tekken_checkpoint: Path) -> None:
    shared.engine.submit(ask(2**64 - 1, max_tokens=40, echo=True))
    finish = shared.wait_for_finish(2**64 - 1)
    events = shared.of(2**64 - 1)
    ids = [token_id for event in events for token_id in event.token_ids]
    assert ids[:3] == [FIRST_ID + 65] * 3
    assert (finish.reason, finish.num_output_tokens, len(ids)) == (FinishReason.LENGTH, 40, 43)
    token_bytes = read_vocabulary(tekken_checkpoint).token_bytes
    text = "".join(cut_text(token_bytes, *event.text) for event in events)
    assert text == b"".join(token_bytes[token_id] for token_id in ids).decode()


def test_aborts_by_handle_and_by_request_id(shared: Owner) -> None:
    shared.engine.submit(ask(11, max_tokens=LONG))
    shared.engine.submit(ask(12, max_tokens=LONG, request_id="mine"))
    shared.wait_for(lambda: shared.of(11) and shared.of(12))
    shared.engine.abort(11)
    assert shared.wait_for_finish(11).reason is FinishReason.CANCELLED
    assert shared.finish(12) is None
    shared.engine.abort_request_id("mine")
    assert shared.wait_for_finish(12).reason is FinishReason.CANCELLED


def test_the_load_is_told_when_the_engine_becomes_idle(shared: Owner) -> None:
    shared.engine.submit(ask(21, max_tokens=3))
    shared.wait_for_finish(21)
    shared.wait_for(lambda: shared.last_stats.num_pages_held == 0)
    assert (shared.last_stats.num_requests_running, shared.last_stats.num_requests_waiting) == (0, 0)


def test_an_interrupt_is_ignored(shared: Owner) -> None:
    os.kill(shared.engine.pid, signal.SIGINT)
    shared.engine.submit(ask(31))
    assert shared.wait_for_finish(31).num_output_tokens == 5


def test_the_engine_has_a_process_group_of_its_own_in_its_owners_session(shared: Owner) -> None:
    assert os.getpgid(shared.engine.pid) == shared.engine.pid != os.getpgid(0)
    assert os.getsid(shared.engine.pid) == os.getsid(0)


def test_sigterm_takes_everything_back_and_the_engine_goes_on(tekken_checkpoint: Path) -> None:
    with owning(fake_settings(tekken_checkpoint, max_num_seqs=1)) as owner:
        owner.engine.submit(ask(1, max_tokens=LONG))
        owner.wait_for(lambda: owner.of(1))
        owner.engine.submit(ask(2))
        owner.wait_for(lambda: owner.last_stats.num_requests_waiting == 1)
        os.kill(owner.engine.pid, signal.SIGTERM)
        assert owner.wait_for_finish(1).reason is FinishReason.CANCELLED
        owner.wait_for(lambda: owner.failed)
        assert [(failed.handle, failed.kind) for failed in owner.failed] == [(2, FailureKind.CANCELLED)]
        owner.engine.submit(ask(3))
        assert owner.wait_for_finish(3).reason is FinishReason.LENGTH


def test_a_full_queue_is_refused(tekken_checkpoint: Path) -> None:
    with owning(fake_settings(tekken_checkpoint, max_num_seqs=1, max_queued_requests=1)) as owner:
        owner.engine.submit(ask(1, max_tokens=LONG))
        owner.wait_for(lambda: owner.of(1))
        owner.engine.submit(ask(2))
        owner.engine.submit(ask(3))
        owner.wait_for(lambda: owner.failed)
        assert [(failed.handle, failed.kind) for failed in owner.failed] == [(3, FailureKind.QUEUE_FULL)]


def test_a_killed_engine_is_noticed_with_its_signal(tekken_checkpoint: Path) -> None:
    with owning(fake_settings(tekken_checkpoint)) as owner:
        owner.engine.submit(ask(1, max_tokens=LONG))
        owner.wait_for(lambda: owner.of(1))
        os.kill(owner.engine.pid, signal.SIGKILL)
        owner.wait_for(lambda: owner.deaths)
        with pytest.raises(EngineFailure, match="the engine is not running"):
            owner.engine.submit(ask(2))
        owner.engine.abort(1)
        owner.engine.abort_request_id("mine")
    assert owner.deaths == ["the engine ended, killed by signal 9 (Killed)"]


def test_a_failing_listener_counts_as_the_death_of_the_engine(tekken_checkpoint: Path) -> None:
    with owning(fake_settings(tekken_checkpoint)) as owner:
        owner.engine._on_step = lambda _: [][0]
        owner.engine.submit(ask(1))
        owner.wait_for(lambda: owner.deaths)
        wait_until_gone(owner.engine.pid)
    assert owner.deaths == ["the engine ended, IndexError: list index out of range"]


def test_a_thread_that_fails_ends_the_engine(tekken_checkpoint: Path) -> None:
    """What cannot be read kills the thread that reads: without it, requests would wait for ever."""
    with owning(fake_settings(tekken_checkpoint)) as owner:
        owner.engine._connection.send_bytes(b"no message")
        owner.wait_for(lambda: owner.deaths)
        wait_until_gone(owner.engine.pid)
    assert owner.deaths[0].startswith("the engine ended, exit status ")


def test_close_leaves_nothing_behind(tekken_checkpoint: Path) -> None:
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with owning(fake_settings(tekken_checkpoint)) as owner:
        owner.engine.submit(ask(1, max_tokens=LONG))
        owner.wait_for(lambda: owner.of(1))
    assert owner.engine._process.returncode >= 0, "the engine did not end by itself"
    assert owner.deaths == []
    assert not is_running(owner.engine.pid)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)


def test_the_death_of_the_owner_kills_even_a_stuck_engine(tekken_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.owner", str(tekken_checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        engine_pid = int(owner.stdout.readline())
        os.kill(engine_pid, signal.SIGSTOP)  # stuck, as in a device call: it cannot see the end of its connection
        owner.kill()
    try:
        wait_until_gone(engine_pid)
    finally:
        if is_running(engine_pid):
            os.kill(engine_pid, signal.SIGKILL)


def test_an_engine_that_is_stopped_is_killed_and_told(tekken_checkpoint: Path) -> None:
    assert engine_process._WATCH_PERIOD_S * engine_process._MOST_SILENT_PERIODS < 10, "promised within ten seconds"
    with owning(fake_settings(tekken_checkpoint)) as owner:
        owner.engine.submit(ask(1, max_tokens=LONG))
        owner.wait_for(lambda: owner.of(1))
        os.kill(owner.engine.pid, signal.SIGSTOP)
        owner.wait_for(lambda: owner.deaths)
        wait_until_gone(owner.engine.pid)
    assert owner.deaths == ["the engine ended, it was stuck and was killed: it said nothing for 7 s"]


def test_an_engine_whose_step_is_stuck_is_killed(tekken_checkpoint: Path) -> None:
    """The process is alive and says so; only its loop hangs, as in a device call that never returns."""
    with owning(fake_settings(tekken_checkpoint)) as owner:
        owner.engine._step_timeout_s = -1.0  # every turn takes too long, an idle one too
        owner.wait_for(lambda: owner.deaths)
        wait_until_gone(owner.engine.pid)
    (death,) = owner.deaths
    assert death.startswith("the engine ended, it was stuck and was killed: its current step takes longer than")


def test_an_idle_engine_is_left_alone(tekken_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports once a second, so eight periods of half a second hold several reports."""
    monkeypatch.setattr(engine_process, "_WATCH_PERIOD_S", 0.5)
    monkeypatch.setattr(engine_process, "_MOST_SILENT_PERIODS", 8)
    with owning(fake_settings(tekken_checkpoint)) as owner:
        time.sleep(5)
        owner.engine.submit(ask(1))
        assert owner.wait_for_finish(1).num_output_tokens == 5
    assert owner.deaths == []


def has_ended(owner: Owner, handle: int) -> bool:
    return any(event.is_request_end for event in owner.of(handle))


def test_priority_salt_and_samples_reach_the_engine(shared: Owner) -> None:
    prompt = (FIRST_ID + 65,) * 130
    for handle, salt in ((41, "a"), (42, "a"), (43, "b")):
        shared.engine.submit(ask(handle, prompt_token_ids=prompt, cache_salt=salt, priority=-1, num_return_sequences=2))
        shared.wait_for(partial(has_ended, shared, handle))
    cached = {
        (event.handle, event.sequence_index): event.finish.num_cached_tokens
        for handle in (41, 42, 43)
        for event in shared.of(handle)
        if event.finish is not None
    }
    assert [cached[handle, 0] for handle in (41, 42, 43)] == [0, 128, 0]
    assert [cached[handle, 1] for handle in (41, 42, 43)] == [128, 128, 128]


def test_a_grammar_is_refused_by_a_runner_that_knows_none(shared: Owner) -> None:
    shared.engine.submit(ask(51, guide=GuideSpec("regex", "a+")))
    shared.wait_for(lambda: any(failed.handle == 51 for failed in shared.failed))
    (failed,) = [failed for failed in shared.failed if failed.handle == 51]
    assert (failed.kind, failed.message) == (
        FailureKind.INVALID,
        "guided_decoding_guide_type: this runner cannot follow a grammar; leave it out",
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "is not a folder"),
        ("another vocabulary", "the tokenizer has 1300 tokens, the model's vocabulary 1400; they belong to different"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_in_the_engines_words(
    tmp_path: Path, damage: str, message: str
) -> None:
    folder = tmp_path / "checkpoint"
    if damage == "another vocabulary":
        make_checkpoint(folder, num_layers=1, hidden_size=64, vocab_size=1400, has_tekken=True)
        write_tekken(folder / "tekken.json", 1300)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=message):
        Owner(fake_settings(folder, log_level="error"))
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_an_engine_that_dies_while_starting_is_a_failure(
    tekken_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineFailure, match="the engine ended while starting, exit status 1"):
        Owner(fake_settings(tekken_checkpoint))


def test_loading_is_reported_while_it_goes_on(tekken_checkpoint: Path) -> None:
    """With the PyTorch runner, because it alone has weights to load."""
    with owning(fake_settings(tekken_checkpoint, runner="torch", kv_cache_tokens=1024, num_threads=1)) as owner:
        assert owner.progress, "no progress was told"
        assert {loading.what for loading in owner.progress} == {"weights"}
        done = [loading.bytes_done for loading in owner.progress]
        assert done == sorted(done)
        assert done[-1] == owner.progress[-1].bytes_total > 0
        owner.engine.submit(ask(1, max_tokens=2, ignore_eos=True))
        assert owner.wait_for_finish(1).num_output_tokens == 2
