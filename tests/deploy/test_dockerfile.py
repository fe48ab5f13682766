"""The Dockerfile by itself: hadolint, and what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.deploy.helm import CHART, PROJECT

DOCKERFILE = PROJECT / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def test_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_torch_is_the_project_s_pin() -> None:
    pinned = re.search(r'"(torch==[\d.]+)"', (PROJECT / "pyproject.toml").read_text())
    assert pinned
    assert f"ARG TORCH={pinned[1]}\n" in TEXT


def test_versions_agree() -> None:
    version = re.search(r'^version = "([\d.]+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version[1]
    assert f"VERSION={version[1]} " in TEXT
    for path in ("compose.yaml", "kserve/serving-runtime.yaml"):
        assert f"image: nemo-triton:{version[1]}\n" in (PROJECT / "docker" / path).read_text()


def test_the_build_context_holds_what_is_copied_and_no_secrets() -> None:
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "everything is left out unless it is named"
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert all((PROJECT / path).exists() for path in kept)
    assert ".env" not in kept
    assert ".git" not in kept
