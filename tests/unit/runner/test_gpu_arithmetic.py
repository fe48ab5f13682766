"""What the PyTorch runner computes on a GPU, run on the CPU: the same calls of PyTorch. It has not run on a GPU yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend.checkpoint.matrix import Matrix
from backend.engine.plan import PlanRow
from backend.runner import select
from backend.runner.attention import attend
from backend.runner.gathered_attention import GatherSize, attend_gathered, group_rows
from backend.runner.linear import linear
from backend.runner.placement import Arithmetic, Placement, choose_placement
from backend.runner.torch_runner import TorchRunner
from backend.runner.work_items import CPU_SIZES, build_work_items
from backend.settings import Settings
from tests.checkpoints import make_checkpoint
from tests.unit.runner.driver import Driver, Script, random_prompt

CPU = torch.device("cpu")
ROWS = (
    PlanRow(0, 3, 1, (), (5,), True),
    PlanRow(1, 200, 1, (), (1, 7, 2, 9), True),
    PlanRow(2, 64, 1, (), (3, 8, 4), True),  # one page more than it fills
    PlanRow(3, 50, 70, (1,) * 70, (0, 6), True),
    PlanRow(4, 0, 5, (1,) * 5, (10,), False),
)


@pytest.mark.parametrize("max_pages", [4, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_attention_over_gathered_pages(max_pages: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(11 * 2, 64, 32, generator=generator).to(dtype) for _ in range(2))
    queries = torch.randn(80, 6, 32, generator=generator)
    groups = group_rows(ROWS, 2, CPU, GatherSize(max_pages))
    assert all(group.tiles.shape[0] * group.tiles.shape[2] <= max_pages for group in groups)
    expected = attend(queries, keys, values, build_work_items(ROWS, 6, 2, CPU, CPU_SIZES))
    # In BF16 a query and a weight lose up to 2^-9 of themselves, and so does the result.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    result = attend_gathered(queries, keys, values, groups)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
    assert not result[78:].any()


def test_rows_of_one_token_share_calls_that_hold_little_padding() -> None:
    groups = group_rows(ROWS, 2, CPU, GatherSize(5))
    assert [group.tokens.tolist() for group in groups] == [[1], [2, 0], [*range(3, 73)], [*range(73, 78)]]
    assert groups[1].is_seen is not None
    assert groups[1].is_seen.sum(dim=-1).flatten().tolist() == [65, 4]


def test_what_other_sequences_left_in_pages_has_no_influence() -> None:
    keys, values = torch.zeros(2, 11 * 2, 64, 32)
    values[:] = torch.nan
    for page in (1, 7, 2, 9, 3, 8):
        values[2 * page : 2 * page + 2] = 2.0
    groups = group_rows(ROWS[1:3], 2, CPU, GatherSize(8))
    assert torch.equal(attend_gathered(torch.ones(2, 6, 32), keys, values, groups), torch.full((2, 6, 32), 2.0))


def logits(folder: Path, arithmetic: Arithmetic | None, **settings: Any) -> torch.Tensor:
    """Of prompts in chunks and token by token, side by side."""
    limits: dict[str, Any] = {
        "num_pages": 12,
        "max_num_seqs": 2,
        "max_model_len": 256,
        "num_threads": 1,
        "device": "cpu",
    }
    runner = TorchRunner(folder, arithmetic=arithmetic, **limits | settings)
    generator = np.random.default_rng(0)
    prompts = [random_prompt(generator, length) for length in (150, 90)]
    scripts = [
        Script(prompt, chunks=chunks, slot=slot, pages=pages, is_every_chunk_sampled=True)
        for slot, (prompt, chunks, pages) in enumerate(
            zip(prompts, ((70, 60, *(1,) * 20), (80, *(1,) * 10)), ((0, 5, 2), (7, 3)), strict=True)
        )
    ]
    Driver(runner).run(scripts)
    runner.close()
    return torch.cat([torch.stack(script.logits).cpu() for script in scripts])


@pytest.mark.parametrize("input_scale", [None, torch.tensor([0.03])], ids=["scales of rows", "scale of the checkpoint"])
@pytest.mark.parametrize(("has_scaled_mm", "tolerance"), [(True, 1e-5), (False, 2.0**-8)])
def test_fp8_products_are_those_of_the_same_values(
    input_scale: torch.Tensor | None, has_scaled_mm: bool, tolerance: float
) -> None:
    """Sums in FP32 here and there; where values are widened, results are BF16."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(48, 64, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(48, generator=generator)
    x = 3.0 * torch.randn(32, 64, generator=generator)
    expected = linear(x, Matrix(values.float(), scales, input_scale), is_tiled=True)
    actual = linear(x, Matrix(values, scales, input_scale), is_tiled=False, has_scaled_mm=has_scaled_mm)
    magnitudes = linear(x.abs(), Matrix(values.float().abs(), scales, input_scale), is_tiled=True)
    assert ((actual - expected).abs() <= tolerance * magnitudes).all()


def test_the_whole_model_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the tiled model, as far as e4m3 inputs that round the other way here and there let it be."""
    num_calls = 0
    scaled_mm = torch._scaled_mm

    def counted(x: torch.Tensor, weight: torch.Tensor, **others: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return scaled_mm(x, weight, **others)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    folder = make_checkpoint(tmp_path, num_layers=1)
    settings = {"weight_dtype": "fp8", "head_dtype": "fp8", "kv_dtype": "fp8"}
    expected = logits(folder, None, **settings)
    assert num_calls == 0
    actual = logits(folder, Arithmetic(is_tiled=False, has_scaled_mm=True), **settings)
    assert num_calls > 0
    assert float((actual - expected).square().mean()) < 0.3**2 * float(expected.square().mean())


def test_it_says_what_it_computes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    limits: dict[str, Any] = {"num_pages": 4, "max_num_seqs": 1, "max_model_len": 64}
    arithmetic = Arithmetic(is_tiled=False, has_scaled_mm=True)
    described = TorchRunner(folder, device="cpu", arithmetic=arithmetic, **limits).describe()
    assert (described["weight_dtype"], described["kv_dtype"]) == ("bf16", "bf16")
    assert described["attention"] == "scaled_dot_product_attention over gathered pages"
    assert described["fp8_products"] == "torch._scaled_mm"
    assert described["batch_invariant"].startswith("no: cuBLAS and scaled_dot_product_attention")


@pytest.mark.parametrize(
    ("capability", "has_scaled_mm", "reason"),
    [
        ((8, 0), False, "our own CUDA engine is for compute capability 9.0 (Hopper), this GPU has 8.0"),
        ((8, 9), True, "our own CUDA engine is for compute capability 9.0 (Hopper), this GPU has 8.9"),
        ((9, 0), True, "our own CUDA engine has not been run on hardware yet"),
        ((12, 0), True, "our own CUDA engine is for compute capability 9.0 (Hopper), this GPU has 12.0"),
    ],
)
def test_what_a_gpu_gets(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_scaled_mm: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    placement = choose_placement()
    assert placement.device == torch.device("cuda:0")
    assert placement.arithmetic == Arithmetic(is_tiled=False, has_scaled_mm=has_scaled_mm)
    assert (placement.weight_format.dense, placement.kv_dtype) == (torch.bfloat16, torch.bfloat16)
    assert select._reason(Settings(checkpoint="any"), placement) == reason
    assert isinstance(placement, Placement)
