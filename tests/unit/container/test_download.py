"""`download` fetches what the server reads, resumes, keeps a receipt, and says what to do when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.container.download import wanted_files
from backend.errors import ConfigError
from tests.unit.container.hub import Hub, running_hub

SOURCE = "hf://mistralai/Tiny"
WEIGHTS = os.urandom(300_000)
FILES = {
    "config.json": b"{}",
    "tekken.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[:1000],
    "model.safetensors.index.json": b"{}",
    "consolidated.safetensors": WEIGHTS,
    "README.md": b"text",
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
}
WANTED = {
    "config.json",
    "tekken.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}


def run(hub: Hub, store: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NIM_", "NEMO_", "HF_"))}
    environment |= {"HF_ENDPOINT": hub.url, "NIM_CACHE_PATH": str(store), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(store / ".home"), "HF_HUB_ETAG_TIMEOUT": "5"} | variables
    return subprocess.run(
        [sys.executable, "-m", "backend.container", "download", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_the_server_reads_is_fetched_and_nothing_else(tmp_path: Path) -> None:
    with running_hub(Hub("mistralai/Tiny", FILES)) as hub:
        done = run(hub, tmp_path, SOURCE)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "mistralai--Tiny"
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == WANTED
        assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
        assert set(hub.fetched) == WANTED
        num_asked = len(hub.asked)
        again = run(hub, tmp_path, SOURCE)
        assert again.returncode == 0
        assert "is complete" in again.stderr
        assert len(hub.asked) == num_asked, "a complete store asks nobody"


def test_what_broke_off_is_resumed(tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    with running_hub(Hub("mistralai/Tiny", FILES, break_after={name: 200_000})) as hub:
        first = run(hub, tmp_path, SOURCE)
        if first.returncode:  # huggingface_hub may have resumed by itself
            assert "run `download` again to go on" in first.stderr
            second = run(hub, tmp_path, SOURCE)
            assert second.returncode == 0, second.stderr
        assert (tmp_path / "mistralai--Tiny" / name).read_bytes() == WEIGHTS
        assert hub.fetched.count(name) == 2


def test_a_file_that_was_lost_is_fetched_again(tmp_path: Path) -> None:
    with running_hub(Hub("mistralai/Tiny", FILES)) as hub:
        assert run(hub, tmp_path, SOURCE).returncode == 0
        (tmp_path / "mistralai--Tiny" / "tekken.json").unlink()
        assert run(hub, tmp_path, "hf://mistralai/Tiny").returncode == 0
        assert (tmp_path / "mistralai--Tiny" / "tekken.json").exists()


def test_offline_is_honoured(tmp_path: Path) -> None:
    with running_hub(Hub("mistralai/Tiny", FILES)) as hub:
        refused = run(hub, tmp_path, SOURCE, HF_HUB_OFFLINE="1")
        assert refused.returncode == 1
        assert "is not complete and HF_HUB_OFFLINE=1 forbids to fetch it" in refused.stderr
        assert hub.asked == []
        assert run(hub, tmp_path, NIM_MODEL_PATH=SOURCE).returncode == 0
        assert run(hub, tmp_path, SOURCE, HF_HUB_OFFLINE="1").returncode == 0


def test_gated_models_name_the_remedy_and_never_the_token(tmp_path: Path) -> None:
    with running_hub(Hub("mistralai/Tiny", FILES, needs_token=True)) as hub:
        refused = run(hub, tmp_path, SOURCE, HF_TOKEN="hf_wrong")
        assert refused.returncode == 1
        assert "is gated: accept its terms at the hub, and set HF_TOKEN" in refused.stderr
        done = run(hub, tmp_path, SOURCE, HF_TOKEN="secret")
        assert done.returncode == 0, done.stderr
        assert "hf_wrong" not in refused.stderr
        assert "secret" not in done.stderr


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with running_hub(Hub("mistralai/Tiny", FILES)) as hub:
        missing = run(hub, tmp_path, "hf://mistralai/Other")
        assert missing.returncode == 1
        assert "hf://mistralai/Other: not at the hub" in missing.stderr
        for wrong in ("mistralai/Tiny", "hf://Tiny", "/models/x"):
            assert "hf://ORGANISATION/NAME" in run(hub, tmp_path, wrong).stderr
        assert "Traceback" not in missing.stderr


def test_a_store_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with running_hub(Hub("mistralai/Tiny", FILES)) as hub:
        refused = run(hub, tmp_path / "file" / "store", SOURCE, HF_HOME=str(tmp_path / "home"))
        assert refused.returncode == 1
        assert "must be a mount that user" in refused.stderr


def test_choice_of_files() -> None:
    mistral = ["params.json", "consolidated.safetensors", "tekken.json"]
    assert wanted_files(mistral) == mistral
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        wanted_files(["pytorch_model.bin"])
