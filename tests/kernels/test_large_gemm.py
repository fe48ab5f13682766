"""Large GEMM: the plan, the bits of skinny GEMM for every row and tile, rows that are left alone, what the kernel needs."""

from __future__ import annotations

import pytest
import torch

from kernels.errors import ContractError
from kernels.large_gemm import CASES, TILE_TOKENS, LargePlan, large_gemm, make_inputs, plan_large_gemm
from kernels.linear import linear
from kernels.op import Case, Inputs
from kernels.recording import RecordingDevice
from kernels.skinny_gemm import plan_skinny_gemm, skinny_gemm
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

_START = "  hw::cluster_sync();\n  hw::griddep"
_WAIT = "      hw::wgmma_wait<0>();\n"
_RELEASE = "      release(&empty[stage], lane);\n"
_STAGE_BEFORE = "release(&empty[stage == 0 ? STAGES - 1 : stage - 1], lane);"
_STEP = "(d, weights + 2 * step, tokens + 2 * step, accumulates_here);\n    else"
_READ = "          if (t == 0) hw::bulk_wait_read<0>();\n"
_CLAIM = _READ + "          group_sync(group);\n"
_TOTALS_READ = "      if constexpr (HAS_TOTALS) group_sync(group);"
_STAGED = "      hw::fence_proxy_async();\n      group_sync(group);\n"
MUTANTS = tuple(
    Mutant.of(name, "large_gemm.cu", old, new)
    for name, old, new in (
        ("mbarriers used before the other block knows them", _START, _START.replace("hw::cluster_sync", "__syncthreads")),
        ("mbarriers not fenced", "    hw::fence_mbarrier_init();\n", ""),
        ("rows read before the dependency wait", "  hw::griddep_wait();\n", ""),
        ("full stage not waited for", "    hw::mbarrier_wait(&full[stage], place.parity);\n", ""),
        ("empty stage not waited for", "          hw::mbarrier_wait(&empty[place.stage], place.parity ^ 1);\n", ""),
        ("wrong parity of an empty stage", "&empty[place.stage], place.parity ^ 1", "&empty[place.stage], place.parity"),
        ("too few bytes expected", "&full[place.stage], STAGE_BYTES", "&full[place.stage], STAGE_BYTES - TOKEN_BYTES / 2"),
        ("stage given back before its wgmma has ended", _WAIT + _RELEASE, _RELEASE + _WAIT),
        ("stage given back to its own block only", "if (lane < CLUSTER)", "if (lane == (int)hw::cluster_rank())"),
        ("stage given back by half of the warps", "CLUSTER * NUM_GROUPS * 4", "CLUSTER * NUM_GROUPS * 2"),
        ("BF16 stage given back one too early", _STAGE_BEFORE, "release(&empty[stage], lane);"),
        ("BF16 stage given back while it is read", "      hw::wgmma_wait<1>();\n", ""),
        ("wgmma not fenced", "    hw::wgmma_fence();\n", ""),
        ("wgmma not waited for", _WAIT, ""),
        ("intervals not added up", "sum[j] += interval[j]", "sum[j] = interval[j]"),
        ("intervals added twice", "!FP8 && i > 0", "i > 0"),
        ("segments run into each other", "sum[j] = 0.f;", "sum[j] = segment == 0 ? 0.f : sum[j];"),
        ("totals not added", "            if (segment > 0) {", "            if (segment > 1) {"),
        ("BF16 segments not added", "segment == 0 ? interval[j] : sum[j] + interval[j]", "interval[j]"),
        ("wrong step along K", _STEP, _STEP.replace("tokens + 2 *", "tokens +")),
        ("staging area written while it is stored", _READ, ""),
        ("staging area written before all know", _CLAIM, _READ),
        ("results written over totals", _TOTALS_READ, ""),
        ("staged results not fenced", _STAGED, "      group_sync(group);\n"),
        ("staged results stored before all have written", _STAGED, "      hw::fence_proxy_async();\n"),
        ("stores not waited for", "    if (t == 0) hw::bulk_wait<0>();\n", ""),
        ("a block ends while the other writes into it", "  hw::cluster_sync();  // no block", "  // no block"),
    )
)  # fmt: skip
"""Removing any of these must be noticed."""


