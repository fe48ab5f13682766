"""Log-probabilities: agreement with the PyTorch runner, rows that are no numbers, ties."""

from __future__ import annotations

import pytest
import torch

from backend.runner.log_probs import measure
from kernels.check import check_case
from kernels.errors import ContractError
from kernels.log_probs import OP, log_probs, make_inputs
from kernels.op import Case
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "log_probs.cu", "  hw::griddep_wait();\n"),
    Mutant.of(
        "dropped barrier before the groups' maxima are read",
        "log_probs.cu",
        "= is_warp_finite;\n  __syncthreads();\n",
        "= is_warp_finite;\n",
    ),
    Mutant.of(
        "dropped barrier after the list is emptied",
        "log_probs.cu",
        "    num_found[0] = 0;\n  }\n  __syncthreads();\n",
        "    num_found[0] = 0;\n  }\n",
    ),
    Mutant.of(
        "dropped barrier before the warps' sums are added",
        "log_probs.cu",
        "    work.warp_counts[warp] = num_greater;\n  }\n  __syncthreads();\n",
        "    work.warp_counts[warp] = num_greater;\n  }\n",
    ),
    Mutant.of(
        "dropped barrier before the most likely are ranked",
        "log_probs.cu",
        "  });\n  __syncthreads();\n  if (t < num_tops)",
        "  });\n  if (t < num_tops)",
    ),
    Mutant.of(
        "dropped barrier after the histogram is emptied",
        "select.cuh",
        "work.chosen_bin = NUM_BINS;\n    __syncthreads();\n",
        "work.chosen_bin = NUM_BINS;\n",
    ),
    Mutant.of("dropped barrier after the histogram", "select.cuh", "    });\n    __syncthreads();\n", "    });\n"),
    Mutant.of(
        "dropped barrier before the warps' counts are added",
        "select.cuh",
        "      work.warp_masses[warp] = mass;\n    }\n    __syncthreads();\n",
        "      work.warp_masses[warp] = mass;\n    }\n",
    ),
    Mutant.of(
        "dropped barrier before the chosen bin is read",
        "select.cuh",
        "    __syncthreads();\n    const u32 chosen = ",
        "    const u32 chosen = ",
    ),
    Mutant.of(
        "dropped barrier before what the chosen bin's thread says is read",
        "select.cuh",
        "    __syncthreads();\n    if (chosen == NUM_BINS)",
        "    if (chosen == NUM_BINS)",
    ),
    Mutant.of("rows in their own order", "log_probs.cu", "= rows[row_index];", "= row_index;"),
    Mutant.of("ids in their own order", "log_probs.cu", "= ids[place];", "= ids[row_index];"),
    Mutant.of("the highest id first among equals", "select.cuh", "(u32)(MAX_VOCAB - 1 - id)", "(u32)id"),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_the_numbers_are_the_pytorch_runners() -> None:
    inputs = make_inputs(Case("like torch", {"n": 5, "V": 3000, "k": 20}), seed=5)
    rows = inputs["rows"].long()
    expected = measure(inputs["logits"][rows], inputs["ids"][rows].long(), 20)
    log_probs(EmulatedDevice(PLAIN[0]), **inputs)
    assert torch.equal(inputs["ranks"].long(), expected.ranks)
    assert torch.equal(inputs["top_ids"].long(), expected.top_ids)
    torch.testing.assert_close(inputs["chosen_log_probs"], expected.log_probs, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(inputs["top_log_probs"], expected.top_log_probs, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_no_log_probabilities_and_spoils_no_other(value: float) -> None:
    inputs = make_inputs(Case("bad row", {"n": 3, "V": 1024, "k": 3}), seed=1)
    inputs["logits"][inputs["rows"][1], 1000] = value
    expected = OP.reference(**inputs)
    log_probs(EmulatedDevice(CHECKED[0]), **inputs)
    assert inputs["chosen_log_probs"][1].isnan()
    assert inputs["top_log_probs"][1].isnan().all()
    torch.testing.assert_close(
        inputs["top_log_probs"][::2].double(), expected["top_log_probs"][::2], rtol=1e-6, atol=1e-6
    )


def test_rows_from_num_rows_on_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"n": 3, "V": 512, "k": 2}), seed=1)
    inputs["ranks"].fill_(-7)
    inputs["num_rows"][0] = 2
    log_probs(EmulatedDevice(CHECKED[0]), **inputs)
    assert (inputs["ranks"] == -7).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n": 1, "V": 100, "k": 1}, "log_probs: V is 100, expected a multiple of 8, 8 to 262144"),
        ({"n": 1, "V": 512, "k": 33}, "log_probs: k is 33, expected 0 to 32"),
        ({"n": 1, "V": 16, "k": 17}, "log_probs: k is 17, expected 0 to 16"),
    ],
)
def test_sizes_out_of_bounds_are_refused(sizes: dict[str, int], message: str) -> None:
    inputs = make_inputs(Case("odd", {**sizes, "k": 1}), seed=1)
    inputs["top_ids"] = torch.zeros(1, sizes["k"], dtype=torch.int32)
    inputs["top_log_probs"] = torch.zeros(1, sizes["k"])
    with pytest.raises(ContractError, match=message):
        log_probs(EmulatedDevice(), **inputs)
