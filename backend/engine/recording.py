"""What a Scheduler was told and what it planned, written down while it serves, and played again.

    python -m backend.engine.recording FILE --checkpoint FOLDER

A Scheduler is a function of the calls it gets. So a recording made in production (setting `recording`) can be played against
another version of the code, which must give identical plans: a refactor that changes a decision is found at the first step in
which it does. A file holds frames: a length in four bytes, then MessagePack. It holds prompts and outputs, as the calls do.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from backend.checkpoint.vocabulary import read_vocabulary
from backend.engine.events import Event, FailureKind
from backend.engine.guide import GuideCompiler
from backend.engine.plan import StepPlan, StepResult
from backend.engine.request import GenerationRequest, GuideSpec
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.engine.sequence import Guide, Mask
from backend.errors import NemoError, QueueFull

log = logging.getLogger("nemo.engine")
_DIGEST_BYTES = 8
_LENGTH_BYTES = 4
CompileGuide = Callable[[GuideSpec, int], Guide]


class Began(msgspec.Struct, frozen=True, tag=True):
    """First frame: what the Scheduler was made with."""

    limits: SchedulerLimits
    eos_id: int
    vocabulary_digest: bytes


class Added(msgspec.Struct, frozen=True, tag=True):
    """A request came; `has_guide`: its compiled grammar came with it."""

    request: GenerationRequest
    now_ns: int
    has_guide: bool


class GaveGuide(msgspec.Struct, frozen=True, tag=True):
    """The grammar of a request was ready."""

    handle: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request was ended with an error."""

    handle: int
    kind: FailureKind
    message: str


class Aborted(msgspec.Struct, frozen=True, tag=True):
    """A request was taken back."""

    handle: int


class Sent(msgspec.Struct, frozen=True, tag=True):
    """So many ids of these requests were sent to their clients."""

    counts: dict[int, int]


class Expired(msgspec.Struct, frozen=True, tag=True):
    """Deadlines passed."""

    now_ns: int


class Planned(msgspec.Struct, frozen=True, tag=True):
    """A plan was asked for; `digest` of what came, empty for none."""

    now_ns: int
    digest: bytes


class Masked(msgspec.Struct, frozen=True, tag=True):
    """Masks were asked for, of the plan made last."""


class Committed(msgspec.Struct, frozen=True, tag=True):
    """The oldest plan in flight was committed; its result in the order of slots, since the order of rows is no decision."""

    result: StepResult
    now_ns: int


Frame = Began | Added | GaveGuide | Failed | Aborted | Sent | Expired | Planned | Masked | Committed
_decoder = msgspec.msgpack.Decoder(Frame)


class RecordingScheduler(Scheduler):
    """A Scheduler that writes down every call before it carries it out; `file` is flushed whenever nothing is left to do.

    When the file cannot be written any more (a full disk) or has `most_bytes` (0: no bound), the recording ends there, the log
    says so, and serving goes on.
    """

    def __init__(
        self, limits: SchedulerLimits, token_bytes: Sequence[bytes], eos_id: int, file: BinaryIO, most_bytes: int = 0
    ) -> None:
        super().__init__(limits, token_bytes, eos_id)
        self._file: BinaryIO | None = file
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._write(Began(limits, eos_id, vocabulary_digest(token_bytes)))

    def add(self, request: GenerationRequest, now_ns: int, guide: Guide | None = None) -> None:
        """Write down, then queue."""
        self._write(Added(request, now_ns, guide is not None))
        super().add(request, now_ns, guide)

    def give_guide(self, handle: int, guide: Guide) -> list[Event]:
        """Write down, then let the request go on."""
        self._write(GaveGuide(handle))
        return super().give_guide(handle, guide)

    def fail(self, handle: int, kind: FailureKind, message: str) -> list[Event]:
        """Write down, then end the request."""
        self._write(Failed(handle, kind, message))
        return super().fail(handle, kind, message)

    def abort(self, handle: int) -> list[Event]:
        """Write down, then take back; aborts by request id and of all come here too."""
        self._write(Aborted(handle))
        return super().abort(handle)

    def note_sent(self, counts: Mapping[int, int]) -> None:
        """Write down, then let streams go on."""
        self._write(Sent(dict(counts)))
        super().note_sent(counts)

    def expire(self, now_ns: int) -> list[Event]:
        """End requests; written down when there were any."""
        events = super().expire(now_ns)
        if events:
            self._write(Expired(now_ns))
        return events

    def plan(self, now_ns: int) -> StepPlan | None:
        """Plan, and write down what came."""
        plan = super().plan(now_ns)
        if self._file is not None:
            self._write(Planned(now_ns, digest_of(plan)))
        return plan

    def masks(self, plan: StepPlan) -> dict[int, Mask]:
        """Write down, then compute."""
        self._write(Masked())
        return super().masks(plan)

    def commit(self, plan: StepPlan, result: StepResult, now_ns: int) -> list[Event]:
        """Write down, then take over."""
        if self._file is not None:
            self._write(Committed(_rearranged(result, *_orders_of_slots(plan)), now_ns))
        events = super().commit(plan, result, now_ns)
        if not self.has_work:
            self._write(None)
        return events

    def _write(self, frame: Frame | None) -> None:
        """Write a frame, or with None all that is still buffered."""
        if self._file is None:
            return
        try:
            if frame is None:
                self._file.flush()
            else:
                encoded = msgspec.msgpack.encode(frame)
                self._num_bytes += _LENGTH_BYTES + len(encoded)
                if 0 < self._most_bytes < self._num_bytes:
                    self._end_recording(
                        self._file, f"it has its {self._most_bytes // 10**6} MB (setting recording_max_mb)"
                    )
                else:
                    self._file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
        except OSError as error:
            self._end_recording(self._file, f"it cannot be written: {error.strerror}")

    def _end_recording(self, file: BinaryIO, reason: str) -> None:
        log.error("the recording %s ends here, %s", file.name, reason)
        self._file = None
        with contextlib.suppress(OSError):  # it would write what it still holds
            file.close()


