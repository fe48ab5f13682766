"""Decode attention: the schedule, the PyTorch runner's results, rows of one sequence, and every barrier it needs."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.decode_attention import (
    CASES,
    OP,
    chunk_pages,
    decode_attention,
    make_inputs,
    make_workspace,
    max_items,
    schedule_and_attend,
    schedule_attention,
)
from kernels.errors import ContractError
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, unswizzled
from kernels.op import Case
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

_SOURCE = "decode_attention.cu"
MUTANTS = (
    Mutant.of(
        "schedule: dropped dependency wait",
        _SOURCE,
        "  hw::griddep_wait();\n  hw::griddep_launch();\n  const int own",
        "  hw::griddep_launch();\n  const int own",
    ),
    Mutant.of(
        "schedule: dropped barrier before the warps' sums are added",
        _SOURCE,
        "warp_sums[warp] = sum;\n  __syncthreads();\n",
        "warp_sums[warp] = sum;\n",
    ),
    Mutant.of(
        "schedule: dropped barrier before the rows are searched",
        _SOURCE,
        "firsts[0] = 0;\n  __syncthreads();\n",
        "firsts[0] = 0;\n",
    ),
    Mutant.of(
        "partials: dropped barrier after the barriers are made",
        _SOURCE,
        "  __syncthreads();\n  hw::griddep_wait();\n  hw::griddep_launch();\n  const int num_works",
        "  hw::griddep_wait();\n  hw::griddep_launch();\n  const int num_works",
    ),
    Mutant.of("partials: dropped fence after the barriers are made", _SOURCE, "    hw::fence_mbarrier_init();\n"),
    Mutant.of(
        "partials: dropped dependency wait",
        _SOURCE,
        "  hw::griddep_wait();\n  hw::griddep_launch();\n  const int num_works",
        "  hw::griddep_launch();\n  const int num_works",
    ),
    Mutant.of(
        "partials: a stage is filled before it is given back",
        _SOURCE,
        "        if (!is_first_round) hw::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);\n",
    ),
    Mutant.of("partials: wrong parity of the empty stage", _SOURCE, "ring.parity ^ 1", "ring.parity"),
    Mutant.of(
        "partials: a stage is read before it is full",
        _SOURCE,
        "      hw::mbarrier_wait(&full[ring.stage], ring.parity);\n",
    ),
    Mutant.of(
        "partials: K alone is waited for", _SOURCE, "&full[ring.stage], 2 * TILE_BYTES", "&full[ring.stage], TILE_BYTES"
    ),
    Mutant.of(
        "partials: a stage is given back before V is read",
        _SOURCE,
        "      add_values(o, weights, keys + TILE_BYTES, warp * 16, keep[0], keep[1], lane);\n      __syncwarp();\n"
        "      if (lane == 0) hw::mbarrier_arrive(&empty[ring.stage]);\n",
        "      if (lane == 0) hw::mbarrier_arrive(&empty[ring.stage]);\n"
        "      add_values(o, weights, keys + TILE_BYTES, warp * 16, keep[0], keep[1], lane);\n",
    ),
    Mutant.of(
        "partials: dropped barrier before the warps' sums are read",
        _SOURCE,
        "    hw::bar_sync<1>(NUM_CONSUMERS);\n    const long long",
        "    const long long",
    ),
    Mutant.of(
        "partials: dropped barrier after the warps' sums are read",
        _SOURCE,
        "    hw::bar_sync<1>(NUM_CONSUMERS);  // all has been read before the next item's sums take its place\n",
    ),
    Mutant.of("partials: V behind the length counts", _SOURCE, "(position < length ? 0x0000FFFFu : 0)", "0x0000FFFFu"),
    Mutant.of("partials: keys behind the length count", _SOURCE, "first_position + 8 * i + e < length ?", "true ?"),
    Mutant.of("partials: sums not corrected", _SOURCE, "        o[n][0] *= correction;\n"),
    Mutant.of(
        "merge: dropped dependency wait",
        _SOURCE,
        "  hw::griddep_wait();\n  hw::griddep_launch();\n  const int first =",
        "  hw::griddep_launch();\n  const int first =",
    ),
    Mutant.of(
        "merge: dropped barrier before the parts are added",
        _SOURCE,
        "part_weights[part][g] = weight;\n  __syncthreads();\n",
        "part_weights[part][g] = weight;\n",
    ),
    Mutant.of(
        "merge: dropped barrier before the cluster's maxima are read",
        _SOURCE,
        "    if constexpr (NUM_KV_HEADS > 1) hw::cluster_sync();\n    else __syncthreads();\n",
    ),
    Mutant.of(
        "merge: a block leaves while others read its maxima",
        _SOURCE,
        "    if constexpr (NUM_KV_HEADS > 1) hw::cluster_sync();  // no block leaves while others read its maxima\n",
    ),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_the_schedule_lists_every_chunk_of_every_row() -> None:
    lengths = [0, 1, 64, 256, 257, 0, 16_384, 16_385, 131_072, 5]
    num_rows = torch.tensor([9], dtype=torch.int32)
    work = make_workspace(10, 2048, 1, torch.device("cpu"))
    del work["sums"], work["stats"]
    schedule_attention(
        EmulatedDevice(CHECKED[0]), lengths=torch.tensor(lengths, dtype=torch.int32), num_rows=num_rows, **work
    )
    expected: list[list[int]] = []
    for row, length in enumerate(lengths[:9]):
        num_pages = -(-length // PAGE_TOKENS)
        assert work["first_items"][row] == len(expected)
        expected += [[row, chunk] for chunk in range(-(-num_pages // chunk_pages(num_pages)))]
    assert work["items"][: len(expected)].tolist() == expected
    assert work["first_items"][9:].tolist() == [len(expected)] * 2
    assert len(expected) == 1 + 1 + 1 + 2 + 64 + 33 + 64
    assert max_items(1, 2048) == 64


@pytest.mark.parametrize("num_rows", [1, 31, 1024])
def test_the_schedule_of_many_rows(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    lengths = torch.randint(0, 1000, (num_rows,), generator=generator, dtype=torch.int32)
    work = make_workspace(num_rows, 16, 1, torch.device("cpu"))
    del work["sums"], work["stats"]
    schedule_attention(
        EmulatedDevice(PLAIN[0]), lengths=lengths, num_rows=torch.tensor([num_rows], dtype=torch.int32), **work
    )
    counts = -(-lengths // (4 * PAGE_TOKENS))
    assert work["first_items"].diff().tolist() == counts.tolist()
    rows = work["items"][: int(counts.sum()), 0]
    assert rows.tolist() == torch.arange(num_rows).repeat_interleave(counts).tolist()


def test_rows_of_one_sequence_are_causal_attention() -> None:
    inputs = make_inputs(Case("prompt", {"T": 6, "H": 4, "K": 2, "length": 200}, {"full": True}), seed=3)
    inputs["sequences"] = torch.full((6,), 2, dtype=torch.int32)
    inputs["lengths"] = torch.arange(195, 201, dtype=torch.int32)
    schedule_and_attend(EmulatedDevice(PLAIN[0]), **inputs)
    pages = inputs["page_tables"][2].long()
    k, v = (
        unswizzled(inputs[name])[pages].float().transpose(1, 2).reshape(-1, 2, HEAD_DIM)[:200]
        for name in ("k_pages", "v_pages")
    )
    queries = torch.cat((torch.zeros(194, 4, HEAD_DIM), inputs["q"].float()))
    attended = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1),
        k.repeat_interleave(2, dim=1).transpose(0, 1),
        v.repeat_interleave(2, dim=1).transpose(0, 1),
        attn_mask=torch.ones(200, 200, dtype=torch.bool).tril(),
    )
    torch.testing.assert_close(
        inputs["out"].float().view(6, 4, HEAD_DIM), attended.transpose(0, 1)[194:], rtol=1e-2, atol=1e-2
    )


def test_a_row_is_the_same_bits_wherever_its_pages_lie_and_however_many_blocks_run() -> None:
    inputs = make_inputs(Case("moved", {"T": 4, "H": 4, "K": 1, "length": 600}, {"fp8": True, "output": 1}), seed=5)
    schedule_and_attend(EmulatedDevice(PLAIN[0]), **inputs)
    order = torch.randperm(len(inputs["k_pages"]), generator=torch.Generator().manual_seed(1))
    moved = inputs | {
        name: inputs[name].view(torch.uint8)[order].view(torch.float8_e4m3fn) for name in ("k_pages", "v_pages")
    }
    moved |= {
        "page_tables": order.argsort()[inputs["page_tables"].long()].int(),
        "out": torch.empty_like(inputs["out"]),
    }
    schedule_and_attend(EmulatedDevice(PLAIN[0], num_sms=1), **moved)
    assert torch.equal(moved["out"].view(torch.uint8), inputs["out"].view(torch.uint8))


def test_rows_beyond_num_rows_give_zeros() -> None:
    inputs = make_inputs(Case("part", {"T": 3, "H": 2, "K": 1, "length": 70}, {"full": True}), seed=1)
    inputs["num_rows"][0] = 2
    schedule_and_attend(EmulatedDevice(CHECKED[0]), **inputs)
    assert inputs["out"].float().abs().amax(dim=1).ne(0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_scale": None}, "decode_attention: expected k_scale and v_scale both with pages of torch.float8_e4m3fn"),
        ({"static_scale": torch.ones(1)}, "decode_attention: scale and static_scale are both given"),
        ({"items": torch.zeros(1, 2, dtype=torch.int32)}, "decode_attention: sums has shape"),
        ({"first_items": torch.zeros(2, dtype=torch.int32)}, r"decode_attention: T\+1 is 2, expected 3 to 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor | None], message: str) -> None:
    inputs = make_inputs(Case("odd", {"T": 2, "H": 4, "K": 2, "length": 700}, {"fp8": True, "output": 1}), seed=1)
    inputs |= make_workspace(2, 11, 4, torch.device("cpu"))
    del inputs["num_rows"]
    with pytest.raises(ContractError, match=message):
        decode_attention(EmulatedDevice(), **inputs | changed)


def test_more_query_heads_than_a_tile_has_rows_are_refused() -> None:
    inputs = make_inputs(Case("nine", {"T": 1, "H": 9, "K": 1, "length": 4}), seed=1)
    with pytest.raises(ContractError, match="decode_attention: H is 9, expected 1 to 8"):
        schedule_and_attend(EmulatedDevice(PLAIN[0]), **inputs)


def test_the_cases_reach_every_branch() -> None:
    emulated = [case for case in CASES if case.is_emulated]
    kinds = {(case.options.get("fp8", False), case.options.get("output", 0)) for case in emulated}
    assert kinds >= {(False, 0), (False, 1), (False, 2), (True, 0), (True, 1), (True, 2)}
    assert {case.sizes["H"] // case.sizes["K"] for case in emulated} >= {1, 3, 4, 8}
