"""The gather of rows: every case, rows that are left alone, what is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.errors import ContractError
from kernels.gather_rows import CASES, OP, gather_rows, make_inputs
from kernels.op import Case
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "gather_rows.cu", "  hw::griddep_wait();\n"),
    Mutant.of("rows in their own order", "gather_rows.cu", "= rows[row];", "= row;"),
    Mutant.of("scale of the target", "gather_rows.cu", "= scale[source]", "= scale[row]"),
    Mutant.of("no bound of pieces", "gather_rows.cu", " || piece >= ROW_BYTES / 16", ""),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_rows_from_num_rows_on_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"T": 4, "M": 5, "E": 256}, {"fp8": True}), seed=1)
    for name in ("out", "out_scale"):
        inputs[name].view(torch.uint8).fill_(7)
    inputs["num_rows"][0] = 3
    gather_rows(EmulatedDevice(CHECKED[0]), **inputs)
    expected = OP.reference(**inputs)
    assert torch.equal(inputs["out"][:3].float(), expected["out"][:3])
    assert torch.equal(inputs["out_scale"][:3], expected["out_scale"][:3])
    assert all((inputs[name][3:].view(torch.uint8) == 7).all() for name in ("out", "out_scale"))


def test_what_does_not_fit_together_is_refused() -> None:
    inputs = make_inputs(CASES[2], seed=1)
    with pytest.raises(ContractError, match="gather_rows: scale and out_scale must both be given, or none of them"):
        gather_rows(EmulatedDevice(), **inputs | {"out_scale": None})
    with pytest.raises(ContractError, match=r"out has dtype torch\.bfloat16, expected torch\.float8_e4m3fn"):
        gather_rows(EmulatedDevice(), **inputs | {"out": inputs["out"].bfloat16()})
    inputs = make_inputs(Case("odd", {"T": 1, "M": 1, "E": 64}), seed=1)
    with pytest.raises(ContractError, match="gather_rows: E is 64, expected a multiple of 128, at least 128"):
        gather_rows(EmulatedDevice(), **inputs)
