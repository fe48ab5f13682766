"""`python -m client`, `client.chat` and `client.load`: what they print, how they end, what Ctrl-C does."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import client.__main__
import client.chat
import client.load
from client import Protocol
from client.arguments import parse
from tests.unit.client.fake_triton import Drop, Failure, FakeTriton, Pause, Received, Reply, Step

ROOT = Path(__file__).parents[3]


def answer(text: str, token_ids: list[int], *, index: int = 0, reason: str = "stop", final: bool = True) -> Reply:
    outputs: dict[str, list[Any]] = {
        "text_output": [text],
        "token_ids": token_ids,
        "finish_reason": [reason],
        "num_input_tokens": [7],
    }
    return Reply(outputs | {"sequence_index": [index]}, final)


def greeting(_: Received) -> list[Step]:
    return [Reply({"text_output": ["Grüß "], "token_ids": [1, 2]}), Pause(0.02), answer("dich", [3])]


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with FakeTriton(greeting) as server:
        yield server


def server_flags(fake: FakeTriton, protocol: str = "grpc") -> list[str]:
    return ["--url", fake.address(protocol), "--protocol", protocol]


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_asks_a_chat_question_and_tells_the_speed(
    fake: FakeTriton, protocol: Protocol, capsys: pytest.CaptureFixture[str]
) -> None:
    assert client.__main__.main(["Hello?", "--system", "Be brief.", *server_flags(fake, protocol)]) == 0
    printed = capsys.readouterr()
    assert printed.out == "Grüß dich\n"
    assert printed.err.startswith("7 prompt tokens, 3 output tokens, first token after ")
    assert printed.err.endswith(" tokens/s, finished: stop\n")
    assert json.loads(fake.received[0].values("messages")[0]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
    ]


def test_every_flag_arrives_at_the_server(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--max-tokens 5 --min-tokens 2 --temperature 0.5 --top-k 4 --top-p 0.25 --min-p 0.125 --seed 3 -n 1"
    penalties = (
        "--repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty -0.5 --deadline-ms 900 --priority 2"
    )
    argv = ["Once", "--raw", *flags.split(), *penalties.split(), "--stop", "a", "--stop", "b c", "--ignore-eos"]
    argv += ["--guide", "regex", "a+"]
    assert client.__main__.main([*argv, "--no-stream", "--quiet", "--model", "m", *server_flags(fake)]) == 0
    received = fake.received[0]
    assert received.model == "m"
    assert {name: received.values(name) for name in received.inputs} == {
        "text_input": ["Once"],
        "max_tokens": [5],
        "min_tokens": [2],
        "temperature": [0.5],
        "top_k": [4],
        "top_p": [0.25],
        "min_p": [0.125],
        "repetition_penalty": [1.5],
        "presence_penalty": [0.5],
        "frequency_penalty": [-0.5],
        "seed": [3],
        "stop_words": ["a", "b c"],
        "ignore_eos": [True],
        "num_return_sequences": [1],
        "priority": [2],
        "deadline_ms": [900],
        "guided_decoding_guide_type": ["regex"],
        "guided_decoding_guide": ["a+"],
        "stream": [False],
    }
    assert capsys.readouterr().err == ""


def test_reads_the_question_from_standard_input(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert client.__main__.main(["-", "--raw", *server_flags(fake)]) == 0
    assert fake.received[0].values("text_input") == ["from a pipe"]


def test_several_answers_are_printed_whole(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    first_parts = [
        Reply({"text_output": [text], "token_ids": [1], "sequence_index": [index]})
        for index, text in enumerate(("A", "B"))
    ]
    fake.script = lambda _: [*first_parts, answer("b", [2], index=1, final=False), answer("a", [2], index=0)]
    assert client.__main__.main(["x", "-n", "2", *server_flags(fake)]) == 0
    printed = capsys.readouterr()
    assert printed.out == "[2/2] Bb\n[1/2] Aa\n"
    assert "4 output tokens" in printed.err
    assert printed.err.endswith("finished: stop, stop\n")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_error_of_the_server_is_one_line(
    fake: FakeTriton, protocol: Protocol, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = lambda _: [Failure("max_tokens: at least 1, not 0")]
    assert client.__main__.main(["x", *server_flags(fake, protocol)]) == 1
    assert capsys.readouterr().err == "client: max_tokens: at least 1, not 0\n"


def test_an_answer_that_ended_in_an_error_is_a_failure(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = lambda _: [answer("half", [1], reason="error")]
    assert client.__main__.main(["x", *server_flags(fake)]) == 1
    assert capsys.readouterr().err.endswith("client: the server ended the answer with an error\n")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_server_is_one_line_with_the_remedy(protocol: Protocol, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTriton(greeting) as gone:
        flags = server_flags(gone, protocol)
    assert client.__main__.main(["x", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("client: no server answers at 127.0.0.1:")
    assert "make serve" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "question: wanted"),
        (["x", "--chat"], "question: not wanted with --chat"),
        (["x", "--raw", "--system", "s"], "--raw: "),
        (["--chat", "--raw"], "--raw: "),
        (["--chat", "-n", "2"], "-n: "),
        (["x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["x", "--seed", "-1"], "seed: -1 does not fit UINT64"),
        (["x", "--temperature", "nan"], "temperature: nan"),
        (["x", "--url", "https://a"], "url: host:port"),
        (["\udc80"], "question: not text"),
        (["x", "--max-token", "5"], "--max-token"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv, program="client")
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c_cancels_at_the_server_and_exits_130(fake: FakeTriton, protocol: Protocol) -> None:
    fake.script = lambda _: [Reply({"text_output": ["so far\n"], "token_ids": [1]}), Pause(30), answer("", [2])]
    process = start("client", "x", *server_flags(fake, protocol))
    assert process.stdout is not None
    assert process.stdout.readline() == "so far\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "client: cancelled\n")
    assert fake.cancelled.wait(30)


def test_a_reader_that_leaves_ends_it_quietly(fake: FakeTriton) -> None:
    endless = [Reply({"text_output": ["line\n" * 20000], "token_ids": [1]})] * 50
    fake.script = lambda _: [*endless, answer("", [2])]
    process = start("client", "x", *server_flags(fake))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_chat_keeps_history_of_the_turns_that_worked(
    fake: FakeTriton, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(received: Received) -> list[Step]:
        question = json.loads(received.values("messages")[0])[-1]["content"]
        if question == "bad":
            return [Reply({"text_output": ["ha"], "token_ids": [1]}), Failure("no")]
        return [answer(f"re {question}", [1])]

    fake.script = script
    lines = ["one", "bad", "", "/nonsense", "two", "/reset", "three", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert client.chat.main(["--system", "s", "--quiet", *server_flags(fake)]) == 0
    asked = [[m["content"] for m in json.loads(received.values("messages")[0])] for received in fake.received]
    assert asked == [["s", "one"], ["s", "one", "re one", "bad"], ["s", "one", "re one", "two"], ["s", "three"]]
    printed = capsys.readouterr()
    assert printed.out == "re one\nha\nre two\nre three\n"
    assert "client: no\n" in printed.err
    assert "/nonsense: no such command" in printed.err


def test_chat_ctrl_c_stops_the_answer_and_goes_on(fake: FakeTriton) -> None:
    fake.script = lambda _: [Reply({"text_output": ["so far\n"], "token_ids": [1]}), Pause(30), answer("", [2])]
    command = [sys.executable, "-m", "client", "--chat", *server_flags(fake)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("one\n")
            process.stdin.flush()
            assert process.stdout.readline() == "so far\n"
            process.send_signal(signal.SIGINT)
            assert fake.cancelled.wait(30)
            fake.script = lambda _: [answer("done", [1])]
            output, error = process.communicate("two\n", timeout=60)
        except BaseException:
            process.kill()  # else leaving the block would wait for it for ever
            raise
    assert (process.returncode, output) == (0, "done\n")
    assert "client: stopped" in error
    assert json.loads(fake.received[1].values("messages")[0]) == [{"role": "user", "content": "two"}]


def load_flags(fake: FakeTriton, *more: str) -> list[str]:
    return ["--url", fake.grpc_address, "--prompt-tokens", "4", "--ids", "10-12", "--json", "--quiet", *more]


def test_load_counts_what_came(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    assert client.load.main(load_flags(fake, "--streams", "3", "--requests", "7", "--max-tokens", "9")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["requests_done"] == len(fake.received) == 7
    assert (report["output_tokens"], report["responses"], report["tokens_per_response"]) == (21, 14, 1.5)
    assert report["requests_failed"] == report["requests_unfinished"] == 0
    assert report["errors"] == {}
    assert 20 <= report["gap_p50_ms"] < 1000
    assert 0 < report["first_token_p50_ms"] <= report["first_token_p99_ms"] < 1000
    received = fake.received[0]
    assert received.inputs["max_tokens"] == ("INT32", (1, 1), [9])
    assert received.inputs["ignore_eos"] == ("BOOL", (1, 1), [True])
    assert received.inputs["prompt_token_ids"][:2] == ("INT32", (1, 4))


def test_load_measures_gaps_from_the_response_before(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = lambda _: [Pause(0.5), Reply({"token_ids": [1]}), Reply({"token_ids": [1]}), answer("", [2])]
    assert client.load.main(load_flags(fake, "--requests", "1")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gap_p99_ms"] < 400 < report["first_token_p50_ms"]


def test_load_prompts_depend_on_the_seed_alone(fake: FakeTriton) -> None:
    def prompts(*flags: str) -> list[list[int]]:
        fake.received.clear()
        assert client.load.main(load_flags(fake, "--requests", "5", *flags)) == 0
        return sorted(received.values("prompt_token_ids") for received in fake.received)

    assert prompts("--streams", "1") == prompts("--streams", "4") != prompts("--seed", "1")
    assert all(token_id in (10, 11, 12) for ids in prompts() for token_id in ids)


def test_load_counts_errors_by_kind(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    def script(received: Received) -> list[Step]:
        number = len(fake.received)
        if number <= 3:
            return [Failure(f"queue: {number} waiting")]
        return [Reply({"token_ids": [1]}), Drop()] if number == 4 else [Reply({"token_ids": [1]}, final=True)]

    fake.script = script
    assert client.load.main(load_flags(fake, "--streams", "1", "--requests", "5")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == {
        "queue: # waiting": 3,
        "UNAVAILABLE Socket closed": 1,
        "the stream ended without a finish_reason": 1,
    }
    assert (report["requests_done"], report["requests_failed"], report["output_tokens"]) == (0, 5, 2)


def test_load_is_bounded_in_time_and_cancels_what_is_left(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = lambda _: [Reply({"token_ids": [1]}), Pause(30), answer("", [2])]
    assert client.load.main(load_flags(fake, "--streams", "2", "--requests", "5", "--max-seconds", "0.5")) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["requests_done"], report["requests_unfinished"], report["output_tokens"]) == (0, 2, 2)
    assert 0.4 < report["wall_s"] < 2
    assert fake.cancelled.wait(30)


def test_load_ctrl_c_reports_what_was_measured(fake: FakeTriton) -> None:
    fake.script = lambda _: [Reply({"token_ids": [1]}), Pause(30), answer("", [2])]
    with start("client.load", "--url", fake.grpc_address, "--streams", "2") as process:
        assert process.stderr is not None
        assert "0/200 requests" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "requests_unfinished                      2\n" in output


def test_load_wants_a_ready_server(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.ready = False
    assert client.load.main(load_flags(fake)) == 1
    assert capsys.readouterr().err.startswith("client: the model ensemble at 127.0.0.1:")
    with FakeTriton(greeting) as gone:
        flags = load_flags(gone)
    assert client.load.main(flags) == 1
    assert "make serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--streams", "0"], "--streams: more than 0"),
        (["--ids", "5"], "--ids: FIRST-LAST"),
        (["--ids", "5-4"], "--ids: FIRST-LAST"),
        (["--url", "a:b"], "url: "),
    ],
)
def test_load_refuses_what_cannot_be_meant(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        client.load.main(argv)
    assert problem in capsys.readouterr().err
