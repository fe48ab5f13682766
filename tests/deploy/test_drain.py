"""A pod is deleted under load, with the chart's own probes, preStop and grace period: no request is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.deploy.helm import profile, render
from tests.deploy.kubelet import KubeletServer
from tests.deploy.test_monitoring import chat
from tests.triton.calls import Answer
from tests.triton.live_server import wait_until
from tests.triton.running import answer

slow = pytest.mark.skipif(os.environ.get("DEPLOY_CHECKS") != "all", reason="runs in `make drain-check`")
NUM_CLIENTS = 6
MAX_TOKENS = 200
ENDPOINT_REMOVAL_S = 2.0
"""How long load balancers go on sending to a pod that is being deleted; preStop waits longer (drain.endpointDelaySeconds)."""


@pytest.fixture
def pod(checkpoint: Path, tmp_path: Path) -> Iterator[KubeletServer]:
    (workload,) = [each for each in render(profile("cpu-demo")) if each["kind"] == "Deployment"]
    started = KubeletServer(workload, checkpoint, tmp_path / "pod")
    try:
        started.start_pod()
        yield started
    finally:
        started.stop_probes()
        started.kill_everything()


class Clients:
    """Clients behind a Service: each sends its next request as soon as it has an answer, while the pod is an endpoint."""

    def __init__(self, pod: KubeletServer) -> None:
        self._pod = pod
        self._is_endpoint = threading.Event()
        self._is_endpoint.set()
        self._pool = ThreadPoolExecutor(NUM_CLIENTS)
        self.answers: list[tuple[int, Answer]] = []
        self.chats: list[int] = []
        self._loops: list[Future[None]] = [self._pool.submit(self._work, number) for number in range(NUM_CLIENTS)]

    def _work(self, number: int) -> None:
        turn = 0
        while self._is_endpoint.is_set():
            if number == NUM_CLIENTS - 1:
                made = chat(self._pod, f"chat-{turn}", max_tokens=100, ignore_eos=True)
                self.chats.append(made["usage"]["completion_tokens"])
            else:
                self.answers.append((number, answer(self._pod, number, MAX_TOKENS)))
            turn += 1

    def remove_endpoint(self) -> None:
        """No new requests from now on; those on their way go on."""
        self._is_endpoint.clear()

    def finish(self) -> None:
        """Wait for what runs; whatever a client saw that was not a whole answer is raised here."""
        for loop in self._loops:
            loop.result(timeout=120.0)
        self._pool.shutdown()


def test_no_request_is_lost_when_a_pod_is_deleted(pod: KubeletServer) -> None:
    expected = [answer(pod, number, MAX_TOKENS).ids() for number in range(NUM_CLIENTS - 1)]
    clients = Clients(pod)
    wait_until(lambda: len(clients.answers) > NUM_CLIENTS and clients.chats, 120.0, "no load")
    remover = threading.Timer(ENDPOINT_REMOVAL_S, clients.remove_endpoint)
    num_before = len(clients.answers)
    remover.start()
    took_s = pod.delete_pod()
    clients.finish()
    assert pod.process.returncode == 0, pod.log()
    assert took_s < pod.grace_period_s
    assert len(clients.answers) > num_before, "nothing was answered while the pod went"
    assert all(given.ids() == expected[number] for number, given in clients.answers)
    assert {given.finish_reason() for _, given in clients.answers} == {"length"}
    assert set(clients.chats) == {100}
    assert not pod.liveness.is_failing.is_set() or pod.process.poll() is not None
    pod.assert_nothing_left(5.0)


@slow
def test_probes_see_a_server_that_loads_serves_and_goes(pod: KubeletServer) -> None:
    assert pod.startup.num_asked >= 1
    assert pod.readiness.succeeded.is_set()
    assert not pod.liveness.is_failing.is_set()
    pod.stop()
    pod.readiness.stop()
    assert not pod.is_ready()


@slow
def test_what_outlasts_the_grace_period_is_answered_all_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """Endless generations end as cancelled within the pod's grace period; nobody is cut off by SIGKILL."""
    values = profile("cpu-demo")
    values["drain"] = {"endpointDelaySeconds": 1, "graceSeconds": 3, "marginSeconds": 20}
    (workload,) = [each for each in render(values) if each["kind"] == "Deployment"]
    pod = KubeletServer(workload, checkpoint, tmp_path / "pod")
    try:
        pod.start_pod()
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(answer, pod, number, 4000) for number in range(3)]
            time.sleep(2.0)
            pod.delete_pod()
            given = [each.result(timeout=30.0) for each in answers]
        assert pod.process.returncode == 0
        assert {each.finish_reason() for each in given} <= {"cancelled", "length"}
        assert any(each.finish_reason() == "cancelled" for each in given)
    finally:
        pod.stop_probes()
        pod.kill_everything()
