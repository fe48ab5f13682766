"""The kernel that measures the read ceiling: it reads every word, and its mutants are noticed."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.errors import ContractError
from kernels.op import Case
from kernels.read_bandwidth import OP, make_inputs, read_bandwidth
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "read_bandwidth.cu", "  hw::griddep_wait();\n"),
    Mutant.of("dropped barrier before the warps' sums are added", "read_bandwidth.cu", "  __syncthreads();\n"),
    Mutant.of("tail read beyond the end", "read_bandwidth.cu", "if (piece < num_pieces) pieces", "pieces"),
)


@pytest.mark.parametrize("conditions", [*CHECKED, *PLAIN[:2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_every_word_counts() -> None:
    inputs = make_inputs(Case("some", {"N": 4096 + 16, "B": 2}), seed=0)
    read_bandwidth(EmulatedDevice(PLAIN[0]), **inputs)
    before = inputs["sums"].clone()
    for word in (0, 2047, 2048, 4096, 4111):
        inputs["data"][word] += 1
        read_bandwidth(EmulatedDevice(PLAIN[0]), **inputs)
        block = word // 2048 % 2
        before[block] += 1
        assert torch.equal(inputs["sums"], before), word


@pytest.mark.parametrize(
    ("num_words", "num_blocks", "message"), [(6, 1, "N is 6, expected a multiple of 4"), (4, 0, "B is 0")]
)
def test_sizes_out_of_bounds_are_refused(num_words: int, num_blocks: int, message: str) -> None:
    with pytest.raises(ContractError, match=f"read_bandwidth: {message}"):
        read_bandwidth(
            EmulatedDevice(),
            data=torch.zeros(num_words, dtype=torch.int32),
            sums=torch.zeros(num_blocks, dtype=torch.int32),
        )
