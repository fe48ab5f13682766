"""The wall clock of a live server jumps while it serves: only stamps follow it.

`make test` lets it jump an hour ahead; `make faults` also back, and by ten years.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.triton.calls import CALL_TIMEOUT_S, ask, grpc_stream
from tests.triton.live_server import STUBS, LiveServer, wait_until
from tests.triton.metrics import read_settled_metrics, wait_for_metric, wait_until_idle
from tests.triton.running import NUM_KINDS, only_in_make_faults, running
from tests.triton.wall_clock import WallClock

HOUR_S = 3600
YEARS_S = 10 * 365 * 24 * HOUR_S
JUMPS = [
    pytest.param(HOUR_S, id="an hour ahead"),
    pytest.param(0, id="an hour back", marks=only_in_make_faults),
    pytest.param(-HOUR_S, id="another hour back", marks=only_in_make_faults),
    pytest.param(YEARS_S, id="ten years ahead", marks=only_in_make_faults),
    pytest.param(0, id="ten years back", marks=only_in_make_faults),
]
MAX_TOKENS = 600
DEADLINE_MS = 700
LONG: dict[str, Any] = {"prompt_token_ids": [1, 1500], "max_tokens": 4000, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "mistral-nemo", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
# Waits an hour by the wall clock, in four ways that the C library and futexes have; and a second by the other clock.
WAITS = """
import ctypes, threading, time

class Deadline(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]

libc = ctypes.CDLL(None, use_errno=True)
deadline, room = ctypes.byref(Deadline(int(time.time()) + 3600, 0)), [ctypes.create_string_buffer(64) for _ in range(6)]
libc.pthread_mutex_lock(room[0])
libc.pthread_mutex_lock(room[1])
ETIMEDOUT, FUTEX, WAIT_BITSET_BY_WALL_CLOCK = 110, 202, 9 | 256

def is_over(way):
    if way == "condition":
        return libc.pthread_cond_timedwait(room[2], room[1], deadline) == ETIMEDOUT
    if way == "mutex":
        return libc.pthread_mutex_timedlock(room[0], deadline) == ETIMEDOUT
    if way == "semaphore":
        status = libc.sem_timedwait(room[3], deadline)
    else:
        status = libc.syscall(FUTEX, room[4], WAIT_BITSET_BY_WALL_CLOCK, 0, deadline, None, -1)
    return status == -1 and ctypes.get_errno() == ETIMEDOUT

def wait(way):
    while not is_over(way):
        pass
    said.append(way)

said = []
threads = [threading.Thread(target=wait, args=[way]) for way in ("condition", "mutex", "semaphore", "futex")]
for thread in threads:
    thread.start()
print(time.time(), flush=True)
began_s = time.monotonic()
time.sleep(1.0)
slept_s = time.monotonic() - began_s
for thread in threads:
    thread.join()