def run(inputs: Inputs, conditions: Conditions = PLAIN[0], num_sms: int = 4) -> torch.Tensor:
    large_gemm(EmulatedDevice(conditions, num_sms=num_sms), **inputs)
    out: torch.Tensor = inputs["out"]
    return out


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """These rows alone, with an output of their own; for any launcher of a linear layer."""
    names = ("x", "x_scale", "residual", "out")
    part = {n: v[rows].clone() if n in names and v is not None else v for n, v in inputs.items() if n != "tile_tokens"}
    return part | {"num_rows": torch.tensor([rows.stop - rows.start], dtype=torch.int32)}


@pytest.mark.parametrize(
    ("shape", "rows", "expected"),
    [
        ((6144, 5120), 512, (128, 2, 96, 2)),
        ((6144, 5120), 2048, (192, 2, 264, 4)),
        ((5120, 4096), 512, (192, 2, 60, 1)),
        ((5120, 4096), 2048, (160, 2, 260, 4)),
        ((28672, 5120), 512, (128, 1, 448, 7)),
        ((28672, 5120), 2048, (192, 1, 1232, 19)),
        ((28672, 5120), 8192, (192, 1, 4816, 73)),
        ((5120, 14336), 2048, (160, 2, 260, 4)),
        ((5120, 14336), 8192, (192, 2, 860, 14)),
    ],
)
def test_plans_of_mistral_nemo(shape: tuple[int, int], rows: int, expected: tuple[int, int, int, int]) -> None:
    plan = plan_large_gemm(rows, *shape, is_fp8=True)
    assert (plan.tokens, plan.segments, plan.num_tiles, plan.num_waves) == expected
    assert plan.segments == plan_skinny_gemm(1, *shape, is_fp8=True).segments
    assert plan.wave_efficiency >= (0.92 if rows >= 2048 else 0.72)


def test_a_plan_is_the_fastest_of_all_tiles() -> None:
    shape = (1000, 5120, 4096)
    plans: list[LargePlan] = []
    for tokens in TILE_TOKENS[:-1]:
        plans.append(plan_large_gemm(*shape, is_fp8=True, tile_tokens=tokens))
        assert plans[-1].tokens == tokens
        assert plans[-1].shared_bytes <= 223 * 1024
        assert plans[-1].stages >= 3
    assert plan_large_gemm(*shape, is_fp8=True).clocks == min(plan.clocks for plan in plans)


def test_two_sets_of_sums_do_not_fit_256_rows() -> None:
    assert plan_large_gemm(512, 28672, 640, is_fp8=False, tile_tokens=256).tokens == 256, "one set: one segment, BF16"
    for is_fp8, outputs in ((True, 28672), (False, 5120)):
        with pytest.raises(ContractError, match=r"tile_tokens is 256, expected one of .* that fits"):
            plan_large_gemm(512, outputs, 1024, is_fp8=is_fp8, tile_tokens=256)


