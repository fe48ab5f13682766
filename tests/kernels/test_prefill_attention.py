"""Prefill attention: tiles, bits that do not depend on how a prompt is cut, PyTorch's results, and every barrier it needs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kernels.check import check_case
from kernels.errors import ContractError
from kernels.kv_layout import HEAD_DIM, unswizzled
from kernels.op import Case, Inputs
from kernels.prefill_attention import (
    CASES,
    OP,
    Chunk,
    make_inputs,
    max_tiles,
    plan_tiles,
    prefill_attention,
    tile_tokens,
)
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def run(inputs: Inputs, conditions: Conditions = PLAIN[0], num_sms: int = 4) -> torch.Tensor:
    inputs["out"].view(torch.uint8).fill_(0xFF)
    prefill_attention(EmulatedDevice(conditions, num_sms=num_sms), **inputs)
    out: torch.Tensor = inputs["out"]
    return out.clone()


def cut(inputs: Inputs, chunks: list[Chunk], rows: list[slice]) -> Inputs:
    """These chunks in one launch, whose queries are those rows of `inputs`, on the same pages."""
    num_heads, num_kv_heads = inputs["q"].shape[1], inputs["k_pages"].shape[1]
    tiles = plan_tiles(chunks, num_heads, num_kv_heads)
    return inputs | {
        "q": torch.cat([inputs["q"][its_rows] for its_rows in rows]),
        "out": torch.cat([inputs["out"][its_rows] for its_rows in rows]),
        "tiles": tiles,
        "num_tiles": torch.tensor([len(tiles)], dtype=torch.int32),
    }


def test_a_prompt_in_chunks_has_the_bits_of_the_whole() -> None:
    """Cut inside and at the edges of tiles and pages, alone or beside chunks of other sequences."""
    case = Case("prompts", {"H": 4, "K": 1}, {"chunks": ((0, 300), (0, 150), (0, 70))})
    inputs = make_inputs(case, seed=2)
    whole = run(inputs)
    sequences = [int(inputs["tiles"][inputs["tiles"][:, 1] == -first, 0][0]) for first in (0, -300, -450)]
    for cuts in ((0, 1, 300), (0, 64, 128, 300), (0, 129, 290, 299, 300)):
        for start, end in pairwise(cuts):
            alone = run(cut(inputs, [Chunk(sequences[0], start, end - start)], [slice(start, end)]))
            assert torch.equal(alone, whole[start:end]), f"{start} to {end}"
    together = [(1, 64, 150, 300), (0, 131, 300, 0), (2, 0, 70, 450)]
    rows = [slice(first + start, first + end) for _, start, end, first in together]
    chunks = [Chunk(sequences[index], start, end - start) for index, start, end, _ in together]
    mixed = run(cut(inputs, chunks, rows), num_sms=3)
    assert torch.equal(mixed, torch.cat([whole[its_rows] for its_rows in rows]))


def test_pages_anywhere_give_the_same_bits() -> None:
    inputs = make_inputs(Case("moved", {"H": 4, "K": 2}, {"chunks": ((100, 100), (0, 40))}), seed=5)
    expected = run(inputs)
    order = torch.randperm(len(inputs["k_pages"]), generator=torch.Generator().manual_seed(1))
    moved = inputs | {name: inputs[name][order] for name in ("k_pages", "v_pages")}
    moved["page_tables"] = order.argsort()[inputs["page_tables"].long()].int()
    assert torch.equal(run(moved, num_sms=1), expected)


def test_the_results_of_pytorch() -> None:
    inputs = make_inputs(Case("prompt", {"H": 4, "K": 2}, {"chunks": ((0, 150),)}), seed=3)
    pages = inputs["page_tables"][0].long()
    k, v = (
        unswizzled(inputs[name])[pages].float().transpose(1, 2).reshape(-1, 2, HEAD_DIM)[:150]
        for name in ("k_pages", "v_pages")
    )
    attended = torch.nn.functional.scaled_dot_product_attention(
        inputs["q"].float().transpose(0, 1),
        k.repeat_interleave(2, dim=1).transpose(0, 1),
        v.repeat_interleave(2, dim=1).transpose(0, 1),
        is_causal=True,
    )
    torch.testing.assert_close(run(inputs).float(), attended.transpose(0, 1).flatten(1), rtol=1e-2, atol=1e-2)


def test_rows_of_no_tile_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"H": 4, "K": 1}, {"chunks": ((0, 40), (0, 10))}), seed=1)
    whole = run(inputs)
    assert inputs["tiles"][0].tolist()[1:] == [0, 32, 40]
    inputs["num_tiles"][0] = 1
    part = run(inputs, CHECKED[0])
    assert torch.equal(part[32:40], whole[32:40])
    assert part.view(torch.uint8)[:32].eq(0xFF).all()
    assert part.view(torch.uint8)[40:].eq(0xFF).all()


def test_tiles_cover_every_token_once_longest_first() -> None:
    chunks = [Chunk(0, 0, 1000), Chunk(2, 31, 2), Chunk(1, 131_000, 72), Chunk(5, 64, 32)]
    tiles = plan_tiles(chunks, num_heads=32, num_kv_heads=8)
    seen = []
    for sequence, row_of_position_0, position, length in tiles.tolist():
        end = min(length, (position // 32 + 1) * 32)
        seen += [(sequence, at, row_of_position_0 + at) for at in range(position, end)]
    expected = [(chunk.sequence, chunk.start + i) for chunk in chunks for i in range(chunk.num_tokens)]
    assert sorted(seen, key=lambda item: item[2]) == [(*item, row) for row, item in enumerate(expected)]
    assert tiles[:, 2].tolist() == sorted(tiles[:, 2].tolist(), reverse=True)
    assert len(tiles) == 32 + 2 + 3 + 1
    assert len(tiles) <= max_tiles(1106, 4, 32, 8) == 34 + 8


@pytest.mark.parametrize(
    ("sizes", "changed", "message"),
    [
        ({"H": 9, "K": 1}, {}, "H is 9, expected 1 to 8"),
        ({"H": 5, "K": 2}, {}, "H is 5, expected a multiple of 2, 1 to 16"),
        ({"H": 2, "K": 1}, {"tiles": torch.zeros(0, 4, dtype=torch.int32)}, "n is 0, expected at least 1"),
        ({"H": 2, "K": 1}, {"out": torch.zeros(4, 128, dtype=torch.bfloat16)}, "width is 128, expected 256 to 256"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    sizes: dict[str, int], changed: dict[str, torch.Tensor], message: str
) -> None:
    inputs = make_inputs(Case("odd", sizes, {"chunks": ((0, 4),)}), seed=1)
    with pytest.raises(ContractError, match=f"prefill_attention: {message}"):
        prefill_attention(EmulatedDevice(), **inputs | changed)


def test_the_cases_reach_every_branch() -> None:
    emulated = [case for case in CASES if case.is_emulated]
    groups = {case.sizes["H"] // case.sizes["K"] for case in emulated}
    assert groups >= {1, 2, 3, 4, 8}
    assert {tile_tokens(group, 1) for group in groups} == {16, 32, 64, 128}
    assert {len(case.options["chunks"]) > 1 for case in emulated} == {True, False}
