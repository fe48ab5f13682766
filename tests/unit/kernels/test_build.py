from __future__ import annotations

from pathlib import Path

import pytest

from kernels.build import build
from kernels.compiler import Cubin
from kernels.cubin_cache import CubinCache
from kernels.errors import BuildError
from kernels.program import Program

PROGRAMS = [Program(Path(__file__).parent / "copy.cu", (("E", size),)) for size in (16, 32, 64)]


def test_missing_programs_are_compiled_with_progress(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path)
    cache.get(PROGRAMS[0])
    lines: list[str] = []
    assert build([*PROGRAMS, PROGRAMS[1]], cache, lines.append) == 2
    assert lines[0].startswith("kernels: compiling 2 of 3 programs on ")
    assert lines[0].endswith(f"into {tmp_path}, once")
    assert {line.split(" ", 2)[2] for line in lines[1:3]} == {"copy E=32", "copy E=64"}
    assert [line.split(" ")[1] for line in lines[1:3]] == ["1/2", "2/2"]
    assert lines[3].startswith("kernels: compiled 2 programs in ")
    assert all(cache.find(program) is not None for program in PROGRAMS)


def test_nothing_is_said_when_all_are_there(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path, lambda _: Cubin(b"", {}, ""))
    lines: list[str] = []
    build(PROGRAMS, cache, lines.append)
    assert build(PROGRAMS, cache, lines.append) == 0
    assert len(lines) == 5


def test_failure_is_passed_on(tmp_path: Path) -> None:
    def fail(program: Program) -> Cubin:
        raise BuildError(f"{program} does not compile")

    with pytest.raises(BuildError, match="copy E=16 does not compile"):
        build(PROGRAMS[:1], CubinCache(tmp_path, fail), lambda _: None)
