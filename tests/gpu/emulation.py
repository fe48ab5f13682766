"""Whether this machine can also emulate, for comparisons bit for bit: it needs g++ and some more of CUDA's headers."""

from __future__ import annotations

from functools import cache

from tests.emulator.device import PLAIN, EmulatedDevice
from tests.emulator.toolchain import ToolchainError, compiler, cuda_include, why_unavailable


@cache
def why_not_emulated() -> str | None:
    """None if it can."""
    try:
        compiler()
        cuda_include()
    except ToolchainError as error:
        return str(error)
    return why_unavailable()


def emulator() -> EmulatedDevice:
    """The emulator at its fastest: it serves as the reference here and checks nothing."""
    return EmulatedDevice(PLAIN[0])
