"""Told to stop, the server finishes what runs, takes nothing new, says 0, and leaves nothing behind."""

from __future__ import annotations

import signal
from concurrent.futures import wait

import pytest

from tests.triton.calls import Answer, ask, grpc_stream, post
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer, command_line, kill, wait_until
from tests.triton.metrics import wait_for_metric
from tests.triton.running import NUM_KINDS, PROMPT, answer, running


def stop_under_load(server: LiveServer, stop: signal.Signals | None) -> None:
    """Signal the supervisor, or press Ctrl-C in its terminal, while ten requests run; all of them must be answered whole."""
    expected = [answer(server, index, 500).ids() for index in range(2 * NUM_KINDS)]
    with running(server, max_tokens=500, count=2 * NUM_KINDS) as answers:
        if stop is None:
            assert server.process.stdin is not None
            server.process.stdin.write(b"\x03")
            server.process.stdin.flush()
        else:
            server.process.send_signal(stop)
        wait_until(lambda: not server.is_ready(), 20.0, "still ready")
        assert not all(each.done() for each in answers), "nothing ran any more when the signal came"
        assert post(server, "ensemble/generate", PROMPT | {"max_tokens": 2})[0] in (400, 404)
        assert len(wait(answers, timeout=30.0).done) == len(answers)
        assert [each.result().ids() for each in answers] == expected
        assert {each.result().finish_reason() for each in answers} == {"length"}
    server.assert_ended(0)


def test_sigterm_under_load(start_server: StartServer) -> None:
    stop_under_load(start_server(), signal.SIGTERM)


def test_control_c_in_the_terminal_under_load(start_server: StartServer) -> None:
    stop_under_load(start_server(in_terminal=True), None)


@pytest.mark.parametrize("how", ["grace is over", "second signal"])
def test_what_still_runs_is_taken_back(start_server: StartServer, how: str) -> None:
    server = start_server(grace_s=1.0 if how == "grace is over" else 60.0, max_num_seqs="4")
    with running(server, max_tokens=4000, count=4) as answers, grpc_stream(server) as waits:
        waits.send(**PROMPT, max_tokens=4000)
        wait_for_metric(server, "num_requests_waiting", 1)
        server.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            wait_until(lambda: "draining" in server.log(), 20.0, "it does not drain")
            server.process.send_signal(signal.SIGINT)
        assert len(wait(answers, timeout=40.0).done) == len(answers)
        assert {each.result().finish_reason() for each in answers} == {"cancelled"}
        assert all(len(each.result().ids()) < 4000 for each in answers)
        with pytest.raises(Exception, match="cancelled"):
            waits.next(20.0)
    server.assert_ended(0, timeout_s=45.0)  # less than the 60 s of grace that a second signal ends


def test_idle_clients_do_not_hold_it_up(start_server: StartServer) -> None:
    server = start_server(runner="fake")
    with grpc_stream(server) as idle:
        idle.send(**PROMPT, max_tokens=2)
        assert len(Answer(tuple(idle.until_final())).ids()) == 2
        server.stop()
        assert "grace period" not in server.log()


def test_requests_that_the_server_forgot_to_let_go_of_do_not_hold_it_up(start_server: StartServer) -> None:
    """A client that cancels in the moment of the final response makes server 2.51 hold its request for ever."""
    server = start_server()
    for model in ("ensemble", "mistral_nemo"):
        for _ in range(150):
            with grpc_stream(server) as stream:
                stream.send(model, **PROMPT, max_tokens=5, stream=True)
                assert len(Answer(tuple(stream.until_final())).ids()) == 5
                stream.cancel()
    server.stop()
    assert "grace period" not in server.log()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["at once", "while loading"])
def test_signal_during_start_up(start_server: StartServer, moment: str, stop: signal.Signals) -> None:
    server = start_server(is_ready=False)
    wait_until(lambda: "starting tritonserver" in server.log(), 30.0, server.log)
    if moment == "while loading":
        engines = wait_until(lambda: pids_of_engines(server), 30.0, server.log)
        kill(engines[0], signal.SIGSTOP)  # a checkpoint that takes for ever
        wait_until(lambda: "loaded preprocessing" in server.log(), 30.0, server.log)
    server.stop(stop)
    assert "Traceback" not in server.log()
    assert "nemo.serve: ready in" not in server.log()


def pids_of_engines(server: LiveServer) -> list[int]:
    return [pid for pid in server.pids() if "backend.engine.process" in command_line(pid)]


def test_second_server_on_the_same_machine(start_server: StartServer) -> None:
    first, second = start_server(runner="fake", is_ready=False), start_server(runner="fake", is_ready=False)
    first.wait_until_ready()
    second.wait_until_ready()
    request = PROMPT | {"max_tokens": 9, "seed": 5}
    expected = ask(first, **request).ids()
    assert ask(second, **request).ids() == expected
    first.stop()
    assert ask(second, **request).ids() == expected
    second.stop()