print(*said, slept_s, time.time())
"""


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> WallClock:
    return WallClock(tmp_path_factory.mktemp("clock"))


@dataclass(frozen=True)
class Clocked:
    """A server that reads a clock of its own, and what requests get while nothing happens to that."""

    server: LiveServer
    ids: list[list[int]]
    chat: str


@pytest.fixture(scope="module")
def clocked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, clock: WallClock) -> Iterator[Clocked]:
    folder = tmp_path_factory.mktemp("clocked") / "server"
    server = LiveServer(checkpoint, folder, has_gateway=True, log_format="json")
    server.environment |= clock.environment
    try:
        server.start().wait_until_ready()
        server.wait_until_gateway_ready()
        assert all(clock.is_read_by(pid) for pid in server.pids())
        with running(server, MAX_TOKENS) as answers:
            ids = [each.result(CALL_TIMEOUT_S).ids() for each in answers]
        yield Clocked(server, ids, chat(server)["choices"][0]["message"]["content"])
        server.stop()
    finally:
        server.kill_everything()


def chat(server: LiveServer) -> dict[str, Any]:
    """One chat through the gateway."""
    connection = http.client.HTTPConnection("127.0.0.1", server.openai_port, timeout=CALL_TIMEOUT_S)
    try:
        body = json.dumps(CHAT | {"max_tokens": MAX_TOKENS, "ignore_eos": True})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    assert response.status == 200, content
    made: dict[str, Any] = json.loads(content)
    return made


def check_growth(before: dict[str, float], after: dict[str, float]) -> None:
    """Every sample is a number and none is below zero; counters only grow, and no time that was counted holds the jump."""
    for name, value in after.items():
        assert math.isfinite(value), f"{name}: {value}"
        assert value >= 0, f"{name}: {value}"
        kind = name.partition("{")[0]
        if name in before and kind.endswith(("_total", "_count", "_sum", "_bucket", "_us")):
            growth = value - before[name]
            assert growth >= 0, f"{name}: {before[name]} became {value}"
            growth_s = growth if kind.endswith("_seconds_sum") else growth / 1e6 if kind.endswith("_us") else 0.0
            assert growth_s < HOUR_S / 2, f"{name}: {before[name]} became {value}"


def stamps_of(server: LiveServer, request_id: str) -> list[float]:
    """When the lines of a request were written, by their own words."""
    lines = [json.loads(line) for line in server.log().splitlines() if request_id in line]
    return [datetime.fromisoformat(line["time"]).timestamp() for line in lines]


@pytest.mark.parametrize("offset_s", JUMPS)
def test_a_clock_that_jumps_decides_nothing(clocked: Clocked, clock: WallClock, offset_s: int) -> None:
    server = clocked.server
    wait_until_idle(server)
    processes, before = sorted(server.pids()), read_settled_metrics(server)
    parts = [server.pid_of(name) for name in (*STUBS, "engine", "tritonserver")]

    with ThreadPoolExecutor(1) as pool, running(server, MAX_TOKENS) as answers:
        chatting = pool.submit(chat, server)
        wait_for_metric(server, "num_requests_running", NUM_KINDS + 1)
        clock.jump(offset_s)
        assert not any(each.done() for each in answers), "nothing ran any more when the clock jumped"
        assert server.is_ready()
        assert server.is_gateway_ready()
        assert [each.result(CALL_TIMEOUT_S).ids() for each in answers] == clocked.ids
        assert chatting.result(CALL_TIMEOUT_S)["choices"][0]["message"]["content"] == clocked.chat

    with grpc_stream(server) as stream:
        stream.send(**LONG, stream=True, deadline_ms=DEADLINE_MS)
        stream.next()
        clock.jump(offset_s - HOUR_S)
        time.sleep(DEADLINE_MS / 2000)
        clock.jump(offset_s)
        *_, last = stream.until_final()
    assert last.values("finish_reason") == ["deadline"]
    assert last.value("num_output_tokens") < LONG["max_tokens"]
    assert last.value("last_token_time_ns") - last.value("arrival_time_ns") > DEADLINE_MS * 1e6 / 2

    request_id, asked_s = f"stamped-{offset_s}-{time.monotonic_ns()}", clock.now_s()
    assert len(ask(server, request_id=request_id, text_input="Hello", max_tokens=3).ids()) == 3
    created = chat(server)["created"]
    wait_until(lambda: stamps_of(server, request_id), 5.0, server.log)
    for stamp in (*stamps_of(server, request_id), created):
        assert asked_s - 2 < stamp < clock.now_s() + 2

    wait_until_idle(server)
    check_growth(before, read_settled_metrics(server))
    assert sorted(server.pids()) == processes
    assert [server.pid_of(name) for name in (*STUBS, "engine", "tritonserver")] == parts
    assert server.is_ready()


@only_in_make_faults
def test_a_clock_that_jumps_during_start_and_drain(
    checkpoint: Path, tmp_path: Path, clock: WallClock, clocked: Clocked
) -> None:
    """A server that is started by a clock far ahead, which goes back while it loads, and again while it drains."""
    server = LiveServer(checkpoint, tmp_path / "server")
    server.environment |= clock.environment
    try:
        clock.jump(YEARS_S)
        server.start()
        wait_until(server.pids, 5.0, "nothing was started")
        time.sleep(1.0)
        clock.jump(HOUR_S)
        server.wait_until_ready()
        with running(server, MAX_TOKENS) as answers:
            server.process.terminate()
            wait_until(lambda: not server.is_ready(), CALL_TIMEOUT_S, "still ready")
            clock.jump(-HOUR_S)
            assert [each.result(CALL_TIMEOUT_S).ids() for each in answers] == clocked.ids
        server.assert_ended(0)
    finally:
        clock.jump(0)
        server.kill_everything()


def test_the_clock_of_the_tests_moves_what_is_read_and_what_waits(clock: WallClock) -> None:
    """Waits for an hour of the wall clock are over when it jumps by two; one for a moment of the monotonic clock is not cut."""
    clock.jump(0)
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], env=os.environ | clock.environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            began_s = float(process.stdout.readline())
            clock.jump(2 * HOUR_S)
            said, _ = process.communicate(timeout=CALL_TIMEOUT_S)
        finally:
            clock.jump(0)
            process.kill()
    *ways, slept_s, ended_s = said.split()
    assert sorted(ways) == ["condition", "futex", "mutex", "semaphore"]
    assert float(slept_s) >= 1.0
    assert 2 * HOUR_S <= float(ended_s) - began_s < 2 * HOUR_S + CALL_TIMEOUT_S
