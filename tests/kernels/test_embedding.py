"""The embedding gather: ids, slots, and ids that are none."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.embedding import CASES, OP, embedding, make_inputs
from kernels.errors import ContractError
from kernels.op import Case
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "embedding.cu", "  hw::griddep_wait();\n"),
    Mutant.of("wrong slot", "embedding.cu", "last_ids[-1 - id]", "last_ids[-id]"),
    Mutant.of("no bound of ids", "embedding.cu", "if (id >= 0 && id < vocab_size) values", "values"),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_an_id_outside_the_vocabulary_gives_a_row_of_nan() -> None:
    inputs = make_inputs(Case("ids", {"T": 4, "E": 128, "V": 8, "slots": 2}), seed=1)
    inputs["token_ids"] = torch.tensor([3, 8, -1, -2], dtype=torch.int32)
    inputs["last_ids"] = torch.tensor([5, -7], dtype=torch.int32)
    embedding(EmulatedDevice(CHECKED[0]), **inputs)
    out = inputs["out"]
    assert torch.equal(out[0], inputs["table"][3])
    assert torch.equal(out[2], inputs["table"][5])
    assert out[[1, 3]].isnan().all()


def test_tokens_from_num_tokens_on_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"T": 5, "E": 256, "V": 8, "slots": 2}), seed=1)
    inputs["out"].fill_(7.0)
    inputs["num_tokens"][0] = 3
    embedding(EmulatedDevice(CHECKED[0]), **inputs)
    torch.testing.assert_close(
        inputs["out"][:3].float(), OP.reference(**inputs)["out"][:3], rtol=0, atol=0, equal_nan=True
    )
    assert (inputs["out"][3:] == 7.0).all()


def test_a_hidden_size_that_is_no_multiple_of_128_is_refused() -> None:
    inputs = make_inputs(Case("odd", {"T": 1, "E": 64, "V": 8, "slots": 1}), seed=1)
    with pytest.raises(ContractError, match="embedding: E is 64, expected a multiple of 128, at least 128"):
        embedding(EmulatedDevice(), **inputs)


def test_the_cases_reach_every_number_of_blocks_per_row() -> None:
    assert {-(-case.sizes["E"] // 1024) for case in CASES if case.is_emulated} >= {1, 2}
