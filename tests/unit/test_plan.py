"""`python -m backend.plan`: its numbers worked out by hand, and the same as those an engine starts with."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.weights import weight_bytes
from backend.plan import NEMO_12B, main, parse_bytes, weight_format
from backend.runner import select
from backend.runner.gathered_attention import gathered_page_bytes
from backend.runner.memory_plan import page_bytes, workspace_bytes
from backend.runner.placement import Arithmetic, Placement
from backend.settings import Settings
from tests.checkpoints import make_checkpoint

NUM_PARAMETERS = 12_247_782_400  # of Mistral-Nemo-Instruct-2407, from its own index of tensors
NUM_NORM_WEIGHTS = 81 * 5120
NUM_LINEAR_WEIGHTS = NUM_PARAMETERS - NUM_NORM_WEIGHTS - 2 * 131072 * 5120


def test_weights_of_nemo_12b() -> None:
    """BF16: two bytes each, and norms in FP32. FP8: embedding and head stay BF16, and each row has a scale of four bytes."""
    assert weight_bytes(NEMO_12B, weight_format("bf16")) == 2 * NUM_PARAMETERS + 2 * NUM_NORM_WEIGHTS
    assert weight_bytes(NEMO_12B, weight_format("fp32")) == 4 * NUM_PARAMETERS
    num_rows = 40 * (4096 + 1024 + 1024 + 5120 + 14336 + 14336 + 5120)
    fp8 = NUM_LINEAR_WEIGHTS + 4 * num_rows + 2 * 2 * 131072 * 5120 + 4 * NUM_NORM_WEIGHTS
    assert weight_bytes(NEMO_12B, weight_format("fp8")) == fp8


def test_kv_and_workspace_of_nemo_12b() -> None:
    """K and V of 8 heads of 128 in 40 layers: 160 KiB a token in BF16. 512 rows of 33,792 and 4 * 256 + 128 rows of logits."""
    assert page_bytes(NEMO_12B, 2) == 64 * 160 * 1024
    assert page_bytes(NEMO_12B, 1) == 64 * 80 * 1024
    assert workspace_bytes(NEMO_12B, 512, 256) == 4 * (512 * (5120 + 2 * 14336) + 1152 * 131072)


def test_the_command_plans_for_an_80_gb_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu-memory", "80GB", "--weights", "fp8", "--kv", "fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    needed_bytes = workspace_bytes(NEMO_12B, 512, 256) + 2048 * gathered_page_bytes(NEMO_12B, 1)
    left = 72_000_000_000 - weight_bytes(NEMO_12B, weight_format("fp8")) - needed_bytes
    num_pages = left // (64 * 80 * 1024)
    assert lines == [
        f"memory: weights 12.66 GiB + workspace 1.38 GiB + KV {num_pages * 64 * 80 * 1024 / 2**30:.2f} GiB of 67.06 GiB "
        "on a device of 80.0 GB",
        f"kv_cache: {num_pages:,} pages = {num_pages * 64:,} tokens: {num_pages // 16} of 1,024, {num_pages // 64} of 4,096, "
        f"{num_pages // 512} of 32,768, {num_pages // 2048} of 131,072 tokens each",
    ]


def test_what_does_not_fit_is_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu-memory", "24GB"]) == 1
    assert "a device of 24.0 GB: weights 22.81 GiB + workspace 0.63 GiB + KV 0.01 GiB are more than the 20.12 GiB" in (
        capsys.readouterr().err
    )
    assert main(["--gpu-memory", "24GB", "--weights", "fp8"]) == 0


def test_another_checkpoint_and_other_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    asked = ["--gpu-memory", "64MB", "--checkpoint", str(folder), "--weights", "fp32", "--kv", "fp32"]
    assert main(asked) == 0
    first = capsys.readouterr().out
    limits = ["--max-step-tokens", "16", "--max-num-seqs", "8", "--memory-fraction", "0.5"]
    assert main([*asked, *limits]) == 0
    second = capsys.readouterr().out
    assert "of 0.05 GiB on" in first
    assert "of 0.03 GiB on" in second
    assert main(["--gpu-memory", "64MB", "--checkpoint", str(tmp_path / "none")]) == 1
    assert "none does not exist; give the folder" in capsys.readouterr().err


def test_it_is_the_plan_an_engine_starts_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 10**9, 80 * 10**9))
    placement = Placement(torch.device("cuda:0"), Arithmetic(is_tiled=False), weight_format("bf16"), torch.bfloat16)
    needed_bytes, gathered = workspace_bytes(NEMO_12B, 512, 256), gathered_page_bytes(NEMO_12B, 2)
    plan = select._plan_for(placement, NEMO_12B, Settings(checkpoint="any"), needed_bytes, gathered)
    assert main(["--gpu-memory", "80GB"]) == 0
    printed = capsys.readouterr().out
    for name, value in plan.lines().items():
        assert f"{name}: {value.replace('cuda:0', 'a device of 80.0 GB')}\n" in printed


@pytest.mark.parametrize("text", ["80", "GB", "80 XB", "-1GB", ""])
def test_a_size_needs_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number and a unit"):
        parse_bytes(text)


def test_the_sizes_are_those_of_the_checkpoint_reader(tmp_path: Path) -> None:
    """The demo's sizes come from a file; those of the 12B model are written down, with the same derived sizes."""
    config = read_model_config(make_checkpoint(tmp_path / "tiny"))
    assert (config.query_size, config.kv_size) == (4 * 64, 64)
    assert (NEMO_12B.query_size, NEMO_12B.kv_size) == (32 * 128, 8 * 128)
