"""A wall clock that tests can set, for the processes of one server: wall_clock.c, preloaded into all of them."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import time
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("wall_clock.c")
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
_NUM_BYTES = 8


class WallClock:
    """What runs with `environment` reads this clock in place of the machine's; other processes do not."""

    def __init__(self, folder: Path) -> None:
        """Compile into `folder`; the test is skipped where there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            pytest.skip("a wall clock that can be set is written in C, and there is no C compiler here")
        self.library = folder / "wall_clock.so"
        subprocess.run([compiler, *_FLAGS, "-o", str(self.library), str(_SOURCE), "-ldl"], check=True, timeout=60)
        path = folder / "offset"
        path.write_bytes(bytes(_NUM_BYTES))
        with path.open("r+b") as file:
            self._offset_ns = ctypes.c_int64.from_buffer(mmap.mmap(file.fileno(), _NUM_BYTES))
        self.environment = {"LD_PRELOAD": str(self.library), "WALL_CLOCK_FILE": str(path)}

    def jump(self, offset_s: int) -> None:
        """Set it to so many seconds ahead of the machine's clock."""
        self._offset_ns.value = offset_s * 10**9

    def now_s(self) -> float:
        """What it says, in seconds since 1970."""
        return time.time() + self._offset_ns.value / 1e9

    def is_read_by(self, pid: int) -> bool:
        """Whether a process was started with it."""
        return str(self.library) in Path(f"/proc/{pid}/maps").read_text()
