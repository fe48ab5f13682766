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
    bounds,
    make_inputs,
    max_tiles,
    plan_tiles,
    prefill_attention,
    prefill_attention_reference,
    tile_tokens,
)
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

_SCORES_WAIT = "        hw::wgmma_wait<1>();\n"
_KEYS_RELEASE = "        release(&empty[keys]);\n"
_SUMS_WAIT, _SUMS_RELEASE = "        hw::wgmma_wait<0>();\n", "        release(&empty[values]);\n"
_LAST_WAIT, _LAST_RELEASE = (
    "      hw::wgmma_commit();\n      hw::wgmma_wait<0>();\n",
    "      release(&empty[values]);\n",
)
_CLEANED = "            hw::fence_proxy_async();\n            __syncwarp();\n"
_CONVERTED = "          hw::fence_proxy_async();\n          __syncwarp();\n          if (lane == 0) {"
_QUERIES_CONVERTED = "        hw::fence_proxy_async();\n        group_sync(group);\n"
_VALID = "min(tile.length - (kv_tile + 1) * KV_TOKENS, KV_TOKENS)"
MUTANTS = tuple(
    Mutant.of(name, "prefill_attention.cu", old, new)
    for name, old, new in (
        ("mbarriers not fenced", "    hw::fence_mbarrier_init();\n", ""),
        ("barriers used before all know them", "  __syncthreads();\n  hw::griddep_wait();", "  hw::griddep_wait();"),
        ("tiles read before the dependency wait", "  hw::griddep_wait();\n  const int num_items", "  const int num_items"),
        ("zeros behind the queries not fenced", "    }\n    hw::fence_proxy_async();\n  }\n", "    }\n  }\n"),
        ("rows behind the queries not zeroed", "if constexpr (QUERY_ROWS < TILE_ROWS)", "if constexpr (false)"),
        ("copy before its slot is given back", "hw::mbarrier_wait(&given_back[place.slot], place.parity ^ 1);", ""),
        ("wrong parity of an empty slot", "&given_back[place.slot], place.parity ^ 1", "&given_back[place.slot], place.parity"),
        ("full slot not waited for", "      hw::mbarrier_wait(&full[slot], place.parity);\n", ""),
        ("too few bytes expected", "expect_tx(barrier, COPY_BYTES)", "expect_tx(barrier, COPY_BYTES / 2)"),
        ("slot given back by half of the warps", "&empty[slot], NUM_WARPS", "&empty[slot], NUM_WARPS / 2"),
        ("queries not waited for", "      hw::mbarrier_wait(queries_full, query_parity);\n", ""),
        ("queries overwritten", "            hw::mbarrier_wait(queries_empty, query_parity ^ 1);\n", ""),
        ("queries given back by one warpgroup", "queries_empty, NUM_WARPS", "queries_empty, NUM_WARPS / 2"),
        ("queries given back too early", "if (i == num_kv_tiles - 1) release", "if (i == num_kv_tiles - 2) release"),
        ("first wgmma not fenced", "      hw::wgmma_fence();\n      issue_scores", "      issue_scores"),
        ("diagonal not waited for", "      hw::wgmma_wait<0>();\n      release(&empty[diagonal]);", ""),
        ("scores not waited for", _SCORES_WAIT, ""),
        ("keys given back while they are read", _SCORES_WAIT + _KEYS_RELEASE, _KEYS_RELEASE + _SCORES_WAIT),
        ("sums not waited for", _SUMS_WAIT + _SUMS_RELEASE, _SUMS_RELEASE),
        ("values given back while they are read", _SUMS_WAIT + _SUMS_RELEASE, _SUMS_RELEASE + _SUMS_WAIT),
        ("last values given back while they are read", _LAST_WAIT + _LAST_RELEASE, _LAST_RELEASE + _LAST_WAIT),
        ("last sums not waited for", _LAST_WAIT + _LAST_RELEASE, _LAST_RELEASE),
        ("zeros behind the chunk not fenced", _CLEANED, "            __syncwarp();\n"),
        ("zeros behind the chunk not awaited", _CLEANED, "            hw::fence_proxy_async();\n"),
        ("zeros written before V has come", "            hw::mbarrier_wait(uncleaned, cleaned_parity);\n", ""),
        ("pages behind the chunk read", "min(kv_tile * KV_PAGES + i, last_page)", "kv_tile * KV_PAGES + i"),
        ("keys behind the row count", "< num_seen ? score : -INFINITY", "< 1000 ? score : -INFINITY"),
        ("sums not corrected", "for (int j = 0; j < 64; j++) o[j] *= rows.correction[j / 2 % 2];", ";"),
        ("no turn at the start", "    if (group == 1) pass_turn(group);\n", ""),
        ("codes not waited for", "          hw::mbarrier_wait(&codes_full[from.slot], from.parity);\n", ""),
        ("codes converted into a slot in use", "          hw::mbarrier_wait(&empty[to.slot], to.parity ^ 1);\n", ""),
        ("converted codes not fenced", _CONVERTED, _CONVERTED.replace("          hw::fence_proxy_async();\n", "")),
        ("converted codes not awaited", _CONVERTED, _CONVERTED.replace("          __syncwarp();\n", "")),
        ("slot full when one warp has converted", "&full[slot], FP8_KV ? NUM_CONVERTERS : 1", "&full[slot], 1"),
        ("codes given back by one warp", "&codes_empty[slot], NUM_CONVERTERS", "&codes_empty[slot], 1"),
        ("queries in FP16 not fenced", _QUERIES_CONVERTED, "        group_sync(group);\n"),
        ("queries in FP16 not awaited", _QUERIES_CONVERTED, "        hw::fence_proxy_async();\n"),
        ("scales made before the dependency wait", "  hw::griddep_wait();\n  hw::griddep_launch();\n", ""),
    )
)  # fmt: skip
MUTANTS += (Mutant.of("values behind the chunk count", "query_tiles.cuh", _VALID, "KV_TOKENS"),)
"""Removing any of these must be noticed."""


