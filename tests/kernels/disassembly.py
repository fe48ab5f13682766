"""Machine code of a cubin in words, by the wheels' cuobjdump and nvdisasm; needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from cuda import pathfinder

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def disassemble(image: bytes) -> str:
    """SASS of every kernel in the cubin."""
    tools = [pathfinder.find_nvidia_binary_utility(name) for name in ("cuobjdump", "nvdisasm")]
    assert all(tools), "cuobjdump and nvdisasm come with requirements/tests.txt"
    # cuobjdump calls nvdisasm by its name.
    search = os.pathsep.join([str(Path(tools[1]).parent), os.environ.get("PATH", "")])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [tools[0], "--dump-sass", file.name]
        finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": search})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def mnemonics(sass: str) -> list[str]:
    """The instructions' names in order, without predicates and operands.

    >>> mnemonics("        /*0010*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;\\n        /*0020*/  EXIT ;")
    ['LDG.E.128', 'EXIT']
    """
    return _INSTRUCTION.findall(sass)
