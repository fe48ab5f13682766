"""Builds the emulator's library and, for each program, the shared object that holds its kernels."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kernels.program import Program
from tests.emulator.toolchain import (
    CHECKED_FLAGS,
    COMMON_FLAGS,
    KERNELS,
    LIBRARY_FLAGS,
    NATIVE,
    PLAIN_FLAGS,
    cached,
    compiler,
    digest,
    include_flags,
    prune,
    run_compiler,
)

# Read into every kernel ahead of time.
PRECOMPILED = ("hopper.cuh", "tensor_copies.cuh")


@dataclass(frozen=True)
class Mutant:
    """A mistake to plant: in `file` (a program's source or a header of kernels/) each old text, there once, becomes the new."""

    name: str
    file: str
    replacements: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, file: str, old: str, new: str = "") -> Mutant:
        """One replacement; `new` empty removes the text."""
        return cls(name, file, ((old, new),))

    def apply(self, text: str) -> str:
        """The mutated text; ValueError if an old text is not there exactly once."""
        for old, new in self.replacements:
            if (found := text.count(old)) != 1:
                raise ValueError(f"mutant {self.name!r}: {old!r} occurs {found} times in {self.file}, expected once")
            text = text.replace(old, new)
        return text


@cache
def library() -> Path:
    """The emulator itself, one library for all kernels."""
    sources = sorted(NATIVE.glob("*.cpp"))
    texts = [path.read_text() for path in sorted(NATIVE.iterdir())]
    flags = (*COMMON_FLAGS, *LIBRARY_FLAGS)

    def build(target: Path) -> None:
        prune()
        objects = [target.parent / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, to: Path) -> None:
            run_compiler([*flags, *include_flags(), "-c", str(source), "-o", str(to)], source.name)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects))
        run_compiler(["-shared", "-Wl,-Bsymbolic", *map(str, objects), "-ldl", "-o", str(target)], "libemulator.so")

    return cached("libemulator.so", digest([*texts, *flags, *compiler()]), build)


@cache
def headers_key(checked: bool) -> str:
    """A key of everything that kernels include."""
    texts = [path.read_text() for folder in (NATIVE, KERNELS) for path in sorted(folder.glob("*.*h"))]
    return digest([*texts, *_flags(checked), *include_flags(), *compiler()])


@cache
def _precompiled(checked: bool) -> Path:
    """hopper.cuh and the CUDA headers, parsed once."""

    def build(target: Path) -> None:
        run_compiler(
            [*_flags(checked), *include_flags(), "-x", "c++-header", str(KERNELS / "hopper.cuh"), "-o", str(target)],
            "hopper.cuh",
        )

    prelude = cached("prelude.h.gch", headers_key(checked), build).with_suffix("")
    # What g++ reads instead when a definition changes the meaning of something in the precompiled header.
    prelude.write_text('#include "hopper.cuh"\n')
    return prelude


def _flags(checked: bool) -> tuple[str, ...]:
    return (*COMMON_FLAGS, *(CHECKED_FLAGS if checked else PLAIN_FLAGS))


def build(program: Program, checked: bool, mutant: Mutant | None = None) -> Path:
    """The shared object of a program's kernels. ToolchainError with the compiler's output."""
    source = program.source.read_text()
    headers: dict[str, str] = {}
    if mutant is not None:
        if mutant.file == program.source.name:
            source = mutant.apply(source)
        elif f'"{mutant.file}"' in source:
            headers[mutant.file] = mutant.apply((KERNELS / mutant.file).read_text())
        else:
            raise ValueError(f"mutant {mutant.name!r}: {program.source.name} does not include {mutant.file}")
    name = f"{program.name}{'-checked' if checked else ''}.so"
    definitions = [f"-D{macro}={value}" for macro, value in program.definitions]
    local = [path.read_text() for path in sorted(program.source.parent.glob("*.cuh"))]
    key = digest(
        [
            Path(__file__).read_bytes(),
            name,
            source,
            *definitions,
            *headers,
            *headers.values(),
            *local,
            headers_key(checked),
            str(library()),
        ]
    )

    def compile_and_link(target: Path) -> None:
        # Beside the source, so that quoted includes find mutated headers first.
        for header, text in headers.items():
            (target.parent / header).write_text(f'#line 1 "{header}"\n{text}')
        unit = target.parent / program.source.name  # addr2line may give this name instead of #line's
        unit.write_text(f'#line 1 "{program.source.name}"\n{source}')
        prelude = [] if any(h in PRECOMPILED for h in headers) else ["-include", str(_precompiled(checked))]
        what = f"{program}{f' with mutant {mutant.name}' if mutant else ''}"
        compiled = str(unit.with_suffix(".o"))
        flags = [*_flags(checked), *prelude, *definitions, f"-I{program.source.parent}", *include_flags()]
        run_compiler([*flags, "-x", "c++", "-c", str(unit), "-o", compiled], what)
        # Linked without -fsanitize=thread, which would bring libtsan along.
        run_compiler(["-shared", "-Wl,-Bsymbolic", compiled, str(library()), "-o", str(target)], what)

    return cached(name, key, compile_and_link)


def exported_kernels(program: Program) -> list[str]:
    """Names after EXPORT_KERNEL in a program's source."""
    return re.findall(r"^EXPORT_KERNEL\((\w+)\)", program.source.read_text(), re.MULTILINE)
