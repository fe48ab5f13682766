"""What waits for a slow owner is joined: nothing is lost, doubled or reordered, and it stays small."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Connection

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine import messages
from backend.engine.engine import Engine
from backend.engine.events import EngineStats, Event, FailureKind, PlainTokens, RequestFailed, TokenEvent
from backend.engine.outbox import MOST_EVENTS, MessageQueue, Outbox
from backend.engine.plan import TokenLogProbs
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.runner.fake_runner import FakeRunner
from tests.engine.text_oracle import decode_cut
from tests.unit.test_pending import TOKEN_BYTES, make_events

TIMEOUT_S = 20.0
ANSWER = st.tuples(
    st.lists(st.lists(st.integers(0, len(TOKEN_BYTES) - 1), max_size=8), min_size=1, max_size=3),
    st.lists(st.integers(0, 2), max_size=24),
    st.booleans(),
)


def stats(num_steps: int) -> EngineStats:
    return EngineStats(1, 0, 1, 1, 0, num_steps, 0, 0, 0, 0, 0)


def events_of(handle: int, token_ids: list[list[int]], order: list[int], has_log_probs: bool) -> list[TokenEvent]:
    """The whole answer to a request; each id has log-probabilities of its own, if any."""
    events = []
    for number, event in enumerate(make_events(token_ids, order)):
        log_probs = (TokenLogProbs(-1.0 * number, handle),) if has_log_probs and event.token_ids else ()
        events.append(msgspec.structs.replace(event, handle=handle, log_probs=log_probs))
    return events


def in_columns(events: list[TokenEvent]) -> tuple[list[TokenEvent], PlainTokens | None]:
    """The events of a step with those as columns that may be, as a Scheduler gives them."""
    counts = Counter(event.handle for event in events)
    plain, singles = list[TokenEvent](), list[TokenEvent]()
    for event in events:
        as_column = TokenEvent(event.handle, 0, event.token_ids, event.token_ids, 0, event.text_take_bytes, False, None)
        is_plain = event == as_column and len(event.token_ids) == 1 and event.text_take_bytes > 0
        (plain if is_plain and counts[event.handle] == 1 else singles).append(event)
    columns = [(event.handle, event.token_ids[0], event.text_take_bytes) for event in plain]
    return singles, PlainTokens(*map(list, zip(*columns, strict=True))) if columns else None


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[messages.Step], list[bool]]:
    """Steps of some requests at once, in any interleaving, some of which fail; and after which steps the owner reads."""
    left = {handle: events_of(handle, *draw(ANSWER)) for handle in range(1, draw(st.integers(1, 4)) + 1)}
    fails = draw(st.sets(st.sampled_from(sorted(left))))
    steps: list[messages.Step] = []
    while left:
        tokens: list[TokenEvent] = []
        failed: list[RequestFailed] = []
        for handle in draw(st.lists(st.sampled_from(sorted(left)), unique=True, min_size=1)):
            num_events = draw(st.integers(1, 3))
            tokens += left[handle][:num_events]
            del left[handle][:num_events]
            if handle in fails and draw(st.booleans()):
                left[handle] = []
                if not tokens or not tokens[-1].is_request_end or tokens[-1].handle != handle:
                    failed.append(RequestFailed(handle, FailureKind.INVALID, "too complex"))
            if not left[handle]:
                del left[handle]
        singles, plain = in_columns(tokens) if draw(st.booleans()) else (tokens, None)
        steps.append(messages.Step(tuple(singles), tuple(failed), stats(len(steps)), plain))
    return steps, draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps)))


def over_the_wire(message: messages.FromEngine) -> messages.FromEngine:
    """As the owner gets it."""
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        messages.send(ours, message)
        return messages.receive_from_engine(theirs)


def sequences_of(steps: Sequence[messages.Step]) -> dict[tuple[int, int], list[TokenEvent]]:
    found: dict[tuple[int, int], list[TokenEvent]] = {}
    for step in steps:
        for event in step.tokens:
            found.setdefault((event.handle, event.sequence_index), []).append(event)
    return found


def content(events: list[TokenEvent]) -> tuple[object, ...]:
    """All that a sequence said, however it is cut into events."""
    return (
        [token_id for event in events for token_id in event.token_ids],
        "".join(decode_cut(TOKEN_BYTES, *event.text) for event in events),
        [log_prob for event in events for log_prob in event.log_probs],
        [event.finish for event in events if event.finish is not None],
        [event.is_request_end for event in events if event.is_request_end],
    )


@settings(max_examples=300)
@given(run=runs(), max_tokens=st.sampled_from([0, 0, 1, 3]))
def test_joined_steps_say_the_same(run: tuple[list[messages.Step], list[bool]], max_tokens: int) -> None:
    steps, reads = run
    queue = MessageQueue(max_tokens)
    taken: list[messages.Step] = []
    waiting: list[messages.Step] = []
    for step, is_read in zip(steps, [*reads[:-1], True], strict=True):
        queue.put(step)
        waiting.append(step)
        if is_read:
            message = over_the_wire(queue.take())
            assert isinstance(message, messages.Step)
            assert not queue, "one message holds all steps"
            assert message.stats == step.stats, "the latest load"
            if max_tokens == 0 and len(waiting) > 1:
                in_order = [event for each in waiting for event in each.tokens]
                num_closed = sum(event.is_closed for event in in_order)
                most = len({(event.handle, event.sequence_index) for event in in_order}) + num_closed
                assert len(message.tokens) <= most
            taken.append(message)
            waiting = []
    sent, came = sequences_of(steps), sequences_of(taken)
    assert {sequence: content(events) for sequence, events in came.items()} == {
        sequence: content(events) for sequence, events in sent.items()
    }
    assert [failed for step in taken for failed in step.failed] == [failed for step in steps for failed in step.failed]
    for events in came.values():
        assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1), "nothing behind the end"
        for event in events:
            control_ids = [not TOKEN_BYTES[token_id] for token_id in event.token_ids]
            assert not any(control_ids[:-1]), "nothing is joined behind a control id"
            assert event.is_closed == any(control_ids)
            assert not max_tokens or len(event.token_ids) <= max_tokens
    ended: set[int] = set()
    for event in (event for step in taken for event in step.tokens):
        assert event.handle not in ended, "nothing comes behind the end of a request"
        ended |= {event.handle} if event.is_request_end else set()


def test_many_tokens_wait_as_one_event_a_sequence() -> None:
    queue = MessageQueue()
    for number in range(10_000):
        event = TokenEvent(1, 0, (number,), (), 0, 0, False, None)
        queue.put(messages.Step((event, msgspec.structs.replace(event, handle=2)), (), stats(number)))
    message = queue.take()
    assert isinstance(message, messages.Step)
    assert [event.token_ids for event in message.tokens] == [tuple(range(10_000))] * 2


def test_many_sequences_are_told_in_several_messages() -> None:
    queue, num_sequences = MessageQueue(), 2 * MOST_EVENTS + 100
    for number in range(3):
        events = [TokenEvent(handle, 0, (number,), (), 0, 0, False, None) for handle in range(num_sequences)]
        failed = (RequestFailed(10**6 + number, FailureKind.CANCELLED, ""),)
        queue.put(messages.Step(tuple(events), failed, stats(number)))
    first = queue.take()
    assert isinstance(first, messages.Step)
    queue.put(messages.Step((TokenEvent(0, 0, (3,), (), 0, 0, False, None),), (), stats(3)))
    rest = [queue.take(), queue.take()]
    assert not queue
    assert all(isinstance(message, messages.Step) for message in rest)
    steps = [message for message in (first, *rest) if isinstance(message, messages.Step)]
    assert [len(step.tokens) for step in steps] == [MOST_EVENTS, MOST_EVENTS, 101]
    assert [len(step.failed) for step in steps] == [0, 0, 3]
    assert [step.stats.num_steps for step in steps] == [0, 0, 3]
    ids = {handle: content(events)[0] for (handle, _), events in sequences_of(steps).items()}
    assert ids == {handle: [0, 1, 2, 3] if handle == 0 else [0, 1, 2] for handle in range(num_sequences)}


def test_messages_of_the_start_come_first_and_the_end_behind_all() -> None:
    loading, fatal = messages.Loading("weights", 1, 2), messages.Fatal("gone", is_config=False)
    step = messages.Step((), (), stats(1))
    queue = MessageQueue()
    for message in (loading, messages.Alive(1.0), step, messages.Alive(2.0), fatal):
        queue.put(message)
    taken = [queue.take() for _ in range(4)]
    assert taken == [loading, messages.Alive(2.0), step, fatal]
    assert not queue
    with pytest.raises(IndexError):
        queue.take()


def test_an_owner_that_does_not_read_holds_nothing_up_and_gets_everything() -> None:
    """Its socket is full after some hundred kilobytes; whatever is put after that must not block and not be lost."""
    ours, theirs = socket.socketpair()
    outbox, owner = Outbox(Connection(ours.detach())), Connection(theirs.detach())
    num_steps = 20_000

    def put_all() -> None:
        for number in range(num_steps):
            outbox.put_step([TokenEvent(1, 0, (number,) * 20, (), 0, 0, False, None)], stats(number))

    putting = threading.Thread(target=put_all)
    putting.start()
    putting.join(TIMEOUT_S)
    assert not putting.is_alive(), "a step waited for the owner"
    ids: list[int] = []
    num_messages = 0
    while len(ids) < num_steps * 20:
        assert owner.poll(TIMEOUT_S), "tokens were lost"
        message = messages.receive_from_engine(owner)
        assert isinstance(message, messages.Step)
        ids += [token_id for event in message.tokens for token_id in event.token_ids]
        num_messages += 1
    assert ids == [number for number in range(num_steps) for _ in range(20)]
    assert num_messages < num_steps, "what waited was joined"
    outbox.close()
    owner.close()


def test_a_loop_whose_owner_reads_nothing_serves_to_the_end() -> None:
    """All of it, through a socket that is full long before; what the owner reads then is complete."""
    num_sequences, num_tokens = 32, 2000
    limits = SchedulerLimits(num_sequences * 32, num_sequences, 512, num_sequences, steady_from=1)
    runner = FakeRunner(num_pages=limits.num_pages, max_num_seqs=num_sequences, first_id=0)
    ours, theirs = socket.socketpair()
    outbox, owner = Outbox(Connection(ours.detach())), Connection(theirs.detach())
    ended = threading.Event()

    def emit(events: list[Event], stats: EngineStats) -> None:
        outbox.put_step(events, stats)
        if stats.num_steps >= num_tokens and stats.num_pages_held == 0:
            ended.set()

    engine = Engine(Scheduler(limits, [bytes([byte]) for byte in range(256)], eos_id=0), runner, emit)
    for handle in range(num_sequences):
        engine.submit(
            GenerationRequest(handle, "", (65,), num_tokens, sampling=SamplingParams(seed=handle), ignore_eos=True)
        )
    loop = threading.Thread(target=engine.run, daemon=True)
    loop.start()
    assert ended.wait(TIMEOUT_S), "the loop waited for the owner"
    ids: defaultdict[int, list[int]] = defaultdict(list)
    num_ended = 0
    while num_ended < num_sequences:
        assert owner.poll(TIMEOUT_S), "tokens were lost"
        message = messages.receive_from_engine(owner)
        assert isinstance(message, messages.Step)
        for event in message.tokens:
            ids[event.handle] += event.token_ids
            num_ended += event.is_request_end
    assert ids == {
        handle: [runner.token_at(handle, position) for position in range(num_tokens)] for handle in range(num_sequences)
    }
    engine.stop()
    loop.join(TIMEOUT_S)
    outbox.close()
    owner.close()
