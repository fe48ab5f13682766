"""A program's source with every header it includes, for the key under which its compiled form is kept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cuda import pathfinder

from kernels.errors import BuildError

KERNEL_FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


@lru_cache(maxsize=1)
def include_folders() -> tuple[Path, ...]:
    """Where the compiler looks for headers: this folder, then CUDA's (a wheel's or an installed toolkit's).

    BuildError if there are no CUDA headers.
    """
    found = pathfinder.find_nvidia_header_directory("cudart")
    if found is None:
        raise BuildError(
            "the CUDA headers were not found: install nvidia-cuda-runtime (requirements/kernels.txt) or a CUDA toolkit"
        )
    return KERNEL_FOLDER, Path(found)


def read_source(path: Path) -> str:
    """Text of a `.cu` file. BuildError if it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"{path}: cannot read the source ({error.strerror})") from error


def sources_digest(source: Path, folders: Sequence[Path]) -> str:
    """One digest of a source and of all that it includes, directly or not, whichever `#if` stands around it.

    A header that is in none of the folders is the compiler's own (or left out by an `#if`) and counts by its name.
    """
    digests: dict[str, str] = {}
    waiting = [(source.name, source)]
    while waiting:
        name, path = waiting.pop()
        text_digest, includes = _scan(path, _version(path))
        digests[name] = text_digest
        for included in includes:
            if included not in digests:
                # Marks it as seen; a header that is found overwrites this.
                digests[included] = "not in the include folders"
                candidates = [folder / included for folder in (path.parent, *folders)]
                found = next((candidate for candidate in candidates if candidate.is_file()), None)
                if found is not None:
                    waiting.append((included, found))
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


@lru_cache(maxsize=1024)
def _scan(path: Path, _version: tuple[int, int]) -> tuple[str, tuple[str, ...]]:
    text = read_source(path)
    includes = tuple(dict.fromkeys(quoted or angled for quoted, angled in _INCLUDE.findall(text)))
    return hashlib.sha256(text.encode()).hexdigest(), includes


def _version(path: Path) -> tuple[int, int]:
    """What changes when a file does. BuildError if it is not there."""
    try:
        status = path.stat()
    except OSError as error:
        raise BuildError(f"{path}: cannot read the source ({error.strerror})") from error
    return status.st_mtime_ns, status.st_size
