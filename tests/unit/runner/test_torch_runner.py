from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.checkpoint.matrix import Matrix
from backend.checkpoint.model_config import read_model_config
from backend.engine.plan import PlanRow, SlotStart, StepPlan
from backend.engine.request import SamplingParams
from backend.errors import ConfigError
from backend.runner import invariance
from backend.runner.invariance import find_dependence
from backend.runner.kv_pages import KvPages
from backend.runner.linear import linear
from backend.runner.memory_plan import page_bytes
from backend.runner.model_runner import ModelRunner
from backend.runner.placement import choose_placement, num_physical_cores
from backend.runner.torch_runner import TorchRunner
from backend.runner.work_items import CPU_SIZES, ItemSizes, build_work_items
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_runner(folder: Path, **settings: Any) -> TorchRunner:
    return TorchRunner(
        folder, **({"num_pages": 2, "max_num_seqs": 2, "max_model_len": 128, "num_threads": 1} | settings)
    )


def test_it_is_a_model_runner_and_says_what_it_is(folder: Path) -> None:
    progress: list[tuple[int, int]] = []
    runner = make_runner(folder, device="cpu", progress=lambda done, total: progress.append((done, total)))
    as_protocol: ModelRunner = runner
    assert (as_protocol.num_pages, as_protocol.num_host_pages, as_protocol.max_num_seqs) == (2, 0, 2)
    assert as_protocol.describe() == {
        "runner": "torch",
        "device": "cpu (1 threads)",
        "weight_dtype": "fp32",
        "head_dtype": "fp32",
        "kv_dtype": "fp32",
        "batch_invariant": "yes",
    }
    assert progress[-1][0] == progress[-1][1] > 0
    runner.close()


def test_dtypes_as_set(folder: Path) -> None:
    description = make_runner(folder, weight_dtype="bf16").describe()
    assert (description["weight_dtype"], description["kv_dtype"]) == ("bf16", "bf16")
    description = make_runner(folder, weight_dtype="bf16", kv_dtype="fp32").describe()
    assert (description["weight_dtype"], description["kv_dtype"]) == ("bf16", "fp32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device: must be auto, cpu, cuda or cuda:<index>, got 'tpu'"),
        ({"device": "meta"}, "device: must be auto, cpu, cuda or cuda:<index>, got 'meta'"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there, PyTorch sees [0-9]+ CUDA devices"),
        ({"weight_dtype": "int3"}, "weight_dtype: must be one of auto, fp32, bf16, fp8, got 'int3'"),
        ({"kv_dtype": "fp4"}, "kv_dtype: must be one of auto, fp32, bf16, fp8, got 'fp4'"),
        ({"head_dtype": "bf16"}, "head_dtype: must be auto, fp8 or as the embedding, which is fp32 here, got 'bf16'"),
        ({"num_pages": 0}, "num_pages: must be at least 1, got 0"),
        ({"num_host_pages": -1}, "num_host_pages: must be at least 0, got -1"),
        ({"max_num_seqs": 0}, "max_num_seqs: must be at least 1, got 0"),
        ({"max_model_len": -1}, "max_model_len: must be at least 1, got -1"),
    ],
)
def test_unusable_settings(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_runner(folder, **settings)


def test_auto_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    chosen = choose_placement()
    assert (chosen.device, chosen.weight_format.dense, chosen.kv_dtype) == (
        torch.device("cuda:0"),
        torch.bfloat16,
        torch.bfloat16,
    )
    assert choose_placement("cpu").weight_format.dense == torch.float32


def test_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= num_physical_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"{int(path.parts[5][3:]) % 2}\n")
    assert num_physical_cores() == 2


