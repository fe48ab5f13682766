"""A program: one source file with the macros it is compiled with. Needs no torch, so that compiling starts fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

COMPUTE_CAPABILITY = (9, 0)
"""Of the GPUs that programs are compiled for: Hopper (`sm_90a` in compiler.py)."""


@dataclass(frozen=True)
class Program:
    """One `.cu` file with the macros it is compiled with, sorted by name: `definitions` are (name, value)."""

    source: Path
    definitions: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, stem: str, **definitions: int) -> Program:
        """The program `kernels/<stem>.cu`.

        >>> str(Program.of("rmsnorm", E=5120, ADD=1))
        'rmsnorm ADD=1 E=5120'
        """
        return cls(Path(__file__).parent / f"{stem}.cu", tuple(sorted(definitions.items())))

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.source.stem

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.definitions)])
