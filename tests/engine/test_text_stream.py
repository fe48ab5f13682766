"""The text stream against a brute-force oracle: at every moment exactly what may be sent, and never more."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.engine.stop_matcher import StopMatcher, StopString
from backend.engine.text_stream import TextCut, TextStream, TokenTexts, num_unfinished_bytes
from backend.text.detokenizer import cut_text
from tests.engine.text_oracle import UNFINISHED, Output, allowed_text, decode_cut

CONTROL = 0
TOKEN_BYTES: tuple[bytes, ...] = (
    b"",
    *(b"a", b"b", b"ab", b"ba", b"aab", b" ", b"."),
    *("é".encode(), "€".encode(), "😀".encode(), "عربي".encode(), "中文".encode()),
    *(
        b"\xc3",
        b"\xa9",
        b"\xe2",
        b"\x82",
        b"\xac",
        b"\xe2\x82",
        b"\x82\xac",
        b"\xf0",
        b"\xf0\x9f",
        b"\x98\x80",
        b"\x9f\x98",
    ),
    *(
        b"\xff",
        b"\xc0",
        b"\xed\xa0",
        b"\x80",
        b"\xf4\x90",
        b"\xf4\x8f",
        b"\xe0\x80",
        b"a\xe2",
        b"\xacb",
        b"a\xf0\x9f\x98",
    ),
)
LEAD, TAIL = TOKEN_BYTES.index(b"\xc3"), TOKEN_BYTES.index(b"\xa9")
EURO_1, EURO_2 = TOKEN_BYTES.index(b"\xe2"), TOKEN_BYTES.index(b"\x82")
NUM_EXAMPLES = 600

ids = st.integers(0, len(TOKEN_BYTES) - 1) | st.sampled_from([CONTROL, 1, 2, LEAD, TAIL])
sensible_stops = st.lists(st.sampled_from(["a", "b", "é", "€", " ", "."]), min_size=1, max_size=5).map(
    lambda letters: "".join(letters).encode()
)
wild_stops = st.lists(st.sampled_from(list(b"ab\xe2\x82\xac\xf0\x9f\xff")), min_size=1, max_size=4).map(bytes)
stop_lists = st.lists(sensible_stops | wild_stops, max_size=4, unique=True)


def make_stream(stops: list[bytes]) -> TextStream:
    return TextStream(TokenTexts(TOKEN_BYTES), tuple(StopString.compile(stop) for stop in stops))


def id_of(text: bytes) -> int:
    return TOKEN_BYTES.index(text)


def assert_exact(cut: TextCut) -> None:
    """No id is listed that gives no byte, but for control ids, which have none."""
    if not cut.text_ids:
        assert cut == TextCut()
        return
    assert cut.take_bytes > 0
    lengths = [len(TOKEN_BYTES[token_id]) for token_id in cut.text_ids]
    if cut.skip_bytes:
        assert cut.skip_bytes < lengths[0], "the first id gives a byte"
    visible = [length for length in lengths if length]
    assert cut.skip_bytes + cut.take_bytes > sum(visible[:-1]), "the last id with bytes gives one"


@settings(max_examples=NUM_EXAMPLES)
@given(
    echo=st.lists(ids, max_size=6),
    token_ids=st.lists(ids, max_size=14),
    takes=st.lists(st.booleans(), min_size=14, max_size=14),
    stops=stop_lists,
    min_tokens=st.integers(0, 14),
)
@example(echo=[], token_ids=[LEAD, CONTROL, TAIL], takes=[True] * 14, stops=[], min_tokens=0)
@example(echo=[], token_ids=[LEAD, CONTROL, TAIL], takes=[False, False, True] * 5, stops=[], min_tokens=0)
@example(echo=[], token_ids=[EURO_1, CONTROL, EURO_2], takes=[False, False, True] * 5, stops=[], min_tokens=0)
@example(echo=[], token_ids=[LEAD, CONTROL, TAIL], takes=[False] * 14, stops=[], min_tokens=0)
@example(echo=[LEAD, CONTROL], token_ids=[TAIL], takes=[True] * 14, stops=[], min_tokens=0)
@example(echo=[], token_ids=[1, 1, 1, 2], takes=[True] * 14, stops=[b"aa"], min_tokens=3)
@example(echo=[], token_ids=[1, CONTROL, 3], takes=[True] * 14, stops=[b"aab"], min_tokens=0)
@example(echo=[LEAD], token_ids=[TAIL, CONTROL, TAIL, 1], takes=[False] * 14, stops=[b"\xa9a"], min_tokens=0)
def test_what_was_sent_is_what_may_be_sent(
    echo: list[int], token_ids: list[int], takes: list[bool], stops: list[bytes], min_tokens: int
) -> None:
    stream = make_stream(stops)
    stream.append_echo(echo)
    sent = ""
    outputs: list[Output] = []
    stop: bytes | None = None

    def take() -> None:
        nonlocal sent
        cut = stream.take()
        assert_exact(cut)
        piece = decode_cut(TOKEN_BYTES, *cut)
        assert cut_text(TOKEN_BYTES, *cut) == piece
        sent += piece

    for position, token_id in enumerate(token_ids):
        outputs.append(Output(token_id, may_stop=position + 1 >= min_tokens))
        stop = stream.append(token_id, may_stop=outputs[-1].may_stop)
        if takes[position]:
            take()
            assert sent == allowed_text(TOKEN_BYTES, outputs, stops, echo).text
        if stop is not None:
            break
    if stop is None:
        stream.finish()
    take()
    whole = allowed_text(TOKEN_BYTES, outputs, stops, echo, is_finished=True)
    assert (sent, stop) == whole
    assert stream.take() == TextCut(), "nothing is sent twice"


@settings(max_examples=NUM_EXAMPLES)
@given(before=st.binary(max_size=3), end=st.sampled_from(sorted(UNFINISHED)))
def test_the_beginning_of_a_character_is_unfinished_whatever_stands_before(before: bytes, end: bytes) -> None:
    assert num_unfinished_bytes(before + end) == len(end)


@settings(max_examples=NUM_EXAMPLES)
@given(text=st.binary(max_size=6))
def test_everything_else_is_finished(text: bytes) -> None:
    num_unfinished = num_unfinished_bytes(text)
    assert num_unfinished == max((n for n in (1, 2, 3) if n <= len(text) and text[-n:] in UNFINISHED), default=0)


@settings(max_examples=NUM_EXAMPLES)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5).map(str.encode), min_size=1, max_size=4, unique=True),
    text=st.text("ab", max_size=16).map(str.encode),
)
@example(stops=[b"aabaaa"], text=b"aabaaabaaa")
def test_the_matcher_finds_every_stop_string_where_it_ends(stops: list[bytes], text: bytes) -> None:
    matcher = StopMatcher(tuple(StopString.compile(stop) for stop in stops))
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        assert matcher.push(text[end - 1]) == max(endings, key=len, default=None)
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
        assert matcher.num_bytes_held == max(len(part) for part in beginnings if text[:end].endswith(part))


def test_a_stop_string_is_held_back_across_tokens_and_then_cut() -> None:
    stream = make_stream([b"ab."])
    assert [stream.append(id_of(text)) for text in (b"b", b"ba", b"b")] == [None, None, None]
    assert stream.take() == TextCut((id_of(b"b"), id_of(b"ba")), 0, 2)
    assert stream.append(id_of(b".")) == b"ab."
    assert stream.take() == TextCut()


def test_a_held_beginning_of_a_stop_string_is_sent_when_it_does_not_become_one() -> None:
    stream = make_stream([b"ab."])
    stream.append(id_of(b"ab"))
    assert stream.take() == TextCut()
    stream.append(id_of(b" "))
    assert stream.take() == TextCut((id_of(b"ab"), id_of(b" ")), 0, 3)


def test_a_cut_inside_an_id_goes_on_inside_the_same_id() -> None:
    stream = make_stream([b"bb"])
    stream.append(id_of(b"ab"))
    assert stream.take() == TextCut((id_of(b"ab"),), 0, 1)
    stream.append(id_of(b"."))
    assert stream.take() == TextCut((id_of(b"ab"), id_of(b".")), 1, 2)


def test_stop_strings_are_not_looked_for_in_the_echo() -> None:
    stream = make_stream([b"ab"])
    stream.append_echo([id_of(b"ab"), id_of(b"a")])
    assert stream.append(id_of(b"b")) is None
    assert decode_cut(TOKEN_BYTES, *stream.take()) == "abab"


@pytest.mark.parametrize("stop_count", [1, 64])
def test_text_without_any_first_byte_of_a_stop_string_is_not_held(stop_count: int) -> None:
    stream = make_stream([b"." * length for length in range(2, 2 + stop_count)])
    stream.append(id_of(b"ab"))
    assert stream.take().take_bytes == 2


@settings(max_examples=NUM_EXAMPLES)
@given(token_ids=st.lists(ids, max_size=14), stops=stop_lists)
@example(token_ids=[1, 1, 2, 1], stops=[b"aa"])
@example(token_ids=[LEAD, TAIL, TAIL, 1], stops=[])
def test_an_id_that_goes_out_alone_need_not_be_appended(token_ids: list[int], stops: list[bytes]) -> None:
    """A stream that is not told of such ids says the same of all the others."""
    whole, spared = make_stream(stops), make_stream(stops)
    lengths_alone = TokenTexts(TOKEN_BYTES).lengths_alone
    for token_id in token_ids:
        stop, cut = whole.append(token_id), whole.take()
        num_bytes = spared.num_bytes_alone(token_id)
        if spared.is_free:
            assert num_bytes == lengths_alone[token_id]
        if num_bytes:
            assert (stop, cut) == (None, TextCut((token_id,), 0, num_bytes))
        else:
            assert (stop, cut) == (spared.append(token_id), spared.take())
        if stop is not None:
            return
