"""What the emulator is built with: g++, CUDA's headers from the installed wheels, flags, and a cache of what was built."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = Path(__file__).parent / "native"
KERNELS = ROOT / "kernels"
# Ignored by git; `make clean` removes it.
CACHE = ROOT / "build" / "emulator"

# No contraction of a * b + c: NVRTC is told --fmad=false as well. -fno-gnu-unique: two builds of one kernel live in one process.
# -fstack-clash-protection: a large frame touches each of its pages, so that it cannot step over the guard page.
COMMON_FLAGS = (
    "-std=c++20",
    "-g",
    "-fPIC",
    "-ffp-contract=off",
    "-ftls-model=initial-exec",
    "-fno-gnu-unique",
    "-fstack-clash-protection",
)
LIBRARY_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")
# Kernels speak CUDA's dialect (#pragma unroll, unused lanes), which g++ would warn about.
PLAIN_FLAGS = ("-O2", "-w")
# The hooks see what is left after optimisation: -O1 leaves every access that matters.
CHECKED_FLAGS = ("-O1", "-w", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


class ToolchainError(Exception):
    """The emulator or a kernel could not be built; the message is the compiler's or says what to install."""


class EmulatorUnavailable(Exception):
    """No kernel can be emulated on this machine; a test that meets it is skipped with this text (tests/conftest.py)."""


def why_unavailable() -> str | None:
    """Why no kernel can be emulated on this machine at all; None: it can."""
    machine = platform.machine()
    if machine.lower() not in {"x86_64", "amd64"}:
        return f"the kernel emulator runs on x86-64 only (its stack switch is assembly), this machine is {machine}"
    return None


@cache
def compiler() -> tuple[str, str]:
    """g++ and the version it reports; ToolchainError if there is none or it is too old for C++20."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        raise ToolchainError(
            "no g++ here, which builds the emulated kernels: install it (Debian, Ubuntu: apt install g++)"
        )
    version = subprocess.run([path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=True)
    text = version.stdout.strip()
    if int(text.split(".")[0]) < 11:
        raise ToolchainError(f"{path} is version {text}; the emulated kernels need g++ 11 or newer")
    return path, text


@cache
def cuda_include() -> Path:
    """The folder of CUDA's headers (wheels nvidia-cuda-runtime, nvidia-cuda-crt, nvidia-cuda-cccl)."""
    for folder in sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include")):
        if all((folder / name).exists() for name in ("cuda_fp8.h", "crt/host_defines.h", "nv/target")):
            return folder
    raise ToolchainError("CUDA's headers are not installed: make setup installs nvidia-cuda-runtime, -crt and -cccl")


def include_flags() -> tuple[str, ...]:
    """-I of everything a kernel includes."""
    return (f"-I{NATIVE}", f"-I{KERNELS}", f"-isystem{cuda_include()}")


def digest(parts: Iterable[str | bytes]) -> str:
    """A key of a build: everything that goes into it."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:24]


def run_compiler(arguments: Iterable[str], what: str) -> None:
    """Runs g++; ToolchainError with its output if it fails."""
    result = subprocess.run([compiler()[0], *arguments], capture_output=True, text=True)
    if result.returncode:
        raise ToolchainError(f"g++ failed on {what}:\n{result.stderr[:6000]}")


def cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The file `name` of this key: from the cache if it is whole, otherwise made by `build(path)`.

    Built aside and renamed, so that several processes may do it at once; a checksum beside it finds torn files.
    """
    folder = CACHE / key
    target, checksum = folder / name, folder / f"{name}.sha256"
    try:
        if hashlib.sha256(target.read_bytes()).hexdigest() == checksum.read_text():
            os.utime(folder)  # used: see prune
            return target
    except FileNotFoundError:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / name
        build(made)
        value = Path(aside) / "sha256"
        value.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        made.replace(target)
        value.replace(checksum)
    return target


def prune(unused_days: float = 3.0) -> None:
    """Removes what nothing has used for that long: every change of a header leaves some hundred builds behind."""
    for folder in CACHE.glob("*"):
        with suppress(FileNotFoundError):  # another process prunes as well
            if time.time() - folder.stat().st_mtime > unused_days * 86400:
                shutil.rmtree(folder, ignore_errors=True)
