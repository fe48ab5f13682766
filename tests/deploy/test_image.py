"""The image, built from docker/Dockerfile on a stand-in base: what is in it, what it refuses; it serves, reaps and drains."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.deploy.helm import PROJECT
from tests.deploy.image import ROOT, ImageServer, image_config, image_environment, run
from tests.triton.calls import post
from tests.triton.live_server import command_line, http_get, kill, wait_until
from tests.triton.running import PROMPT, answer, running

pytestmark = [
    pytest.mark.skipif(os.environ.get("DEPLOY_CHECKS") != "all", reason="runs in `make image-check`"),
    pytest.mark.timeout(600),
]
APP = ROOT / "opt" / "nemo" / "app"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ImageServer]:
    started = ImageServer(tmp_path / "server", grace_s=30)
    try:
        started.start()
        started.wait_until_ready()
        yield started
    finally:
        started.kill_everything()


def test_configuration() -> None:
    config = image_config()
    assert config["User"] == "1000:1000"
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp", "9000/tcp"}
    labels = {name.removeprefix("org.opencontainers.image.") for name in config["Labels"]}
    assert {"title", "description", "licenses", "version", "revision", "created", "base.name"} <= labels
    assert re.fullmatch("[0-9a-f]{40}", config["Labels"]["org.opencontainers.image.revision"])
    assert not any("PIP" in name or "TOKEN" in name for name in image_environment())


def test_only_what_it_runs_is_in_it() -> None:
    assert {path.name for path in APP.iterdir()} == {
        "LICENSE", "README.md", "pyproject.toml", "requirements", "backend", "client", "kernels", "model_repository", "tests",
    }  # fmt: skip
    assert [str(path.relative_to(APP)) for path in ROOT.rglob("*.safetensors")] == [
        "tests/demo/checkpoint/model.safetensors"
    ]
    assert [path.name for path in (APP / "tests" / "demo").iterdir()] == ["checkpoint"]
    writable = [path for path in APP.rglob("*") if path.stat().st_uid != 0 or path.stat().st_mode & 0o022]
    assert writable == []


def test_bill_of_materials_holds_what_is_locked() -> None:
    components = json.loads((ROOT / "opt" / "nemo" / "sbom.cdx.json").read_text())["components"]
    listed = {each["name"]: each["version"] for each in components}
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (PROJECT / "requirements" / "server.txt").read_text(), re.MULTILINE))
    assert {name: listed.get(name) for name in locked} == locked
    assert listed["torch"].startswith("2.13.0")
    assert "pytest" not in listed


def test_too_little_shared_memory_is_refused_with_the_remedy() -> None:
    done = run("serve", shared_memory="16m")
    assert done.returncode == 1
    assert "/dev/shm has 16 MiB free, 32 MiB are needed; `docker run --shm-size=256m`" in done.stderr


def test_commands() -> None:
    assert "no such command" in run("bash").stderr
    assert "kv_cache" in run("plan", "--gpu-memory", "80GB").stdout
    assert run("health", HTTP_PORT="1").returncode == 1
    done = run("check", REQUIRE_GPU="1")
    assert done.returncode == 1
    assert "gpu: none that nvidia-smi sees; give the container one: `docker run --gpus all`" in done.stderr


def test_it_serves_and_drains_under_load(server: ImageServer) -> None:
    assert "tini" in command_line(server.init_pid())
    assert Path(f"/proc/{server.init_pid()}/status").read_text().split("Uid:\t")[1].startswith("1000\t")
    assert run("health", HTTP_PORT=str(server.http_port)).returncode == 0
    prebuilt = {path.name for path in (ROOT / "opt" / "nemo" / "kernels").glob("*.cubin")}
    assert prebuilt
    assert {path.name for path in Path(f"/proc/{server.init_pid()}/root/tmp/nemo-kernels").glob("*.cubin")} == prebuilt
    asked = run("ask", "--protocol=http", f"--url=127.0.0.1:{server.http_port}", "--quiet", "What is Tekken?")
    assert "token" in asked.stdout.lower(), asked.stderr
    models = json.loads(http_get(server.openai_port, "/v1/models")[1])
    assert models["data"][0]["id"] == "nemo"
    expected = [answer(server, index, 300).ids() for index in range(10)]
    with running(server, max_tokens=300, count=10) as answers:
        kill(server.init_pid(), signal.SIGTERM)
        wait_until(lambda: not server.is_ready(), 30.0, "still ready")
        assert len(wait(answers, timeout=60.0).done) == len(answers)
        assert [each.result().ids() for each in answers] == expected
    assert server.process.wait(timeout=60) == 0, server.log()
    assert all(json.loads(line) for line in server.log().splitlines())


def test_what_is_orphaned_is_reaped(server: ImageServer) -> None:
    kill(server.pid_of("tritonserver"), signal.SIGKILL)  # its stubs now belong to process 1
    wait_until(lambda: "ready again" in server.log(), 120.0, server.log)
    assert post(server, "ensemble/generate", PROMPT | {"max_tokens": 2})[0] == 200
    wait_until(lambda: not server.zombies(), 20.0, lambda: f"zombies: {server.zombies()}")
    kill(server.init_pid(), signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
