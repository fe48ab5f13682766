"""What cannot be served is refused before anything runs, or as soon as it is known: one clear line, exit status 1."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import socket
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from backend.serve import main
from tests.checkpoints import make_checkpoint, write_tekken
from tests.triton.conftest import StartServer
from tests.triton.live_server import PROJECT, LiveServer, free_ports, serve_command, server_environment, wait_until

LINE = re.compile(r"^\d\d:\d\d:\d\d E nemo\.serve: (.*)$")


def refusal(checkpoint: Path, *arguments: str, **variables: str) -> str:
    """The one line with which the supervisor refuses."""
    http, grpc, metrics = map(str, free_ports(3))
    command = serve_command("--checkpoint", str(checkpoint), "--http-port", http, "--grpc-port", grpc)
    command += ["--metrics-port", metrics, "--question", "", *arguments]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=server_environment() | variables,
        capture_output=True,
        timeout=60,
        check=False,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    matched = LINE.match(done.stderr.rstrip("\n"))
    assert matched, done.stderr
    return matched[1]


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_occupied_port(checkpoint: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        line = refusal(checkpoint, f"--{name}-port", str(port))
    assert line == (
        f"port {port} cannot be used (Address already in use): stop what listens there, or choose another: "
        f"make serve {name.upper()}_PORT=..."
    )


def test_port_of_a_running_server(server: LiveServer, checkpoint: Path) -> None:
    assert f"port {server.http_port} cannot be used" in refusal(checkpoint, "--http-port", str(server.http_port))
    assert server.is_ready()


def test_bad_ports(checkpoint: Path) -> None:
    assert refusal(checkpoint, "--http-port", "4000", "--grpc-port", "4000").startswith(
        "ports must differ: HTTP_PORT 4000"
    )
    assert refusal(checkpoint, "--http-port", "70000") == "HTTP_PORT: must be in [1, 65535], got 70000"


def test_wrong_checkpoint_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / "empty"):
        assert str(path) in refusal(path)


def test_bad_settings(checkpoint: Path) -> None:
    unknown = refusal(checkpoint, NEMO_MAX_SEQS="4")
    assert unknown.startswith(
        "unknown setting 'max_seqs' (environment variable NEMO_MAX_SEQS); there are: checkpoint, runner, "
    )
    assert refusal(checkpoint, NEMO_MAX_NUM_SEQS="0") == "setting max_num_seqs: must be in [1, 4096], got 0"
    assert refusal(checkpoint, NEMO_MAX_NUM_SEQS="many") == "setting max_num_seqs: must be a whole number, got 'many'"
    assert refusal(checkpoint, NEMO_RUNNER="gpu").startswith("setting runner: must be one of auto, torch, cuda, fake")


def test_missing_libpython(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "LIBDIR" else real(name))

    def not_found(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", not_found)
    http, grpc, metrics = map(str, free_ports(3))
    arguments = ["--checkpoint", str(checkpoint), "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    assert main(arguments) == 1
    matched = LINE.match(capsys.readouterr().err.rstrip("\n"))
    assert matched
    assert re.fullmatch(
        r"libpython3\.1\d\.so\.1\.0 was not found in .*; Triton's Python stub needs it\. On Debian and Ubuntu: "
        r"apt-get install libpython3\.1\d; .*",
        matched[1],
    )


@pytest.mark.parametrize(
    "problem", ["tokenizer of another model", "no tokenizer", "broken weights", "quantised as AWQ"]
)
def test_checkpoint_that_turns_out_wrong_while_loading(
    checkpoint: Path, start_server: StartServer, tmp_path: Path, problem: str
) -> None:
    wrong = Path(shutil.copytree(checkpoint, tmp_path / "wrong"))
    if problem == "tokenizer of another model":
        write_tekken(wrong / "tekken.json", 3072)
        wanted = (
            f"{wrong}: the tokenizer has 3072 tokens, the model's vocabulary 4096; they belong to different checkpoints"
        )
    elif problem == "no tokenizer":
        (wrong / "tekken.json").unlink()
        wanted = "tekken.json"
    elif problem == "quantised as AWQ":
        config = json.loads((wrong / "config.json").read_text())
        (wrong / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
        wanted = "quantization_config.quant_method is not served (served are FP8 (e4m3)"
    else:
        (wrong / "model.safetensors").write_bytes((wrong / "model.safetensors").read_bytes()[:100_000])
        wanted = "model.safetensors"
    server = LiveServer(wrong, tmp_path / "server").start()
    try:
        server.assert_ended(1)
        errors = [matched[1] for line in server.log().splitlines() if (matched := LINE.match(line))]
        assert len(errors) == 1
        assert wanted in errors[0]
        assert "Traceback" not in errors[0]
    finally:
        server.kill_everything()


def test_both_layouts_serve(tmp_path: Path) -> None:
    """A folder as Mistral publishes it is served as one of Hugging Face is; the log says where the time of the start went."""
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "ffn_size": 96, "vocab_size": 2048, "has_tekken": True}
    server = LiveServer(make_checkpoint(tmp_path / "mistral", layout="consolidated", **sizes), tmp_path / "server")
    try:
        server.start().wait_until_ready()
        wait_until(lambda: "nemo.serve: ready in" in server.log(), 30.0, server.log)
        server.stop()
        said = dict(re.findall(r" I (nemo\.\w+): ready in \d+\.\d s: (.*)", server.log()))
        phases = {name: re.findall(r"([a-z-]+) \d+\.\d(?:, |$)", parts) for name, parts in said.items()}
        assert phases == {
            "nemo.engine": ["imports", "vocabulary", "weights", "memory", "engine"],
            "nemo.serve": ["checks", "tritonserver", "models", "ensemble"],
        }
    finally:
        server.kill_everything()