def test_num_threads_is_set(folder: Path) -> None:
    before = torch.get_num_threads()
    make_runner(folder, num_threads=3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_bytes_of_pages(folder: Path, dtype: torch.dtype) -> None:
    config = read_model_config(folder)
    pages = KvPages(config, 5, device=CPU, dtype=dtype)
    held = sum(tensor.nbytes for layer in range(config.num_layers) for tensor in pages.tiles(layer))
    assert held == 5 * page_bytes(config, dtype.itemsize)


@pytest.mark.parametrize(
    "row",
    [
        PlanRow(2, 0, 1, (1,), (0,), True),
        PlanRow(0, 0, 2, (1,), (0,), True),
        PlanRow(0, 0, 2, (), (0,), True),
        PlanRow(0, 0, 2, (1, 2), (0,), True, num_forced=2),
        PlanRow(0, 0, 2, (1, 2), (0,), False, num_forced=1),
    ],
)
def test_plans_that_break_the_contract(folder: Path, row: PlanRow) -> None:
    with pytest.raises(AssertionError):
        make_runner(folder).launch(StepPlan(0, (row,)))


def test_a_step_is_drawn_once_and_before_anything_that_needs_its_ids(folder: Path) -> None:
    runner = make_runner(folder)
    step = runner.launch(StepPlan(0, (PlanRow(0, 0, 1, (1,), (0,), True, SlotStart(SamplingParams(), (1,))),)))
    decode = StepPlan(1, (PlanRow(0, 1, 1, (), (0,), True),))
    with pytest.raises(AssertionError, match="drawn before its result"):
        step.result()
    with pytest.raises(AssertionError, match="the step before was not drawn"):
        runner.launch(decode)
    step.draw({})
    with pytest.raises(AssertionError, match="drawn once"):
        step.draw({})
    runner.launch(decode).draw({})


def test_dependence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Matrix(torch.randn(32, 64))
    assert find_dependence([weight], 64) is None
    bmm, exp = torch.bmm, torch.exp

    def by_row(x: torch.Tensor, weight: Matrix, *, is_tiled: bool) -> torch.Tensor:
        y = linear(x, weight, is_tiled=is_tiled)
        return y + torch.arange(len(y))[:, None] * 1e-5

    def by_item(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = bmm(a, b)
        return y + torch.arange(len(y))[:, None, None] * 1e-5

    def by_place(x: torch.Tensor) -> torch.Tensor:
        y = exp(x)
        y[-1] *= 1.001
        y[0] *= 1.001
        return y

    with monkeypatch.context() as patch:
        patch.setattr(invariance, "linear", by_row)
        assert find_dependence([weight], 64) == "linear layers of shape [32, 64] round by row"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", by_item)
        assert find_dependence([weight], 64) == "batched products round by item"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "exp", by_place)
        assert find_dependence([weight], 64) == "exp or log round by place"


@pytest.mark.parametrize("sizes", [CPU_SIZES, ItemSizes(per_call=2, per_group=5)])
def test_every_pair_of_query_and_page_is_one_item(sizes: ItemSizes) -> None:
    rows = (
        PlanRow(0, 130, 1, (), (9, 4, 7), True),
        PlanRow(1, 0, 5, (1,) * 5, (2,), True),
        PlanRow(2, 60, 10, (1,) * 10, (5, 6), False),
    )
    num_heads, num_kv_heads, first_tokens = 6, 2, (0, 1, 6)
    expected = {
        (token, head, page, row.page_ids[page] * num_kv_heads + head // 3, min(row.start + index - page * 64, 63))
        for row, first in zip(rows, first_tokens, strict=True)
        for index, token in enumerate(range(first, first + row.num_tokens))
        for head in range(num_heads)
        for page in range((row.start + index) // 64 + 1)
    }
    found = []
    for group in build_work_items(rows, num_heads, num_kv_heads, CPU, sizes):
        real = dict(zip(group.output_sources.tolist(), group.output_rows.tolist(), strict=True))
        assert len(group.item_tiles) % sizes.per_call == 0
        for page, (first, count) in enumerate(group.page_steps):
            assert group.item_tiles[first : first + count].tolist() == list(range(count))
            for item in range(first, first + count):
                tile = int(group.item_tiles[item])
                for place in range(8):
                    query_row = int(group.tile_rows[tile * 8 + place])
                    assert real.get(tile * 8 + place, query_row) == query_row
                    last_visible = int(group.last_visible[item, place])
                    if tile * 8 + place in real and last_visible >= 0:
                        found.append(
                            (*divmod(query_row, num_heads), page, int(group.item_kv_tiles[item]), last_visible)
                        )
    assert len(found) == len(expected)
    assert set(found) == expected
