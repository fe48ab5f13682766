"""Skinny GEMM: the plan, the same bits for every number of rows, agreement with the PyTorch runner, what the kernel needs."""

from __future__ import annotations

import pytest
import torch

from backend.checkpoint import fp8
from backend.checkpoint.matrix import Matrix
from backend.runner.linear import linear
from kernels.errors import ContractError
from kernels.op import Case, Inputs
from kernels.skinny_gemm import CASES, make_inputs, plan_skinny_gemm, skinny_gemm
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, EmulatedDevice

_GIVE_BACK = "      if (lane == 0) hw::mbarrier_arrive(&empty[stage]);\n"
_WGMMA_WAIT = "      hw::wgmma_wait<0>();\n"
_CLUSTER_SYNC = "  if constexpr (SEGMENTS > 1) hw::cluster_sync();"
_CLUSTER_SYNC_READERS = "  if constexpr (SEGMENTS > 1) hw::cluster_sync_readers();"
_STEP = "(d, weights + 2 * step, tokens + 2 * step, accumulates_here);\n    else"
MUTANTS = tuple(
    Mutant.of(name, "skinny_gemm.cu", old, new)
    for name, old, new in (
        ("mbarriers used before all know them", "  }\n  __syncthreads();\n\n  if (warp", "  }\n\n  if (warp"),
        ("mbarriers not fenced", "    hw::fence_mbarrier_init();\n", ""),
        ("x read before the dependency wait", "      hw::griddep_wait();\n      for", "      for"),
        ("full stage not waited for", "      hw::mbarrier_wait(&full[stage], (i / STAGES) & 1);\n", ""),
        ("empty stage not waited for", "        hw::mbarrier_wait(&empty[stage], (i / STAGES - 1) & 1);\n", ""),
        ("wrong parity of an empty stage", "(i / STAGES - 1) & 1", "(i / STAGES) & 1"),
        ("stage given back before its wgmma has ended", _WGMMA_WAIT + _GIVE_BACK, _GIVE_BACK + _WGMMA_WAIT),
        ("stage given back by one warp for all", "&empty[stage], NUM_CONSUMER_WARPS)", "&empty[stage], 1)"),
        ("wgmma not fenced", "      hw::wgmma_fence();\n", ""),
        ("wgmma not waited for", _WGMMA_WAIT, ""),
        ("too few bytes expected", "&full[i], WEIGHT_BYTES + TOKEN_BYTES", "&full[i], WEIGHT_BYTES"),
        ("sums written over what a warp still reads", "    hw::bar_sync<1>(32 * NUM_CONSUMER_WARPS);", ""),
        ("sums read before they are written", _CLUSTER_SYNC + "\n  else __syncthreads();\n", ""),
        ("a block ends while others read its sums", _CLUSTER_SYNC_READERS + "  // no block", "  // no block"),
        ("intervals not added up", "sum[j] += interval[j]", "sum[j] = interval[j]"),
        ("intervals added twice", "!FP8 && i > 0", "i > 0"),
        ("wrong step along K", _STEP, _STEP.replace("tokens + 2 *", "tokens +")),
    )
)
"""Removing any of these must be noticed."""


def run(inputs: Inputs, conditions: object = PLAIN[0]) -> torch.Tensor:
    skinny_gemm(EmulatedDevice(conditions), **inputs)  # type: ignore[arg-type]
    out: torch.Tensor = inputs["out"]
    return out


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6144, 5120), (96, 2, 192)),
        ((5120, 4096), (80, 2, 160)),
        ((28672, 5120), (448, 1, 448)),
        ((5120, 14336), (80, 2, 160)),
    ],
)
def test_plans_of_mistral_nemo(shape: tuple[int, int], expected: tuple[int, int, int]) -> None:
    plans = [plan_skinny_gemm(rows, *shape, is_fp8=True) for rows in (1, 8, 9, 32, 64, 128)]
    for plan in plans:
        assert (plan.num_tiles, plan.segments, plan.num_blocks) == expected, "the number of rows must not matter"
        assert plan.num_running == plan.num_blocks, "no block waits for another to end"
        assert plan.weight_bytes_in_flight >= (56 if plan.tokens < 128 else 38) * 1024
        assert plan.shared_bytes <= 227 * 1024
    assert [plan.tokens for plan in plans] == [8, 8, 16, 32, 64, 128]


def test_the_head_fills_the_machine_too() -> None:
    plan = plan_skinny_gemm(16, 131072, 5120, is_fp8=False)
    assert str(plan) == (
        "2048 tiles x 1 segments = 2048 blocks for up to 16 rows, 528 at once on 132 SMs, 5 stages, "
        "160 KB of weights in flight a SM"
    )


