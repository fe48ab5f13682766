"""The project's files as git sees them, and what a broken house rule looks like."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, order=True)
class Violation:
    """One broken rule: where, what, and how to mend it."""

    path: str
    line: int
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class Tree:
    """Files under `root`, as sorted paths relative to it with forward slashes."""

    root: Path
    files: tuple[str, ...]

    def text(self, path: str) -> str:
        return (self.root / path).read_text(encoding="utf-8")

    def python_files(self) -> list[str]:
        return [path for path in self.files if path.endswith(".py")]

    def folders(self) -> set[str]:
        """Every folder that holds a file somewhere below it; the root is ".", a folder has no slash at its end."""
        return {str(parent) for path in self.files for parent in PurePosixPath(path).parents}


def project_tree(root: Path) -> Tree:
    """Tracked files and new ones that are not ignored, so that a clean checkout and a working tree agree."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "-z"],
        cwd=root,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout.decode()
    # A file that was deleted but not yet staged is still listed.
    return Tree(root, tuple(sorted(path for path in listed.split("\0") if path and (root / path).is_file())))


def planted_tree(root: Path, contents: Mapping[str, str]) -> Tree:
    """Writes `contents` (path -> text) below `root`, for tests that a rule finds what it should."""
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return Tree(root, tuple(sorted(contents)))
