"""Right kernels pass under every condition, and every mistake planted in them is noticed."""

from __future__ import annotations

from itertools import product

import pytest

from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, Conditions, Delivery, EmulatedDevice, Schedule
from tests.emulator.mutation import Subject, noticed
from tests.emulator.subjects import GEMM, SUBJECTS, run_gemm

EVERY = [
    Conditions(checked, schedule, delivery, seed, spurious_waits=seed % 3 == 1)
    for seed, (checked, schedule, delivery) in enumerate(product((True, False), Schedule, Delivery))
]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_right_kernel_raises_no_alarm(subject: Subject) -> None:
    for conditions in EVERY:
        subject.run(EmulatedDevice(conditions))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (128, 128, 128), (130, 136, 1104)])
def test_gemm_of_other_sizes(m: int, n: int, k: int) -> None:
    run_gemm(EmulatedDevice(CHECKED[0]), m, n, k)


@pytest.mark.parametrize(
    ("subject", "mutant"),
    [
        pytest.param(subject, mutant, id=f"{subject.name}: {mutant.name}")
        for subject in SUBJECTS
        for mutant in subject.mutants
    ],
)
def test_planted_mistake_is_noticed(subject: Subject, mutant: Mutant) -> None:
    assert noticed(subject.run, mutant) is not None


def test_a_wrong_result_alone_is_noticed_too() -> None:
    """So a mutant that no check of the emulator sees still counts, by the reference."""
    mutant = Mutant.of("scale of the wrong row", "gemm.cu", "a_scale[m0 + row]", "a_scale[m0]")
    assert "values are wrong" in (noticed(GEMM.run, mutant) or "")


def test_a_harmless_change_is_not_noticed() -> None:
    mutant = Mutant.of("nothing", "gemm.cu", "tma_prefetch_descriptor(&a);", "tma_prefetch_descriptor(&b);")
    assert noticed(GEMM.run, mutant) is None
