"""Compiles a program with NVRTC into a cubin for Hopper, and reads from the compiler what each kernel takes.

Needs no GPU and no driver.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cuda import pathfinder
from cuda.bindings import nvrtc

from kernels.errors import BuildError
from kernels.program import Program
from kernels.sources import include_folders, read_source

# sm_90a: wgmma and setmaxnreg exist in the "a" variant only.
# device-as-default: generic lambdas inside kernels would count as host functions, which NVRTC refuses.
# Without contraction of a * b + c, a kernel gives the same bits wherever it is compiled; `__fmaf_rn` asks for one.
FLAGS = (
    "--gpu-architecture=sm_90a",
    "--std=c++20",
    "--device-as-default-execution-space",
    "--fmad=false",
    "--generate-line-info",
    "--ptxas-options=--verbose",
)

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_90a'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """What one thread (registers, stack, spills in bytes) and one block (static shared memory) of a kernel take."""

    num_registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """A compiled program: the image to load, its kernels by name, and what the compiler said."""

    image: bytes
    kernels: dict[str, KernelResources]
    log: str


def compile_program(program: Program) -> Cubin:
    """Compiles; a fraction of a second for most programs.

    BuildError holds the compiler's messages, or says that NVRTC or the CUDA headers are missing. Safe to call from
    several threads at once, and faster so: NVRTC runs without Python's lock.
    """
    options = [*FLAGS, *(f"--define-macro={name}={value}" for name, value in program.definitions)]
    options += [f"--include-path={folder}" for folder in include_folders()]
    # A program of the tests may include what lies beside it.
    options += [f"--include-path={program.source.parent}"]
    library = _nvrtc()
    handle = _checked(library.nvrtcCreateProgram(read_source(program.source).encode(), _name(program), 0, [], []))
    try:
        (status,) = library.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        log = _text(handle, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
        if status != library.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"{program} does not compile ({status.name}):\n{log}")
        image = _bytes(handle, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(handle)
    kernels = read_resources(log)
    if not kernels:
        raise BuildError(f"{program}: no kernel in it, or none that the compiler's log tells of:\n{log}")
    return Cubin(image, kernels, log)


def compiler_version() -> str:
    """NVRTC's version with name and size of its library, since the version lacks the patch level."""
    major, minor = _checked(_nvrtc().nvrtcVersion())
    path = Path(str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)).resolve()
    return f"NVRTC {major}.{minor} {path.name} {path.stat().st_size}"


def read_resources(log: str) -> dict[str, KernelResources]:
    """Kernel name -> what it takes, from the log of `ptxas --verbose`.

    >>> read_resources('''ptxas info    : Compiling entry function 'copy' for 'sm_90a'
    ... ptxas info    : Function properties for copy
    ... ptxas         .     0 bytes stack frame, 0 bytes spill stores, 8 bytes spill loads
    ... ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem
    ... ''')
    {'copy': KernelResources(num_registers=32, stack_bytes=0, spill_bytes=8, shared_bytes=64)}
    """
    starts = list(_ENTRY.finditer(log))
    ends = [*(start.start() for start in starts[1:]), len(log)]
    return {start[1]: _resources(log[start.end() : end]) for start, end in zip(starts, ends, strict=False)}


def _resources(text: str) -> KernelResources:
    stack, registers, shared = _STACK.search(text), _REGISTERS.search(text), _SHARED.search(text)
    if stack is None or registers is None:
        raise BuildError(f"the compiler's log has another form than expected:\n{text}")
    return KernelResources(
        num_registers=int(registers[1]),
        stack_bytes=int(stack[1]),
        spill_bytes=int(stack[2]) + int(stack[3]),
        shared_bytes=int(shared[1]) if shared else 0,
    )


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    try:
        pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except pathfinder.DynamicLibNotFoundError as error:
        raise BuildError(
            "NVRTC was not found: install nvidia-cuda-nvrtc (requirements/kernels.txt) or a CUDA toolkit"
        ) from error
    return nvrtc


def _name(program: Program) -> bytes:
    return f"{program.source.parent.name}/{program.source.name}".encode()


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC answered {status.name}")
    return values[0] if len(values) == 1 else values


def _bytes(handle: Any, size_of: Any, read: Any) -> bytes:
    content = bytearray(_checked(size_of(handle)))
    _checked(read(handle, content))
    return bytes(content)


def _text(handle: Any, size_of: Any, read: Any) -> str:
    return _bytes(handle, size_of, read).decode(errors="replace").rstrip("\0 \n")
