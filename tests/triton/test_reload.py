"""Each model unloaded and loaded again under load, by an operator who knows the secret: nothing hangs, and all is as before."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.triton.live_server import STUBS, LiveServer, command_line, wait_until
from tests.triton.metrics import wait_until_idle
from tests.triton.running import NUM_KINDS, answer, only_in_make_faults, running

LOAD_TIMEOUT_S = 90.0
pytestmark = only_in_make_faults


@pytest.fixture(scope="module")
def managed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose models the tests of this file load anew."""
    server = LiveServer(checkpoint, tmp_path_factory.mktemp("managed") / "server")
    try:
        yield server.start().wait_until_ready()
        server.stop()
    finally:
        server.kill_everything()


def manage(server: LiveServer, model: str, action: str) -> None:
    """`load` or `unload`, as the supervisor itself would."""
    found = re.search(r"http-restricted-api=\S+:([\w-]+)=(\w+)", command_line(server.pid_of("tritonserver")))
    assert found is not None
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=LOAD_TIMEOUT_S)
    try:
        connection.request("POST", f"/v2/repository/models/{model}/{action}", "{}", {found[1]: found[2]})
        response = connection.getresponse()
        assert response.status == 200, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("model", ["ensemble", *STUBS])
def test_a_model_is_loaded_anew_under_load(managed: LiveServer, model: str) -> None:
    """What runs ends whole; the model is unready at once and ready again when it is loaded; the supervisor lets it happen."""
    expected = [answer(managed, index, 300).ids() for index in range(NUM_KINDS)]
    with running(managed, max_tokens=300) as answers:
        manage(managed, model, "unload")
        wait_until(lambda: not managed.is_ready(model), 10.0, "still ready")
        assert len(wait(answers, timeout=60.0).done) == NUM_KINDS, "a request was not answered"
        whole = [each for each in answers if each.exception() is None]
        assert whole, [str(each.exception()) for each in answers]
        assert all(each.result().ids() in expected for each in whole)
    manage(managed, model, "load")
    manage(managed, "ensemble", "load")
    managed.wait_until_ready()
    assert [answer(managed, index, 300).ids() for index in range(NUM_KINDS)] == expected
    wait_until_idle(managed)
    assert "restart" not in managed.log()
