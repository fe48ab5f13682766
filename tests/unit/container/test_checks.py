"""Each check finds what it must, with a remedy, and leaves a good machine alone."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from backend.container import checks
from backend.container.checks import Finding
from backend.container.gpu import Gpu, find_gpus, parse_gpus
from backend.plan import NEMO_12B
from backend.settings import Settings
from tests.checkpoints import make_checkpoint

H100 = parse_gpus("NVIDIA H100 80GB HBM3, 9.0, 81559, 4, 580.95.05")[0]
SIZES: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "ffn_size": 96, "vocab_size": 2048, "has_tekken": True}


def fatal(findings: list[Finding]) -> list[str]:
    assert all(finding.remedy for finding in findings if finding.is_fatal)
    return [finding.found for finding in findings if finding.is_fatal]


def warnings(findings: list[Finding]) -> list[str]:
    return [finding.found for finding in findings if finding.remedy and not finding.is_fatal]


def test_a_good_gpu() -> None:
    (finding,) = checks.check_gpu([H100], is_required=True, cuda_version=13)
    assert finding == Finding("gpu", "NVIDIA H100 80GB HBM3, 79.6 GiB, driver 580.95.05")


def test_no_gpu() -> None:
    assert fatal(list(checks.check_gpu([], is_required=True, cuda_version=12))) == ["none that nvidia-smi sees"]
    assert warnings(list(checks.check_gpu([], is_required=False, cuda_version=12))) != []


@pytest.mark.parametrize(
    ("changes", "cuda_version", "words"),
    [
        ({"driver": "535.104.05"}, 13, "535.104.05 is older than CUDA 13 needs, 580.65.06"),
        ({"compute_capability": (7, 5)}, 12, "compute capability 7.5 has no BF16 units"),
        ({"used_bytes": 20 * 2**30}, 12, "20.0 GiB of it are taken by others"),
    ],
)
def test_doubtful_gpus(changes: dict[str, Any], cuda_version: int, words: str) -> None:
    gpu = dataclasses.replace(H100, **changes)
    assert warnings(list(checks.check_gpu([gpu], is_required=True, cuda_version=cuda_version))) == [words]


def test_memory_of_the_model_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "read_model_config", lambda folder: NEMO_12B)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(24_500_000_000)  # sparse
    settings = Settings(checkpoint="/x")
    assert fatal(list(checks.check_memory(tmp_path, settings, [H100]))) == []
    small = dataclasses.replace(H100, total_bytes=16 * 10**9)
    (problem,) = fatal(list(checks.check_memory(tmp_path, settings, [small])))
    assert "GiB" in problem
    narrow = Settings(checkpoint="/x", weight_dtype="fp8", kv_dtype="fp8")
    assert fatal(list(checks.check_memory(tmp_path, narrow, [small]))) == []
    assert warnings(list(checks.check_memory(tmp_path, settings, []))) == ["24.5 GB of weights on the CPU"]


def test_whole_checkpoints_pass(tmp_path: Path) -> None:
    for layout in ("hf", "consolidated"):
        folder = make_checkpoint(tmp_path / layout, layout=layout, **SIZES)
        assert fatal(list(checks.check_checkpoint(folder))) == []


def test_broken_checkpoints(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good", **SIZES)

    def problems(name: str) -> list[str]:
        return fatal(list(checks.check_checkpoint(tmp_path / name)))

    assert problems("missing") != []
    for name in ("lfs", "shards", "no tokenizer", "no weights", "index"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "lfs" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert problems("lfs") == [f"{tmp_path / 'lfs'}: model.safetensors is a pointer of git-lfs, not the file"]
    index = '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(index)
    assert problems("shards") == [f"{tmp_path / 'shards'}: 1 of 2 shards are missing, the first is model-2.safetensors"]
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{")
    assert problems("index") == [f"{tmp_path / 'index'}: model.safetensors.index.json cannot be read"]
    (tmp_path / "no tokenizer" / "tekken.json").unlink()
    assert problems("no tokenizer") == [f"{tmp_path / 'no tokenizer'}: there is neither tekken.json nor tokenizer.json"]
    (tmp_path / "no weights" / "model.safetensors").unlink()
    assert "model*.safetensors: missing" in problems("no weights")[0]


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fatal(list(checks.check_shared_memory(tmp_path / "missing"))) != []
    real = os.statvfs("/")
    small = os.statvfs_result((4096, 4096, 0, 0, 64 * 64, *real[5:]))  # 16 MiB
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    assert fatal(list(checks.check_shared_memory())) == ["/dev/shm has 16 MiB free, 32 MiB are needed"]


def test_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fatal(list(checks.check_temporary_files())) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert fatal(list(checks.check_temporary_files())) != []


def test_gpus_are_read_from_a_real_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == []
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771, 3, 570.86.15'\n")
    command.chmod(0o755)
    assert find_gpus() == [Gpu("NVIDIA H200", (9, 0), 143771 * 2**20, 3 * 2**20, "570.86.15")]
    command.write_text("#!/bin/sh\nexit 9\n")
    assert find_gpus() == []
    command.write_text("#!/bin/sh\necho 'no devices'\n")
    with pytest.raises(OSError, match="no devices"):
        find_gpus()


def test_only_fatal_findings_keep_the_server_from_starting() -> None:
    findings = [
        Finding("a", "fine"),
        Finding("b", "odd", "mend it"),
        Finding("c", "broken", "mend it too", is_fatal=True),
    ]
    assert checks.report(findings[:2])
    assert not checks.report(findings)