@pytest.mark.parametrize("is_fp8", [True, False])
def test_a_row_has_the_same_bits_in_every_width(is_fp8: bool) -> None:
    """Batch invariance: 8, 16, 32, 64 and 128 tokens wide, at any place."""
    inputs = make_inputs(Case("all", {"M": 100, "N": 64, "K": 1024}, {"bf16": not is_fp8, "residual": True}), seed=4)
    whole = run(inputs).clone()
    for rows in (slice(0, 1), slice(50, 51), slice(7, 17), slice(60, 92), slice(36, 100)):
        part = {
            name: tensor[rows].clone() if name in ("x", "x_scale", "residual", "out") and tensor is not None else tensor
            for name, tensor in inputs.items()
        }
        part["num_rows"] = torch.tensor([rows.stop - rows.start], dtype=torch.int32)
        assert torch.equal(run(part), whole[rows])


def test_segments_are_added_in_order() -> None:
    """2^24 + 1 is 2^24 in FP32: each order of these four sums has another result."""
    inputs = make_inputs(Case("order", {"M": 1, "N": 128, "K": 1024}, {"bf16": True, "float": True}), seed=0)
    assert plan_skinny_gemm(1, 128, 1024, is_fp8=False).segments == 4
    inputs["x"].fill_(1.0)
    inputs["weight"].zero_()
    inputs["weight"][:, ::256] = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0]).bfloat16()
    assert run(inputs).eq(1.0).all()


def test_rows_from_num_rows_on_are_left_alone_whatever_they_hold() -> None:
    inputs = make_inputs(Case("part", {"M": 12, "N": 64, "K": 512}), seed=5)
    whole = run(inputs).clone()
    inputs["x"].view(torch.uint8)[7:] = 0x7F  # NaN
    inputs["out"].fill_(9.0)
    inputs["num_rows"][0] = 7
    out = run(inputs, CHECKED[0])
    assert torch.equal(out[:7], whole[:7])
    assert (out[7:] == 9.0).all()
    inputs["num_rows"][0] = 0
    inputs["out"].fill_(9.0)
    assert (run(inputs, CHECKED[0]) == 9.0).all()


def test_it_is_the_linear_layer_of_the_pytorch_runner() -> None:
    """The same e4m3 values and scales: what is left are the orders of two FP32 sums."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(16, 640, generator=generator), torch.randn(128, 640, generator=generator)
    x_scale, weight_scale = fp8.row_scales(x), fp8.row_scales(weight)
    values = fp8.quantise(weight, weight_scale)
    expected = linear(x, Matrix(values.float(), weight_scale), is_tiled=True)
    inputs = {
        "x": fp8.quantise(x, x_scale),
        "weight": values,
        "x_scale": x_scale,
        "weight_scale": weight_scale,
        "residual": None,
        "out": torch.empty(16, 128),
        "num_rows": torch.tensor([16], dtype=torch.int32),
    }
    torch.testing.assert_close(run(inputs), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"M": 129, "N": 64, "K": 128}, "M is 129, expected 1 to 128"),
        ({"M": 1, "N": 96, "K": 128}, "N is 96, expected a multiple of 64, at least 64"),
        ({"M": 1, "N": 64, "K": 192}, "K is 192, expected a multiple of 128, at least 128"),
    ],
)
def test_sizes_out_of_bounds_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ContractError, match=f"skinny_gemm: {message}"):
        run(make_inputs(Case("odd", sizes), seed=1))


@pytest.mark.parametrize("missing", ["x_scale", "weight_scale"])
def test_fp8_needs_both_scales(missing: str) -> None:
    inputs = make_inputs(Case("scales", {"M": 1, "N": 64, "K": 128}), seed=1)
    with pytest.raises(ContractError, match="x_scale and weight_scale must both be given for FP8"):
        run(inputs | {missing: None})


def test_the_cases_reach_every_branch() -> None:
    emulated = [case for case in CASES if case.is_emulated]
    plans = [
        plan_skinny_gemm(case.sizes["M"], case.sizes["N"], case.sizes["K"], is_fp8=not case.options.get("bf16"))
        for case in emulated
    ]
    assert {plan.tokens for plan in plans} == {8, 16, 32, 64, 128}
    assert {plan.segments for plan in plans} >= {1, 2, 8}
    assert {plan.stages for plan in plans} >= {1, 4}
    assert {bool(case.options.get("bf16")) for case in emulated} == {True, False}
