"""The checks of a kernel find each kind of mistake: the 'kernels' here are written in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.check import check_case
from kernels.errors import CheckError
from kernels.launch import Device
from kernels.op import Case, Cost, Inputs, Op
from tests.unit.kernels.fake_device import FakeDevice


def double(device: Device, *, x: torch.Tensor, out: torch.Tensor, total: torch.Tensor, work: torch.Tensor) -> None:
    work.copy_(x)
    out.copy_(2 * x)
    total.add_(1)


def reference(x: torch.Tensor, out: torch.Tensor, total: torch.Tensor, work: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": 2 * x.double(), "total": total.double() + 1}


def make_inputs(case: Case, seed: int) -> Inputs:
    x = torch.randn(case.sizes["T"], 4, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "out": torch.empty_like(x), "total": torch.zeros(3), "work": torch.empty_like(x)}


OP = Op(
    name="double",
    formula="out = 2 x",
    launch=double,
    make_inputs=make_inputs,
    reference=reference,
    bounds=lambda inputs, expected: {"out": 0.01, "total": 0.0},
    cost=lambda case: Cost(0, 0),
    cases=(),
    programs=(),
    outputs=("out",),
    updated=("total",),
    scratch=("work",),
    rows=("x", "out", "work"),
)
CASE = Case("five", {"T": 5})


def check(then: Callable[..., None] | None = None, **changes: Any) -> float:
    """The check of `double`, with something more done after it."""

    def launch(device: Device, **inputs: Any) -> None:
        double(device, **inputs)
        if then is not None:
            then(**inputs)

    return check_case(replace(OP, launch=launch, **changes), CASE, FakeDevice()).worst_share


def outside(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The element that many places from the tensor's first, inside or beside it."""
    return torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + offset)


def test_right_results_pass() -> None:
    assert check() == 0.0
    assert check(lambda out, **_: out.add_(0.005)) == pytest.approx(0.5, abs=1e-3)
    assert check_case(OP, Case("none", {"T": 0}), FakeDevice()).worst_share == 0.0


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (
            lambda out, **_: out[3, 1].add_(0.02),
            r"out\[3, 1\] is .*, expected .* within 0.01; 1 of 20 elements are wrong",
        ),
        (lambda out, **_: out[4].fill_(float("nan")), r"out\[4, 0\] is nan, .* 4 of 20"),
        (lambda total, **_: total[2].add_(1), r"total\[2\] is 2.0, expected 1.0 within 0"),
        (lambda x, **_: x[0, 0].add_(1), "x has changed and is neither output nor updated"),
        (lambda out, **_: outside(out, 20).fill_(0), "something was written beside out"),
        (lambda out, **_: outside(out, -1).fill_(0), "something was written beside out"),
        (lambda x, **_: outside(x, 20).fill_(0), "something was written beside x"),
    ],
)
def test_each_mistake_is_found(then: Callable[..., None], message: str) -> None:
    with pytest.raises(CheckError, match=f"double, five: {message}"):
        check(then)


def test_output_that_is_not_written_is_found() -> None:
    def forget(device: Device, **inputs: Any) -> None:
        last = inputs["out"][-1].clone()
        double(device, **inputs)
        inputs["out"][-1] = last

    with pytest.raises(CheckError, match=r"double, five: out\[4, 0\] is nan"):
        check_case(replace(OP, launch=forget), CASE, FakeDevice())


def test_scratch_starts_as_poison() -> None:
    def read(device: Device, **inputs: Any) -> None:
        before = inputs["work"].clone()
        double(device, **inputs)
        inputs["out"].add_(before)

    with pytest.raises(CheckError, match=r"double, five: out\[0, 0\] is nan"):
        check_case(replace(OP, launch=read), CASE, FakeDevice())


def test_results_that_differ_between_runs_are_found() -> None:
    runs: list[int] = []

    def drift(out: torch.Tensor, **_: Any) -> None:
        runs.append(1)
        out.add_(0.001 * len(runs))

    with pytest.raises(CheckError, match="double, five: out differs between two runs on the same inputs"):
        check(drift)


def test_rows_that_depend_on_the_batch_are_found() -> None:
    def depend(x: torch.Tensor, out: torch.Tensor, **_: Any) -> None:
        out.add_(0.001 * len(x))

    with pytest.raises(CheckError, match=r"double, five: out\[0\] alone differs from the same row in the batch"):
        check(depend)
    check(depend, rows=())


def test_not_a_number_where_it_is_expected_passes() -> None:
    def expected(x: torch.Tensor, **others: Any) -> dict[str, torch.Tensor]:
        values = reference(x, **others)
        values["out"][1, 2] = float("nan")
        return values

    check(lambda out, **_: out[-4, 2].fill_(float("nan")) if len(out) == 5 else None, reference=expected, rows=())


def test_reference_that_is_silent_or_of_another_shape_is_found() -> None:
    with pytest.raises(CheckError, match="double, five: out was written and the reference does not say what it is"):
        check(reference=lambda **_: {})
    with pytest.raises(CheckError, match=r"double, five: the reference of out has shape \[20\]"):
        check(reference=lambda x, **others: {**reference(x, **others), "out": 2 * x.view(-1)})
