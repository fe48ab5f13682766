"""Every function of hopper.cuh does under the emulator what the ISA says, whatever the order of threads and copies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kernels import hopper_generator
from kernels.compiler import compile_program
from kernels.program import Program
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice
from tests.emulator.subjects import FOLDER
from tests.emulator.toolchain import KERNELS
from tests.kernels.unit import HERE, UNITS, Unit
from tests.kernels.units import ALL

HEADERS = ("hopper.cuh", "tensor_copies.cuh", "wgmma.cuh")


def identifier(value: object) -> str | None:
    if isinstance(value, Unit):
        return value.name
    if isinstance(value, Conditions):
        return f"{'checked' if value.checked else 'plain'} {value.schedule.name} {value.delivery.name}".lower()
    return None


def runs() -> list[tuple[Unit, Conditions]]:
    """Every unit under every condition; of the many widths of wgmma only some."""
    few = {("N", 8), ("N", 64), ("N", 256)}
    return [
        (unit, conditions)
        for unit in ALL
        for index, conditions in enumerate((*CHECKED, *PLAIN))
        if index == 0 or not unit.program.definitions or few.intersection(unit.program.definitions)
    ]


@pytest.mark.parametrize(("unit", "conditions"), runs(), ids=identifier)
def test_unit(unit: Unit, conditions: Conditions) -> None:
    unit.check(unit.run(EmulatedDevice(conditions)))


GATED = [
    UNITS,
    *(Program(HERE / "units_wgmma.cu", (("N", n),)) for n in (8, 160, 256)),
    *(Program(FOLDER / f"{name}.cu") for name in ("reduction", "gather", "gemm")),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", GATED, ids=str)
def test_unit_kernels_compile_for_hopper_without_spills(program: Program) -> None:
    resources = compile_program(program).kernels
    assert set(resources) == set(re.findall(r"^EXPORT_KERNEL\((\w+)\)", program.source.read_text(), re.MULTILINE)) - (
        {"bf16_transposed", "f16_transposed"} if dict(program.definitions).get("N", 0) % 64 else set()
    )
    spilled = {name: used for name, used in resources.items() if used.spill_bytes or used.stack_bytes}
    assert spilled == {}


def test_every_function_has_a_unit_kernel() -> None:
    text = "".join((HERE / name).read_text() for name in ("units.cu", "units_wgmma.cu"))
    # Inside macros the rank is pasted into the name.
    text += "".join(text.replace("##RANK##", str(rank)).replace("##RANK", str(rank)) for rank in (2, 3, 4, 5))
    defined = [
        name
        for header in HEADERS
        for name in re.findall(r"^HW [\w:<> ]+?[ *](\w+)\(", (KERNELS / header).read_text(), re.MULTILINE)
    ]
    assert len(defined) > 60
    # NOTE: swizzle128 and wgmma_descriptor contain no instruction but are part of what a tile is read by.
    assert [name for name in dict.fromkeys(defined) if not re.search(rf"\b{name}\b", text)] == []


def test_every_unit_kernel_is_launched() -> None:
    exported = {
        name
        for source in ("units.cu", "units_wgmma.cu")
        for name in re.findall(r"^EXPORT_KERNEL\((\w+)\)", (HERE / source).read_text(), re.MULTILINE)
    }
    assert exported == {unit.kernel for unit in ALL}


@pytest.mark.parametrize(
    ("name", "text"),
    [("tensor_copies.cuh", hopper_generator.tensor_copies()), ("wgmma.cuh", hopper_generator.wgmma())],
)
def test_generated_headers_are_up_to_date(name: str, text: str) -> None:
    assert (KERNELS / name).read_text() == text, "run python -m kernels.hopper_generator"


def test_kernels_keep_to_what_both_compilers_understand() -> None:
    forbidden = re.compile(
        r"\basm\b|^\s*#\s*(if|ifdef|ifndef)\b|__shared__|\bvolatile\b|__activemask|\bemu::", re.MULTILINE
    )
    sources = [*sorted(KERNELS.glob("*.cu")), *sorted(Path(KERNELS).glob("*.cuh"))]
    found = {
        path.name: match.group()
        for path in sources
        if path.name not in HEADERS and (match := forbidden.search(re.sub(r"//.*", "", path.read_text())))
    }
    assert found == {}
