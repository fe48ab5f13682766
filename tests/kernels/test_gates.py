"""What must hold for the compiled code of every kernel: no spills, no stack, no local memory, the instructions it is about."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernels.build import build
from kernels.compiler import Cubin, compile_program
from kernels.cubin_cache import CubinCache
from kernels.op import Op
from kernels.ops import OPS
from kernels.program import Program
from kernels.recording import recorded_launches
from tests.kernels.disassembly import disassemble, mnemonics

# Compiles and disassembles everything once, which may take minutes on a busy machine.
pytestmark = pytest.mark.timeout(600)

SOURCES = Path(__file__).resolve().parents[2] / "kernels"


@dataclass(frozen=True)
class Code:
    """A compiled program; `instructions` is empty for those that only small cases use."""

    cubin: Cubin
    instructions: tuple[str, ...]

    def faults(self) -> list[str]:
        found = [
            f"{kernel} has {resources.spill_bytes} bytes of spills and a stack of {resources.stack_bytes}"
            for kernel, resources in self.cubin.kernels.items()
            if resources.spill_bytes or resources.stack_bytes
        ]
        if "warning" in self.cubin.log.lower():
            found.append(f"the compiler warns: {self.cubin.log}")
        local = {name for name in self.instructions if name.startswith(("LDL", "STL"))}
        return found + [f"local memory is used: {name}" for name in sorted(local)]


def programs_of(op: Op) -> list[Program]:
    """What is built ahead, and what the emulated cases launch."""
    launched = [launch.program for case in op.cases if case.is_emulated for launch in recorded_launches(op, case)]
    return list(dict.fromkeys((*op.programs, *launched)))


@pytest.fixture(scope="module")
def compiled() -> dict[Program, Code]:
    cache = CubinCache(SOURCES.parent / "build" / "kernels")
    build([program for op in OPS for program in programs_of(op)], cache)
    built_ahead = {program for op in OPS for program in op.programs}

    def read(program: Program) -> Code:
        cubin = cache.get(program)
        return Code(cubin, tuple(mnemonics(disassemble(cubin.image))) if program in built_ahead else ())

    programs = [program for op in OPS for program in programs_of(op)]
    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(read, programs), strict=True))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_kernel_uses_local_memory(op: Op, compiled: dict[Program, Code]) -> None:
    found = {str(program): compiled[program].faults() for program in programs_of(op)}
    assert {program: wrong for program, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_instructions_that_an_operation_is_about_are_there(op: Op, compiled: dict[Program, Code]) -> None:
    found = {name for program in op.programs for name in compiled[program].instructions}
    assert "EXIT" in found
    assert [name for name in op.instructions if not any(other.startswith(name) for other in found)] == []


def test_every_source_is_an_operations() -> None:
    used = {program.source.name for op in OPS for program in programs_of(op)}
    assert {path.name for path in SOURCES.glob("*.cu")} == used


def test_launched_sizes_of_mistral_nemo_are_built_ahead() -> None:
    for op in OPS:
        for case in op.cases:
            if case.name.startswith("NeMo") and case.is_emulated:
                launched = {launch.program for launch in recorded_launches(op, case)}
                assert launched <= set(op.programs), f"{op.name}, {case.name}"


def test_gate_sees_local_memory_and_warnings(tmp_path: Path) -> None:
    source = tmp_path / "stack.cu"
    source.write_text(
        'extern "C" __global__ void stack(const int *index, int *out) {\n'
        "  int values[64], unused;\n"
        "  for (int i = 0; i < 64; i++) values[index[i]] = i;\n"
        "  out[0] = values[index[64]];\n"
        "}\n"
    )
    cubin = compile_program(Program(source))
    found = Code(cubin, tuple(mnemonics(disassemble(cubin.image)))).faults()
    assert found[0] == "stack has 0 bytes of spills and a stack of 256"
    assert "the compiler warns" in found[1]
    assert "local memory is used: LDL" in found
    assert "local memory is used: STL" in found


def test_predicates_do_not_hide_an_instruction() -> None:
    sass = "        /*0010*/  @!UP0 STL.64 [R1], R2 ;\n        /*0020*/  @P1 HGMMA.64x64x16.F32 R24, R4 ;"
    assert mnemonics(sass) == ["STL.64", "HGMMA.64x64x16.F32"]
