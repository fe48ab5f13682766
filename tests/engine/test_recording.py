"""A recording, of a trace or of a server under load, gives identical plans when it is played again."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from backend.checkpoint.vocabulary import Vocabulary, read_vocabulary
from backend.engine.engine_process import EngineProcess
from backend.engine.guide import GuideCompiler
from backend.engine.plan import StepResult
from backend.engine.recording import Began, Committed, Frame, RecordingScheduler, Replay, main, read_frames
from backend.engine.request import GuideSpec
from backend.engine.scheduler import SchedulerLimits
from backend.settings import Settings
from tests.checkpoints import write_tekken
from tests.engine.device import EOS_ID, TOKEN_BYTES
from tests.engine.grammar import compile_places
from tests.engine.test_engine_process import Owner, ask, owning
from tests.engine.test_scheduler_traces import MOST_COMPILE_TURNS, ROUND, random_load, traces
from tests.engine.trace import Order, Trace

RECORDINGS = Path(__file__).with_name("recordings")
TOKENS = 4096


def compile_spec(spec: GuideSpec, _: int) -> Any:
    return compile_places(spec)


def recorded(limits: SchedulerLimits, turns: list[list[Order]]) -> tuple[Trace, io.BytesIO]:
    """A trace that is played with a Scheduler that records."""
    trace, file = Trace(limits, 1, MOST_COMPILE_TURNS), io.BytesIO()
    trace.scheduler = RecordingScheduler(limits, TOKEN_BYTES, EOS_ID, file)
    trace.play(turns)
    file.seek(0)
    return trace, file


@ROUND
@given(trace=traces())
def test_a_recorded_trace_gives_the_same_plans(trace: tuple[SchedulerLimits, list[list[Order]]]) -> None:
    played, file = recorded(*trace)
    replay = Replay().play(read_frames(file), TOKEN_BYTES, compile_spec)
    assert replay.difference == ""
    assert replay.num_steps == len(played.plans)
    assert replay.num_requests >= len(played.requests), "those that were refused are in it too"


def play(frames: list[Frame]) -> Replay:
    return Replay().play(iter(frames), TOKEN_BYTES, compile_spec)


def test_a_scheduler_that_decides_otherwise_is_found() -> None:
    played, file = recorded(*random_load(3))
    frames = list(read_frames(file))
    assert play(frames).difference == ""
    began = frames[0]
    assert isinstance(began, Began)
    other = replace(began.limits, max_step_tokens=began.limits.max_step_tokens + 1)
    different = play([Began(other, began.eos_id, began.vocabulary_digest), *frames[1:]])
    assert different.difference.startswith(f"step {different.num_steps} is another one: StepPlan(")
    assert different.num_steps < len(played.plans)


def test_another_result_is_found() -> None:
    """An id that ends a sequence earlier than it did."""
    _, file = recorded(*random_load(3))
    frames = list(read_frames(file))
    place = next(i for i, frame in enumerate(frames) if isinstance(frame, Committed) and frame.result.token_ids)
    stop_ids = [i for f in frames for i in (getattr(f, "request", None) and f.request.stop_token_ids) or ()]  # type: ignore[union-attr]
    for number, frame in enumerate(frames[place:], place):
        if isinstance(frame, Committed):
            frames[number] = Committed(StepResult((stop_ids[0],) * len(frame.result.token_ids)), frame.now_ns)
    assert play(frames).difference


def test_a_recording_that_was_cut_off_plays_as_far_as_it_goes() -> None:
    played, file = recorded(*random_load(4))
    content = file.getvalue()
    replay = Replay().play(read_frames(io.BytesIO(content[: len(content) // 2])), TOKEN_BYTES, compile_spec)
    assert replay.difference == ""
    assert 0 < replay.num_steps < len(played.plans)
    with pytest.raises(ValueError, match="another vocabulary"):
        Replay().play(read_frames(io.BytesIO(content)), TOKEN_BYTES[::-1], compile_spec)
    with pytest.raises(ValueError, match="does not begin"):
        Replay().play(iter(()), TOKEN_BYTES, compile_spec)


def test_a_recording_ends_at_its_bound_and_can_be_played(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits, turns = random_load(3)
    path, trace = tmp_path / "engine.rec", Trace(limits, 1, MOST_COMPILE_TURNS)
    trace.scheduler = RecordingScheduler(limits, TOKEN_BYTES, EOS_ID, path.open("wb"), most_bytes=9_000)
    trace.play(turns)
    assert 8_000 < path.stat().st_size <= 9_000
    (line,) = caplog.messages
    assert line == f"the recording {path} ends here, it has its 0 MB (setting recording_max_mb)"
    with path.open("rb") as file:
        replay = Replay().play(read_frames(file), TOKEN_BYTES, compile_spec)
    assert replay.difference == ""
    assert 0 < replay.num_steps < len(trace.plans)


def test_a_full_disk_ends_the_recording_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    limits, turns = random_load(4)
    expected, _ = recorded(limits, turns)
    trace = Trace(limits, 1, MOST_COMPILE_TURNS)
    with Path("/dev/full").open("wb") as full:
        trace.scheduler = RecordingScheduler(limits, TOKEN_BYTES, EOS_ID, full)
        trace.play(turns)
    assert trace.plans == expected.plans
    (line,) = caplog.messages
    assert line == "the recording /dev/full ends here, it cannot be written: No space left on device"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """That of the servers which made the recordings."""
    folder = tmp_path_factory.mktemp("tekken")
    write_tekken(folder / "tekken.json", TOKENS)
    return read_vocabulary(folder)


@pytest.mark.parametrize("steady_from", [1, 64])
@pytest.mark.parametrize("name", ["roomy", "tight"])
def test_recordings_of_a_server_under_load_give_the_same_plans(
    vocabulary: Vocabulary, name: str, steady_from: int
) -> None:
    """A refactor must decide as before; one that is meant to decide otherwise records anew (that folder says how)."""
    compiler = GuideCompiler(vocabulary)
    began, *frames = read_frames(io.BytesIO(gzip.decompress((RECORDINGS / f"{name}.rec.gz").read_bytes())))
    assert isinstance(began, Began)
    limits = replace(began.limits, steady_from=steady_from)
    replay = Replay().play(
        iter([Began(limits, began.eos_id, began.vocabulary_digest), *frames]),
        vocabulary.token_bytes,
        lambda spec, num_matchers: compiler.compile(spec.kind, spec.text, num_matchers),
    )
    compiler.close()
    assert replay.difference == ""
    assert replay.num_requests > 50
    assert replay.num_steps > 300


def test_an_engine_process_records_what_it_does(
    tekken_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        checkpoint=str(tekken_checkpoint), runner="torch", kv_cache_tokens=1024, num_threads=1, recording=str(tmp_path)
    )
    with owning(settings) as owner:
        owner.engine.submit(ask(1, max_tokens=30, num_return_sequences=2))
        owner.engine.submit(ask(2, max_tokens=20, guide=GuideSpec("regex", "[ab]{4}-[0-9]{2}"), num_logprobs=1))
        owner.engine.submit(ask(3, max_tokens=900, request_id="mine", ignore_eos=True))
        owner.wait_for(partial(_has_begun, owner))
        owner.engine.abort_request_id("mine")
        owner.wait_for(lambda: all(owner.finish(handle) for handle in (1, 2, 3)))
    (path,) = tmp_path.iterdir()
    assert main([str(path), "--checkpoint", str(tekken_checkpoint)]) == 0
    assert capsys.readouterr().out.startswith("3 requests, ")


def _has_begun(owner: Owner) -> bool:
    return bool(owner.of(3))


def test_a_recording_that_cannot_be_written_is_refused(tekken_checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(checkpoint=str(tekken_checkpoint), runner="fake", recording=str(tmp_path / "none"))
    engine = EngineProcess(settings, lambda _: None, lambda _: None)
    with pytest.raises(Exception, match=r"setting recording: .* cannot be written: No such file"):
        engine.start(lambda _: None)


def test_what_is_no_recording_is_refused_in_one_line(
    tekken_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    for name, problem in (("none", "No such file"), ("empty", "does not begin with the limits")):
        assert main([str(tmp_path / name), "--checkpoint", str(tekken_checkpoint)]) == 2
        assert problem in capsys.readouterr().err
