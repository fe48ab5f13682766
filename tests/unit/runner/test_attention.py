"""The products and the attention by themselves, where the whole model would not show a difference."""

from __future__ import annotations

import pytest
import torch

from backend.checkpoint.matrix import Matrix
from backend.engine.plan import PlanRow
from backend.runner.attention import attend
from backend.runner.linear import linear
from backend.runner.work_items import CPU_SIZES, build_work_items

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_rows", [16, 48])
def test_every_linear_product_has_16_rows(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(num_rows, 32), torch.randn(24, 32)
    row_counts: list[int] = []
    mm = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        row_counts.append(len(a))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    result = linear(x, Matrix(weight), is_tiled=True)
    assert row_counts == [16] * (num_rows // 16)
    torch.testing.assert_close(result, x @ weight.T)


def test_rows_that_fill_no_tile_are_refused() -> None:
    with pytest.raises(AssertionError):
        linear(torch.randn(17, 32), Matrix(torch.randn(24, 32)), is_tiled=True)


def test_attention_is_softmax_over_what_is_visible() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 4 * 2, 64, 32, generator=generator)
    queries = 2.0 * torch.randn(16, 6, 32, generator=generator)
    rows = (PlanRow(0, 125, 10, (1,) * 10, (3, 0, 2), True), PlanRow(1, 9, 1, (), (1,), True))
    items = build_work_items(rows, 6, 2, CPU, CPU_SIZES)
    result = attend(queries, keys, values, items)
    for token, (row, position) in enumerate([*((rows[0], 125 + n) for n in range(10)), (rows[1], 9)]):
        for head in range(6):
            tiles = [page * 2 + head // 3 for page in row.page_ids]
            k, v = (torch.cat([kv[tile] for tile in tiles])[: position + 1] for kv in (keys, values))
            torch.testing.assert_close(result[token, head], torch.softmax(k @ queries[token, head], 0) @ v)
    assert not result[11:].any()


def test_hidden_keys_have_no_weight_at_all() -> None:
    keys, values = torch.zeros(2, 2, 64, 32)
    values[0, 10:] = 3e38
    values[1] = -3e38
    row = PlanRow(0, 9, 1, (), (0, 1), True)
    assert not attend(torch.ones(16, 4, 32), keys, values, build_work_items((row,), 4, 1, CPU, CPU_SIZES)).any()


def test_scores_far_apart_do_not_underflow_into_errors() -> None:
    keys, values = torch.zeros(2, 2, 64, 32)
    keys[0, 3] = 1e4
    values[:] = torch.arange(64.0)[:, None]
    row = PlanRow(0, 100, 1, (), (0, 1), True)
    result = attend(torch.ones(16, 4, 32), keys, values, build_work_items((row,), 4, 1, CPU, CPU_SIZES))
    assert torch.equal(result[0], torch.full((4, 32), 3.0))
