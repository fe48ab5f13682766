"""Every barrier, wait and fence that a kernel lists is missed when it is taken away.

A test module of an operation (`test_<op>.py`) lists its mistakes as `MUTANTS`, and those that cannot be noticed, with the
reason, as `UNNOTICED`.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest

from kernels.check import check_case
from kernels.launch import Device
from kernels.op import Op
from kernels.ops import OPS
from tests.emulator.build import Mutant
from tests.emulator.mutation import Subject, noticed
from tests.emulator.subjects import SUBJECTS
from tests.kernels.unit_mutants import UNIT_SUBJECTS

HERE = Path(__file__).parent


def run_cases(op: Op, device: Device) -> None:
    """The operation's emulated cases, the small ones first."""
    cases = [case for case in op.cases if case.is_emulated]
    for case in sorted(cases, key=lambda case: sum(case.sizes.values())):
        check_case(op, case, device)


def op_subjects() -> list[Subject]:
    """The operations that list mistakes."""
    subjects = []
    for op in OPS:
        if not (HERE / f"test_{op.name}.py").exists():
            continue
        module = importlib.import_module(f"tests.kernels.test_{op.name}")
        mutants = getattr(module, "MUTANTS", ())
        subjects.append(Subject(op.name, partial(run_cases, op), tuple(mutants), getattr(module, "UNNOTICED", {})))
    return subjects


LISTED = [*UNIT_SUBJECTS, *op_subjects()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("subject", "mutant"),
    [
        pytest.param(subject, mutant, id=f"{subject.name}: {mutant.name}")
        for subject in LISTED
        for mutant in subject.mutants
    ],
)
def test_planted_mistake_is_noticed(subject: Subject, mutant: Mutant) -> None:
    said = noticed(subject.run, mutant)
    if mutant.name in subject.unnoticed:
        assert said is None, f"is noticed after all, take it off the list: {said}"
    else:
        assert said is not None


def test_nearly_all_are_noticed() -> None:
    every = [*LISTED, *SUBJECTS]
    num_mutants = sum(len(subject.mutants) for subject in every)
    num_unnoticed = sum(len(subject.unnoticed) for subject in every)
    assert num_mutants > 100
    assert num_unnoticed <= 0.05 * num_mutants