class Replay:
    """Plays a recording; `num_steps` and `num_requests` were the same, and `difference` says what was not."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_requests = 0
        self.difference = ""

    def play(self, frames: Iterator[Frame], token_bytes: Sequence[bytes], compile_guide: CompileGuide) -> Replay:
        """Play until the end, or the first plan that is another; ValueError when it is no recording for this vocabulary."""
        began = next(frames, None)
        if not isinstance(began, Began):
            raise ValueError("the recording does not begin with the limits of its scheduler")
        if began.vocabulary_digest != vocabulary_digest(token_bytes):
            raise ValueError("the recording was made with another vocabulary")
        scheduler = Scheduler(began.limits, token_bytes, began.eos_id)
        specs: dict[int, tuple[GuideSpec, int]] = {}
        in_flight: deque[StepPlan] = deque()
        for frame in frames:
            match frame:
                case Added(request, now_ns, has_guide):
                    self.num_requests += 1
                    if request.guide is not None:
                        specs[request.handle] = request.guide, request.num_return_sequences
                    guide = compile_guide(*specs[request.handle]) if has_guide else None
                    _queue(scheduler, request, now_ns, guide)
                case GaveGuide(handle):
                    scheduler.give_guide(handle, compile_guide(*specs[handle]))
                case Failed(handle, kind, message):
                    scheduler.fail(handle, kind, message)
                case Aborted(handle):
                    scheduler.abort(handle)
                case Sent(counts):
                    scheduler.note_sent(counts)
                case Expired(now_ns):
                    scheduler.expire(now_ns)
                case Planned(now_ns, digest):
                    plan = scheduler.plan(now_ns)
                    if digest_of(plan) != digest:
                        self.difference = f"step {self.num_steps} is another one: {plan}"
                        return self
                    if plan is not None:
                        self.num_steps += 1
                        in_flight.append(plan)
                case Masked():
                    scheduler.masks(in_flight[-1])
                case Committed(result, now_ns):
                    plan = in_flight.popleft()
                    orders = [_inverse(order) for order in _orders_of_slots(plan)]
                    scheduler.commit(plan, _rearranged(result, *orders), now_ns)
        return self


def _orders_of_slots(plan: StepPlan) -> tuple[list[int], list[int]]:
    """The rows that are sampled, and those whose prompts are scored, in the order of their slots; counted among themselves."""
    sampled = [row.slot for row in plan.rows if row.is_sampled]
    scored = [row.slot for row in plan.rows if row.num_prompt_logprobs is not None]
    return sorted(range(len(sampled)), key=sampled.__getitem__), sorted(range(len(scored)), key=scored.__getitem__)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _rearranged(result: StepResult, sampled: list[int], scored: list[int]) -> StepResult:
    """The same result with its entries in other orders."""
    return StepResult(
        tuple([result.token_ids[index] for index in sampled]),
        tuple([result.log_probs[index] for index in sampled]) if result.log_probs else (),
        tuple([result.prompt_log_probs[index] for index in scored]),
    )


def _queue(scheduler: Scheduler, request: GenerationRequest, now_ns: int, guide: Guide | None) -> None:
    """A full queue is full again, and changes nothing."""
    try:
        scheduler.add(request, now_ns, guide)
    except QueueFull:
        return


def read_frames(file: BinaryIO) -> Iterator[Frame]:
    """Frames to the end; one that is cut off (the process was killed) ends it too."""
    while len(length := file.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        encoded = file.read(int.from_bytes(length, "little"))
        if len(encoded) < int.from_bytes(length, "little"):
            return
        yield _decoder.decode(encoded)


def digest_of(plan: StepPlan | None) -> bytes:
    """Of everything in a plan but the order of its rows; empty for none."""
    if plan is None:
        return b""
    everything = plan.step, sorted(plan.rows, key=lambda row: row.slot), plan.copies
    return hashlib.blake2b(msgspec.msgpack.encode(everything), digest_size=_DIGEST_BYTES).digest()


def vocabulary_digest(token_bytes: Sequence[bytes]) -> bytes:
    """Of all tokens in their order."""
    return hashlib.blake2b(msgspec.msgpack.encode(list(token_bytes)), digest_size=_DIGEST_BYTES).digest()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every plan was the same."""
    parser = argparse.ArgumentParser(prog="python -m backend.engine.recording", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a file that the setting `recording` made")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint that was served")
    arguments = parser.parse_args(argv)
    try:
        vocabulary = read_vocabulary(arguments.checkpoint)
        compiler = GuideCompiler(vocabulary)
        with arguments.file.open("rb") as file:
            replay = Replay().play(
                read_frames(file),
                vocabulary.token_bytes,
                lambda spec, num_matchers: compiler.compile(spec.kind, spec.text, num_matchers),
            )
        compiler.close()
    except (NemoError, OSError, ValueError, msgspec.MsgspecError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{replay.num_requests} requests, {replay.num_steps} steps: {replay.difference or 'the same plans'}")
    return 1 if replay.difference else 0


if __name__ == "__main__":
    sys.exit(main())
