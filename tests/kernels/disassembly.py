"""Machine code of a cubin in words, by the wheel's nvdisasm; needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile

from cuda import pathfinder

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def disassemble(image: bytes) -> str:
    """SASS of every kernel in the cubin."""
    tool = pathfinder.find_nvidia_binary_utility("nvdisasm")
    assert tool is not None, "nvdisasm comes with requirements/tests.txt"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        finished = subprocess.run([tool, "--print-code", file.name], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def mnemonics(sass: str) -> list[str]:
    """The instructions' names in order, without predicates and operands.

    >>> mnemonics("        /*0010*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;\\n        /*0020*/  EXIT ;")
    ['LDG.E.128', 'EXIT']
    """
    return _INSTRUCTION.findall(sass)