@pytest.mark.parametrize("conditions", CHECKED, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def run(inputs: Inputs, conditions: Conditions = PLAIN[0], num_sms: int = 4) -> torch.Tensor:
    """The bytes of the output [T, bytes], with those of the scales of rows behind them."""
    results = [inputs[name] for name in ("out", "scale") if inputs[name] is not None]
    for result in results:
        result.view(torch.uint8).fill_(0xFF)
    prefill_attention(EmulatedDevice(conditions, num_sms=num_sms), **inputs)
    return torch.cat([result.view(torch.uint8).view(len(result), -1) for result in results], dim=1)


def cut(inputs: Inputs, pieces: list[tuple[Chunk, slice]]) -> Inputs:
    """These chunks in one launch, with those rows of `inputs` as their queries, on the same pages."""
    tiles = plan_tiles([chunk for chunk, _ in pieces], inputs["q"].shape[1], inputs["k_pages"].shape[1])
    by_row = {
        name: torch.cat([inputs[name][rows] for _, rows in pieces])
        for name in ("q", "unscaled", "out", "scale")
        if inputs[name] is not None
    }
    return inputs | by_row | {"tiles": tiles, "num_tiles": torch.tensor([len(tiles)], dtype=torch.int32)}


@pytest.mark.parametrize("options", [{}, {"fp8": True, "output": 1}], ids=["bf16", "fp8"])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(options: dict[str, bool | int]) -> None:
    """Cut inside and at the edges of tiles and pages, alone or beside chunks of other sequences."""
    lengths = (300, 150, 70)
    case = Case("prompts", {"H": 4, "K": 1}, {"chunks": tuple((0, length) for length in lengths), **options})
    inputs = make_inputs(case, seed=2)
    whole = run(inputs)
    firsts = (0, 300, 450)
    sequences = [int(inputs["tiles"][inputs["tiles"][:, 1] == first, 0][0]) for first in firsts]

    def of(index: int, start: int, end: int) -> tuple[Chunk, slice]:
        return Chunk(sequences[index], start, end - start), slice(firsts[index] + start, firsts[index] + end)

    for cuts in ((0, 1, 300), (0, 64, 128, 300), (0, 129, 290, 299, 300)):
        for start, end in pairwise(cuts):
            assert torch.equal(run(cut(inputs, [of(0, start, end)])), whole[start:end]), f"{start} to {end}"
    pieces = [of(1, 64, 150), of(0, 131, 300), of(2, 0, 70), of(1, 0, 64)]
    mixed = run(cut(inputs, pieces), num_sms=3)
    assert torch.equal(mixed, torch.cat([whole[rows] for _, rows in pieces]))


def test_pages_anywhere_give_the_same_bits() -> None:
    inputs = make_inputs(Case("moved", {"H": 4, "K": 2}, {"chunks": ((100, 100), (0, 40))}), seed=5)
    expected = run(inputs)
    order = torch.randperm(len(inputs["k_pages"]), generator=torch.Generator().manual_seed(1))
    moved = inputs | {name: inputs[name][order] for name in ("k_pages", "v_pages")}
    moved["page_tables"] = order.argsort()[inputs["page_tables"].long()].int()
    assert torch.equal(run(moved, num_sms=1), expected)


def test_the_last_positions_of_131_072() -> None:
    """2,048 entries of the page table that name few pages, in every order."""
    inputs = make_inputs(Case("far", {"H": 4, "K": 1}, {"chunks": ((250, 2),)}), seed=1)
    pages = inputs["page_tables"][0]
    drawn = torch.randint(0, 3, (2047,), generator=torch.Generator().manual_seed(3))
    inputs["page_tables"] = torch.cat((pages[drawn], pages[3:]))[None].contiguous()
    inputs["tiles"] = plan_tiles([Chunk(sequence=0, start=131_066, num_tokens=2)], num_heads=4, num_kv_heads=1)
    run(inputs)
    expected = prefill_attention_reference(**inputs)
    error = (inputs["out"].double() - expected["out"]).abs()
    assert (error <= bounds(inputs, expected)["out"]).all()


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
    run(inputs)
    torch.testing.assert_close(inputs["out"].float(), attended.transpose(0, 1).flatten(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_rows_of_no_tile_are_left_alone(output: int) -> None:
    case = Case("part", {"H": 4, "K": 1}, {"chunks": ((0, 40), (0, 10)), "output": output})
    inputs = make_inputs(case, seed=1)
    whole = run(inputs)
    assert inputs["tiles"][0].tolist()[1:] == [0, 32, 40]
    inputs["num_tiles"][0] = 1
    part = run(inputs, CHECKED[0])
    assert torch.equal(part[32:40], whole[32:40])
    assert part[:32].eq(0xFF).all()
    assert part[40:].eq(0xFF).all()


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
        ({"H": 2, "K": 1}, {"v_scale": torch.ones(1)}, "expected k_scale and v_scale not with pages of torch.bfloat16"),
        ({"H": 2, "K": 1}, {"scale": torch.ones(4)}, "unscaled and scale must both be given, or none of them"),
        (
            {"H": 2, "K": 1},
            {"scale": torch.ones(4), "static_scale": torch.ones(1)},
            "scale and static_scale are both given",
        ),
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
    kinds = {(case.options.get("fp8", False), case.options.get("output", 0)) for case in emulated}
    assert kinds == {(is_fp8, output) for is_fp8 in (True, False) for output in (0, 1, 2)}
