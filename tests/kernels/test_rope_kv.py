"""RoPE and the KV write: agreement with the PyTorch runner bit for bit, the layout of pages, high addresses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.runner.rope import RopeTable, rotate
from kernels.check import check_case
from kernels.errors import ContractError
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, swizzled, unswizzled
from kernels.op import Case
from kernels.rope_kv import OP, angle_table, make_inputs, rope_kv
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "rope_kv.cu", "  hw::griddep_wait();\n"),
    Mutant.of("chunks not swizzled", "kv_layout.cuh", "(chunk ^ (token_in_page & 7))", "chunk"),
    Mutant.of("wrong row of the page", "rope_kv.cu", "position % PAGE_TOKENS", "position % (PAGE_TOKENS - 1)"),
    Mutant.of("V turned too", "rope_kv.cu", "if (head < NUM_HEADS + NUM_KV_HEADS) {", "if (true) {"),
    Mutant.of("sine of the wrong sign", "rope_kv.cu", "a * cosine - b * sine", "a * cosine + b * sine"),
    Mutant.of("K's scale for V", "rope_kv.cu", "(is_key ? *k_scale : *v_scale)", "*k_scale"),
)
_SMALL = {"T": 6, "H": 8, "K": 2, "max_pages": 3}


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_angles_and_rotation_are_the_pytorch_runners() -> None:
    inputs = make_inputs(Case("like torch", _SMALL, {"fp8": False}), seed=2)
    positions = inputs["positions"].long()
    table = RopeTable(HEAD_DIM, 1e6, 3 * PAGE_TOKENS, torch.device("cpu"))
    cos, sin = table.at(positions)
    assert torch.equal(inputs["angles"][positions], torch.cat((cos, sin), dim=1))
    heads = inputs["qkv"].float()
    turned = rotate(heads[:, :10], cos, sin).bfloat16()
    rope_kv(EmulatedDevice(PLAIN[0]), **inputs)
    pages = inputs["page_tables"][inputs["sequences"].long(), positions // PAGE_TOKENS].long()
    rows = positions % PAGE_TOKENS
    assert torch.equal(inputs["q"], turned[:, :8])
    assert torch.equal(unswizzled(inputs["k_pages"])[pages, :, rows], turned[:, 8:])
    assert torch.equal(unswizzled(inputs["v_pages"])[pages, :, rows], inputs["qkv"][:, 10:])


def test_interleaved_pairs_are_half_split_ones_in_another_order() -> None:
    inputs = make_inputs(Case("interleaved", _SMALL, {"fp8": False, "interleaved": True}), seed=2)
    order = torch.arange(HEAD_DIM).view(64, 2).t().flatten()  # even dimensions, then odd ones
    half_split = inputs | {"qkv": inputs["qkv"].clone(), "is_interleaved": False, "q": inputs["q"].clone()}
    half_split |= {"k_pages": inputs["k_pages"].clone(), "v_pages": inputs["v_pages"].clone()}
    half_split["qkv"] = inputs["qkv"][..., order].contiguous()
    rope_kv(EmulatedDevice(PLAIN[0]), **inputs)
    rope_kv(EmulatedDevice(PLAIN[0]), **half_split)
    assert torch.equal(inputs["q"][..., order], half_split["q"])


@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_token_alone_is_written_as_among_others(is_fp8: bool) -> None:
    inputs = make_inputs(Case("alone", _SMALL, {"fp8": is_fp8}), seed=4)
    before = inputs["k_pages"].clone(), inputs["v_pages"].clone()
    rope_kv(EmulatedDevice(PLAIN[0]), **inputs)
    k_pages, v_pages = before[0].clone(), before[1].clone()
    for token in range(6):
        row = slice(token, token + 1)
        alone = inputs | {name: inputs[name][row].clone() for name in ("qkv", "positions", "sequences", "q")}
        rope_kv(EmulatedDevice(PLAIN[0]), **alone | {"k_pages": k_pages, "v_pages": v_pages})
        assert torch.equal(alone["q"], inputs["q"][row])
    for alone_pages, pages in ((k_pages, inputs["k_pages"]), (v_pages, inputs["v_pages"])):
        assert torch.equal(alone_pages.view(torch.uint8), pages.view(torch.uint8))


def test_tokens_without_position_and_beyond_num_tokens_are_left_alone() -> None:
    inputs = make_inputs(Case("part", _SMALL, {"fp8": False}), seed=1)
    inputs["positions"][1] = -1
    inputs["num_tokens"][0] = 4
    inputs["q"].fill_(7.0)
    k_pages = inputs["k_pages"].clone()
    rope_kv(EmulatedDevice(CHECKED[0]), **inputs)
    is_written = (inputs["q"] != 7.0).flatten(1).any(dim=1)
    assert is_written.tolist() == [True, False, True, True, False, False]
    assert (inputs["k_pages"] != k_pages).any(dim=3).any(dim=1).sum() == 3


def test_pages_behind_4_gigabytes_and_late_positions() -> None:
    # Never touched but for a few rows, so the machine gives memory for those only.
    num_pages, position = 40_000, 131_071
    shape = (num_pages, 16, PAGE_TOKENS, HEAD_DIM)
    inputs = make_inputs(Case("high", {"T": 1, "H": 16, "K": 16, "max_pages": 1}, {"fp8": True}), seed=1)
    inputs |= {name: torch.empty(shape, dtype=torch.float8_e4m3fn) for name in ("k_pages", "v_pages")}
    inputs["angles"] = angle_table(1e6, position + 1)
    inputs["page_tables"] = torch.zeros(1, 2048, dtype=torch.int32)
    inputs["positions"][0] = position
    inputs["page_tables"][0, position // PAGE_TOKENS] = num_pages - 1
    rope_kv(EmulatedDevice(PLAIN[0]), **inputs)
    near = inputs | {name: torch.empty((1, *shape[1:]), dtype=torch.float8_e4m3fn) for name in ("k_pages", "v_pages")}
    near["page_tables"] = torch.zeros_like(inputs["page_tables"])
    rope_kv(EmulatedDevice(PLAIN[0]), **near)
    for name in ("k_pages", "v_pages"):
        assert torch.equal(inputs[name][-1, :, 63].view(torch.uint8), near[name][0, :, 63].view(torch.uint8))
    assert torch.equal(inputs["q"].double(), OP.reference(**near)["q"].bfloat16().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_layout_puts_eight_rows_of_a_chunk_into_eight_places(dtype: torch.dtype) -> None:
    chunk_elements = 16 // dtype.itemsize
    pages = torch.arange(HEAD_DIM).float().repeat(1, 1, PAGE_TOKENS, 1).to(dtype)
    stored = swizzled(pages)
    assert torch.equal(unswizzled(stored).view(torch.uint8), pages.view(torch.uint8))
    firsts = stored[0, 0, :8].float().view(8, -1, chunk_elements)[:, :, 0]
    places = [(row == 3 * chunk_elements).nonzero().item() for row in firsts]
    assert sorted(places) == list(range(8))


def test_scales_without_fp8_pages_are_refused() -> None:
    inputs = make_inputs(Case("scales", _SMALL, {"fp8": False}), seed=1)
    with pytest.raises(ContractError, match="rope_kv: k_scale and v_scale are given, expected neither"):
        rope_kv(EmulatedDevice(), **inputs | {"k_scale": torch.ones(1), "v_scale": torch.ones(1)})


def test_heads_that_do_not_add_up_are_refused() -> None:
    inputs = make_inputs(Case("heads", _SMALL, {"fp8": False}), seed=1)
    inputs["qkv"] = inputs["qkv"][:, :11].contiguous()
    with pytest.raises(ContractError, match="rope_kv: heads is 11, expected 12 to 12"):
        rope_kv(EmulatedDevice(), **inputs)


def test_the_angle_table_is_rounded_once_at_every_position() -> None:
    """Against numbers of 64 bits of mantissa (x86's), in which the largest angle, 131,071, is wrong by 2^-47 at most."""
    assert np.finfo(np.longdouble).nmant >= 63
    table = angle_table(1e6, 131_072)
    assert table.shape == (131_072, 2, 64)
    frequencies = np.longdouble(1e6) ** (-np.arange(0, HEAD_DIM, 2, dtype=np.longdouble) / HEAD_DIM)
    positions = np.concatenate((np.arange(0, 131_072, 97), np.arange(131_000, 131_072)))
    angles = positions.astype(np.longdouble)[:, None] * frequencies
    for place, values in enumerate((np.cos(angles), np.sin(angles))):
        error = np.abs(table[positions, place].numpy().astype(np.longdouble) - values)
        # Half a unit of FP32 below 1, and what FP64 loses of such an angle before its cosine is taken.
        assert error.max() <= 2.0**-25 + 131_072 * 2.0**-52
