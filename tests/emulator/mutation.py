"""Mutation tests: a kernel's barriers, waits and fences are taken away one by one, and each time it must be noticed.

A checker that has gone blind passes every right kernel. So each kernel lists, next to its tests, the mistakes that would
matter in it; a mistake counts as noticed when the emulator stops the kernel or its result is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kernels.errors import CheckError, LaunchError
from kernels.launch import Device
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, Conditions, EmulatedDevice


@dataclass(frozen=True)
class Subject:
    """A kernel with what runs it: `run(device)` raises AssertionError or CheckError when the result is wrong.

    `unnoticed` names the mutants that nothing here can notice, each with the reason.
    """

    name: str
    run: Callable[[Device], None]
    mutants: tuple[Mutant, ...]
    unnoticed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [mutant.name for mutant in self.mutants]
        if len(set(names)) < len(names) or not set(self.unnoticed) <= set(names):
            raise ValueError(f"{self.name}: mutants' names must be distinct, and unnoticed ones among them")


def noticed(run: Callable[[Device], None], mutant: Mutant, conditions: Iterable[Conditions] = CHECKED) -> str | None:
    """What was said of the mutant, under the first of the conditions that shows it; None: nobody noticed."""
    for condition in conditions:
        try:
            run(EmulatedDevice(condition, mutant))
        except (LaunchError, CheckError, AssertionError) as error:
            return str(error) or type(error).__name__
    return None
