"""The scatter of words: every case, what is left alone, what is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.errors import ContractError
from kernels.op import Case
from kernels.scatter import CASES, MAX_WORDS, OP, make_inputs, scatter
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "scatter.cu", "  hw::griddep_wait();\n"),
    Mutant.of("one update too many", "scatter.cu", "i < count;", "i <= count;"),
    Mutant.of("every other update", "scatter.cu", "updates + 2 * i", "updates + 4 * i"),
    Mutant.of("no second round", "scatter.cu", "i += gridDim.x * NUM_THREADS", "i += 1 << 30"),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_what_no_update_names_is_left_alone() -> None:
    inputs = make_inputs(CASES[3], seed=1)
    before = inputs["memory"].clone()
    scatter(EmulatedDevice(CHECKED[0]), **inputs)
    named = inputs["updates"][: int(inputs["num_updates"]), 0].long()
    assert torch.equal(inputs["memory"][named], inputs["updates"][: len(named), 1])
    others = torch.ones(len(before), dtype=torch.bool)
    others[named] = False
    assert torch.equal(inputs["memory"][others], before[others])


def test_a_memory_that_places_cannot_name_is_refused() -> None:
    inputs = make_inputs(CASES[2], seed=1)
    inputs["memory"] = torch.empty(1, dtype=torch.int32).expand(MAX_WORDS + 1)
    with pytest.raises(ContractError, match="scatter: memory has strides"):
        scatter(EmulatedDevice(), **inputs)
    with pytest.raises(ContractError, match="scatter: n is 0, expected at least 1"):
        scatter(EmulatedDevice(), **make_inputs(CASES[2], seed=1) | {"updates": torch.empty(0, 2, dtype=torch.int32)})
