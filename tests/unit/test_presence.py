"""The files by which the supervisor knows its models: each is its writer's alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from backend.triton_adapter.presence import RUN_DIR_VARIABLE, announce, withdraw


def test_a_process_that_ends_leaves_its_successors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    path = tmp_path / "postprocessing.json"
    announce("postprocessing")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    announce("postprocessing", pid=4_000_000)
    withdraw("postprocessing")
    assert json.loads(path.read_text())["pid"] == 4_000_000
    withdraw("postprocessing", pid=4_000_000)
    assert not path.exists()
    withdraw("postprocessing")


def test_without_a_supervisor_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    announce("postprocessing")
    withdraw("postprocessing")
    assert list(tmp_path.iterdir()) == []
