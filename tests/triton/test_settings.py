"""Settings have their effect on a live server: many at once, since each server costs seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.calls import ask, grpc_stream
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_for_metric, wait_until_idle


def test_settings_have_their_effect(start_server: StartServer, tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    own = start_server(
        default_max_tokens="7",
        default_deadline_ms="400",
        max_model_len="2048",
        max_num_seqs="1",
        max_queued_tokens="10",
        prefix_cache="false",
        recording=str(recordings),
        log_format="json",
        log_level="warning",
    )
    prompt = [1, *range(1300, 1500)]
    for _ in range(2):
        answer = ask(own, prompt_token_ids=prompt, ignore_eos=True, deadline_ms=60_000)
        assert len(answer.ids()) == 7
        assert answer.replies[-1].value("num_cached_tokens") == 0
    with pytest.raises(InferenceServerException, match="in the served max_model_len 2048, got 2048"):
        ask(own, prompt_token_ids=[1], max_tokens=2048)
    with grpc_stream(own) as holder, grpc_stream(own) as waiting:
        holder.send(prompt_token_ids=[1], max_tokens=2000, ignore_eos=True, deadline_ms=60_000)
        wait_for_metric(own, "num_requests_running", 1)
        waiting.send(prompt_token_ids=[1] * 8, max_tokens=1, deadline_ms=60_000)
        wait_for_metric(own, "num_requests_waiting", 1)
        with pytest.raises(
            InferenceServerException, match="8 prompt tokens wait and this request has 8, max_queued_tokens is 10"
        ):
            ask(own, prompt_token_ids=[1] * 8, max_tokens=1)
    wait_until_idle(own)
    # On a machine so busy that no token comes in time, the deadline is an error.
    assert ended_by(own) in ("deadline", "deadline_ms: nothing was generated within")
    own.stop()
    assert list(recordings.iterdir()), "an engine process writes what it was asked"
    lines = [json.loads(line) for line in own.log().splitlines()]
    assert {line["level"] for line in lines} <= {"warning", "error"}


def ended_by(server: LiveServer) -> str:
    """What ends a request that would take seconds: its finish reason, or the beginning of its error."""
    try:
        answer = ask(server, prompt_token_ids=[1], max_tokens=2000, ignore_eos=True)
    except InferenceServerException as error:
        return str(error.message())[: len("deadline_ms: nothing was generated within")]
    return answer.finish_reason()
