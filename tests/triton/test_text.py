"""Text through the whole chain: any bytes, cut anywhere, are the text of the ids; stop strings are found and never sent."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from backend.checkpoint.vocabulary import read_vocabulary
from tests.triton.calls import Answer, ask, generate_stream
from tests.triton.live_server import LiveServer

SCRIPTS = [
    "The quick brown fox",
    "Où est le garçon naïf ?",
    "Größenwahn, ß und ẞ",
    "你好，世界。",
    "こんにちは世界",
    "안녕하세요 세계",
    "Привет, мир",
    "Γειά σου Κόσμε",
    "مَرْحَبًا بِالعَالَم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 e\u0301",
    "tab\tnewline\r\n\x00\x01\x7f\u0085\u2028",
    "<s>[INST] typed [/INST]</s>[TOOL_CALLS]",
    " leading and trailing  ",
    "\ufeffbyte order mark \ufffd \U0010ffff",
    "",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_comes_back_as_it_was_sent(server: LiveServer, text: str) -> None:
    for stream in (False, True):
        request: dict[str, Any] = {
            "text_input": text,
            "max_tokens": 2,
            "exclude_input_in_output": False,
            "stream": stream,
        }
        echoed = ask(server, **request)
        assert echoed.text().startswith(text)
        assert generate_stream(server, **request).summary() == echoed.summary()
        assert 1 not in echoed.ids()[1:-2], "a control token typed as text must stay text"


def text_runs(ids: list[int], checkpoint: Path) -> list[str]:
    """What a list of ids says: runs of bytes between control ids, each decoded as UTF-8."""
    token_bytes = read_vocabulary(checkpoint).token_bytes
    runs = [b"".join(run) for has_bytes, run in groupby((token_bytes[each] for each in ids), key=bool) if has_bytes]
    return [run.decode("utf-8", "replace") for run in runs]


def text_before(stops: list[str], runs: list[str]) -> str:
    """The text up to the first match; no match spans a control id."""
    before = ""
    for run in runs:
        ends = [run.index(stop) for stop in stops if stop in run]
        if ends:
            return before + run[: min(ends)]
        before += run
    raise AssertionError(f"none of {stops} is in {runs}")


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_are_the_same_streamed_or_not(server: LiveServer, checkpoint: Path, seed: int) -> None:
    # Hot and among the byte tokens only when they are likely: the text is full of broken and whole characters.
    request: dict[str, Any] = {
        "prompt_token_ids": [1, 1195, 1195],
        "max_tokens": 400,
        "temperature": 50.0,
        "seed": seed,
    }
    request |= {"ignore_eos": True, "stop_words": ["\ufffd\ufffd\ufffd\ufffd never", "zzz€zzz"]}
    whole = ask(server, **request)
    streamed = ask(server, **request, stream=True)
    assert whole.text() == "".join(text_runs(whole.ids(), checkpoint))
    assert "\ufffd" in whole.text()
    assert any(ord(character) > 127 for character in whole.text().replace("\ufffd", ""))
    assert streamed.summary() == whole.summary()
    assert len(streamed.replies) > 20


LONG: dict[str, Any] = {"text_input": "Hello", "max_tokens": 200, "temperature": 2.0, "seed": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def unstopped(server: LiveServer) -> Answer:
    """An answer without any stop; its text has many scripts and control ids in between."""
    return ask(server, **LONG)


def some_stop(runs: list[str], share: float, length: int) -> str:
    """Characters that are in the text, at about this share of it."""
    slices = [run[start : start + length] for run in runs for start in range(len(run) - length + 1)]
    whole = [each for each in slices if "\ufffd" not in each]
    return whole[int(share * (len(whole) - 1))]


@pytest.mark.parametrize("length", [1, 2, 5, 12])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_stop_string_across_tokens(
    server: LiveServer, checkpoint: Path, unstopped: Answer, share: float, length: int
) -> None:
    runs = text_runs(unstopped.ids(), checkpoint)
    stop = some_stop(runs, share, length)
    for stream in (False, True):
        stopped = ask(server, **LONG, stream=stream, stop_words=["\u2603 never", stop])
        assert stopped.text() == text_before([stop], runs)
        assert stopped.finish_reason() == "stop"
        assert stopped.replies[-1].value("stop_reason") == stop
        assert stopped.ids() == unstopped.ids()[: len(stopped.ids())]
        assert stopped.replies[-1].value("num_output_tokens") == len(stopped.ids()) < 200


def test_first_of_several_stop_strings_ends_the_answer(server: LiveServer, checkpoint: Path, unstopped: Answer) -> None:
    runs = text_runs(unstopped.ids(), checkpoint)
    stops = [some_stop(runs, share, 3) for share in (0.9, 0.4, 0.6)]
    for stream in (False, True):
        assert ask(server, **LONG, stream=stream, stop_words=stops).text() == text_before(stops, runs)


def test_stop_is_passed_over_before_min_tokens(server: LiveServer, checkpoint: Path, unstopped: Answer) -> None:
    stop = some_stop(text_runs(unstopped.ids(), checkpoint), 0.0, 1)
    early = ask(server, **LONG, stop_words=[stop])
    late = ask(server, **LONG, stop_words=[stop], min_tokens=20)
    assert len(early.ids()) < 5
    assert early.text() == ""
    assert len(late.ids()) >= 20
    assert late.ids() == unstopped.ids()[: len(late.ids())]


def test_stop_ids_are_sent_and_counted(server: LiveServer, unstopped: Answer) -> None:
    stop_id = unstopped.ids()[30]
    first = unstopped.ids().index(stop_id)
    for name in ("stop_token_ids", "end_id"):
        own = LONG if name == "stop_token_ids" else LONG | {"ignore_eos": False}
        stopped = ask(server, **own | {name: stop_id}, stream=True)
        assert stopped.ids() == unstopped.ids()[: first + 1]
        assert stopped.finish_reason() == "stop"
        assert stopped.replies[-1].value("stop_reason") == (str(stop_id) if name == "stop_token_ids" else "")
