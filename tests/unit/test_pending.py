"""Joining events must not change what a client gets, however they are grouped into responses."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.engine.events import Finish, FinishReason, TokenEvent
from backend.engine.joined_event import JoinedEvent
from backend.engine.stop_matcher import StopString
from backend.engine.text_stream import TextStream, TokenTexts
from backend.triton_adapter.pending import PendingQueue
from tests.engine.text_oracle import decode_cut

TOKEN_BYTES: tuple[bytes, ...] = (
    *(b"", b"a", b"b", b"ab", b"aab", "é".encode(), "😀".encode()),
    *(b"\xe2", b"\x82", b"\xac", b"\x82\xac", b"\xff", b"b\xf0\x9f", b"\x98\x80a"),
)
STOPS = (StopString.compile(b"abb"), StopString.compile("a€".encode()))
NUM_SEQUENCES = 3
MAX_EVENTS = 24


def finish(num_output_tokens: int) -> Finish:
    return Finish(FinishReason.STOP, "", 1, num_output_tokens, 0, 1, 2, 3, 4)


def make_events(token_ids: list[list[int]], order: list[int]) -> list[TokenEvent]:
    """What a scheduler says about sequences that end with their last id (or are cancelled when they have none left)."""
    streams = [TextStream(TokenTexts(TOKEN_BYTES), STOPS) for _ in token_ids]
    remaining = [list(ids) for ids in token_ids]
    is_ended = [False] * len(token_ids)
    events = []
    for index in [index for index in order if index < len(token_ids)] + list(range(len(token_ids))) * MAX_EVENTS:
        if is_ended[index]:
            continue
        new_ids: tuple[int, ...] = ()
        stop = None
        if remaining[index]:
            new_ids = (remaining[index].pop(0),)
            stop = streams[index].append(new_ids[0])
        is_ended[index] = stop is not None or not remaining[index]
        if is_ended[index] and stop is None:
            streams[index].finish()
        is_closed = bool(new_ids) and not TOKEN_BYTES[new_ids[0]]
        end = finish(len(token_ids[index])) if is_ended[index] else None
        events.append(TokenEvent(7, index, new_ids, *streams[index].take(), is_closed, end, all(is_ended)))
    return events


def text_of(pending: JoinedEvent) -> str:
    return decode_cut(TOKEN_BYTES, pending.text_ids, pending.text_skip_bytes, pending.text_take_bytes)


def send_all(events: list[TokenEvent], takes: list[bool], *, is_streamed: bool) -> list[JoinedEvent]:
    queue = PendingQueue(is_streamed=is_streamed)
    sent: list[JoinedEvent] = []
    for position, event in enumerate(events):
        is_due = queue.add(event)
        if takes[position % len(takes)]:
            taken = queue.take()
            assert is_due == bool(taken)
            sent += taken
    return sent + queue.take()


sequences = st.lists(st.lists(st.integers(0, len(TOKEN_BYTES) - 1), max_size=8), min_size=1, max_size=NUM_SEQUENCES)
orders = st.lists(st.integers(0, NUM_SEQUENCES - 1), max_size=MAX_EVENTS)
groupings = st.lists(st.booleans(), min_size=1, max_size=MAX_EVENTS)


@settings(max_examples=300)
@given(token_ids=sequences, order=orders, takes=groupings, is_streamed=st.booleans())
@example(token_ids=[[3, 1, 5]], order=[], takes=[False], is_streamed=True)
@example(token_ids=[[7, 0, 10]], order=[], takes=[False], is_streamed=False)
def test_any_grouping_gives_the_same_ids_text_and_ending(
    token_ids: list[list[int]], order: list[int], takes: list[bool], is_streamed: bool
) -> None:
    events = make_events(token_ids, order)
    sent = send_all(events, takes, is_streamed=is_streamed)
    for index in range(len(token_ids)):
        mine = [event for event in events if event.sequence_index == index]
        responses = [pending for pending in sent if pending.sequence_index == index]
        assert [i for response in responses for i in response.token_ids] == [
            i for event in mine for i in event.token_ids
        ]
        assert "".join(map(text_of, responses)) == "".join(decode_cut(TOKEN_BYTES, *event.text) for event in mine)
        assert [response.finish for response in responses] == [None] * (len(responses) - 1) + [mine[-1].finish]
        if not is_streamed:
            assert len(responses) == 1


@settings(max_examples=300)
@given(token_ids=sequences, order=orders, takes=groupings)
def test_a_control_id_is_the_last_of_its_streamed_response(
    token_ids: list[list[int]], order: list[int], takes: list[bool]
) -> None:
    for pending in send_all(make_events(token_ids, order), takes, is_streamed=True):
        assert all(TOKEN_BYTES[token_id] for token_id in pending.token_ids[:-1])
        assert pending.is_closed == bool(pending.token_ids and not TOKEN_BYTES[pending.token_ids[-1]])


@settings(max_examples=300)
@given(token_ids=sequences, order=orders, takes=groupings)
def test_responses_leave_in_the_order_of_their_first_events(
    token_ids: list[list[int]], order: list[int], takes: list[bool]
) -> None:
    events = make_events(token_ids, order)
    first_event: list[int] = []
    numbers: dict[int, list[int]] = {index: [] for index in range(len(token_ids))}
    for number, event in enumerate(events):
        numbers[event.sequence_index] += [number] * max(1, len(event.token_ids))
    for pending in send_all(events, takes, is_streamed=True):
        first_event.append(numbers[pending.sequence_index][0])
        del numbers[pending.sequence_index][: max(1, len(pending.token_ids))]
    assert first_event == sorted(first_event)


@settings(max_examples=100)
@given(token_ids=sequences, order=orders)
def test_unstreamed_sequences_are_answered_in_the_order_in_which_they_end(
    token_ids: list[list[int]], order: list[int]
) -> None:
    events = make_events(token_ids, order)
    queue = PendingQueue(is_streamed=False)
    for event in events:
        assert queue.add(event) == (event.finish is not None)
        taken = queue.take()
        assert [pending.sequence_index for pending in taken] == ([event.sequence_index] if event.finish else [])


def test_tokens_that_came_meanwhile_share_a_response() -> None:
    events = make_events([[1, 2, 1]], [])
    assert [pending.token_ids for pending in send_all(events, [False], is_streamed=True)] == [[1, 2, 1]]


def test_nothing_is_joined_to_a_response_that_was_taken() -> None:
    events = make_events([[1, 2, 2]], [])
    queue = PendingQueue(is_streamed=True)
    queue.add(events[0])
    taken = queue.take()
    queue.add(events[1])
    assert taken[0].token_ids == [1]
    assert [pending.token_ids for pending in queue.take()] == [[2]]