@pytest.mark.parametrize("is_fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("inputs_size", [384, 1024, 2048], ids=["1 segment", "2 segments", "4 segments"])
def test_a_row_has_the_bits_of_the_skinny_kernel(is_fp8: bool, inputs_size: int) -> None:
    """In a batch of 300, in the skinny kernel with 128 others, and alone: at the edges of tiles and inside."""
    depth = inputs_size if is_fp8 else inputs_size // 2
    options = {"bf16": not is_fp8, "residual": True, "tile_tokens": 128}
    inputs = make_inputs(Case("all", {"M": 300, "N": 128, "K": depth}, options), seed=4)
    whole = run(inputs).clone()
    for rows in (slice(0, 1), slice(0, 128), slice(127, 129), slice(130, 257), slice(299, 300)):
        part = rows_of(inputs, rows)
        skinny_gemm(EmulatedDevice(PLAIN[0]), **part)
        assert torch.equal(part["out"], whole[rows])


@pytest.mark.parametrize("is_float_out", [False, True], ids=["bf16 out", "fp32 out"])
def test_crossing_from_one_kernel_to_the_other_changes_nothing(is_float_out: bool) -> None:
    inputs = make_inputs(Case("all", {"M": 129, "N": 64, "K": 1024}, {"float": is_float_out}), seed=6)
    results = []
    for rows in (127, 128, 129):
        part = rows_of(inputs, slice(0, rows))
        linear(EmulatedDevice(PLAIN[0]), **part)
        results.append(part["out"])
    assert torch.equal(results[0], results[1][:127])
    assert torch.equal(results[1], results[2][:128])


@pytest.mark.parametrize(("rows", "kernel"), [(1, "skinny_gemm"), (128, "skinny_gemm"), (129, "large_gemm")])
def test_the_number_of_rows_decides_which_kernel_runs(rows: int, kernel: str) -> None:
    device = RecordingDevice()
    linear(device, **rows_of(make_inputs(Case("rows", {"M": rows, "N": 64, "K": 128}), seed=0), slice(0, rows)))
    assert [launch.kernel for launch in device.launches] == [kernel]


def test_tiles_and_machines_do_not_change_results() -> None:
    inputs = make_inputs(Case("tiles", {"M": 260, "N": 320, "K": 512}), seed=7)
    expected = run(inputs).clone()
    for tokens, num_sms in ((64, 2), (96, 132), (128, 6), (160, 4), (192, 4)):
        inputs["out"].fill_(float("nan"))
        assert torch.equal(run(inputs | {"tile_tokens": tokens}, num_sms=num_sms), expected), f"{tokens} rows a tile"


def test_a_segment_starts_at_zero_and_is_added_once() -> None:
    """2^24 + 1 is 2^24 in FP32: each order of these four sums has another result."""
    inputs = make_inputs(Case("order", {"M": 130, "N": 128, "K": 1024}, {"bf16": True, "float": True}), seed=0)
    assert plan_large_gemm(130, 128, 1024, is_fp8=False).segments == 4
    inputs["x"].fill_(1.0)
    inputs["weight"].zero_()
    inputs["weight"][:, ::256] = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0]).bfloat16()
    assert run(inputs).eq(1.0).all()


@pytest.mark.parametrize("is_float_out", [False, True], ids=["bf16 out", "fp32 out"])
@pytest.mark.parametrize("real_rows", [0, 1, 64, 100, 128])
def test_rows_from_num_rows_on_are_left_alone_whatever_they_hold(real_rows: int, is_float_out: bool) -> None:
    inputs = make_inputs(Case("part", {"M": 140, "N": 64, "K": 256}, {"float": is_float_out}), seed=5)
    whole = run(inputs).clone()
    inputs["x"].view(torch.uint8)[real_rows:] = 0x7F  # NaN
    inputs["x_scale"][real_rows:] = float("nan")
    inputs["out"].fill_(9.0)
    inputs["num_rows"][0] = real_rows
    out = run(inputs, CHECKED[0])
    assert torch.equal(out[:real_rows], whole[:real_rows])
    assert (out[real_rows:] == 9.0).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"M": 129, "N": 96, "K": 128}, "N is 96, expected a multiple of 64, at least 64"),
        ({"M": 129, "N": 64, "K": 192}, "K is 192, expected a multiple of 128, at least 128"),
        ({"M": 0, "N": 64, "K": 128}, "M is 0, expected at least 1"),
    ],
)
def test_sizes_out_of_bounds_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ContractError, match=f"large_gemm: {message}"):
        run(make_inputs(Case("odd", sizes), seed=1))


def test_fp8_needs_both_scales() -> None:
    inputs = make_inputs(Case("scales", {"M": 129, "N": 64, "K": 128}), seed=1)
    with pytest.raises(ContractError, match="large_gemm: x_scale and weight_scale must both be given for FP8"):
        run(inputs | {"x_scale": None})


def test_the_cases_reach_every_branch() -> None:
    emulated = [case for case in CASES if case.is_emulated]
    plans = [
        plan_large_gemm(
            *(case.sizes[letter] for letter in "MNK"),
            is_fp8=not case.options.get("bf16"),
            is_float_out=case.options.get("float", False),
            tile_tokens=case.options.get("tile_tokens"),
        )
        for case in emulated
    ]
    assert {plan.tokens for plan in plans} == set(TILE_TOKENS)
    for is_fp8 in (True, False):
        of_type = [plan for plan, case in zip(plans, emulated, strict=True) if is_fp8 == (not case.options.get("bf16"))]
        assert {plan.segments > 1 for plan in of_type} == {True, False}
    assert max(plan.segments for plan in plans) > 2, "a segment that is neither first nor last"
    assert any(plan.num_rows > 8 * plan.tokens for plan in plans), "a second group of the raster"
    assert any(plan.num_rows % plan.tokens == 0 for plan in plans)
    assert {case.sizes["N"] % 256 > 128 for case in emulated} == {True, False}
