"""One README per folder, one line in it per file; and no Python file too long to read."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from tests.house.tree import Tree, Violation

MAX_PYTHON_LINES = 450

_SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".sh")
# Triton prescribes what lies below here, so one README at its top maps it all.
_MAPPED_FROM_ABOVE = ("model_repository/",)
# A list item or a table row that starts with a file: "- `plan.py` ..." or "| [`plan.py`](plan.py) | ...".
_ENTRY = re.compile(r"^\s*[-*|]\s*\[?`([\w./-]+\.\w+)`")


def missing_lines(tree: Tree) -> list[Violation]:
    """Files that no README names, folders with sources but without README, README lines about files that are gone.

    A folder without sources (data, CI) may be named as a whole, as `folder/`, by the next README above it. Files whose
    name starts with a dot, and `__init__.py`, need no line.
    """
    violations = []
    for folder in sorted(tree.folders()):
        readme = _join(folder, "README.md")
        has_source = any(
            path.endswith(_SOURCE_SUFFIXES) and not path.endswith("__init__.py") for path in _in(tree, folder)
        )
        if has_source and readme not in tree.files and not f"{folder}/".startswith(_MAPPED_FROM_ABOVE):
            violations.append(Violation(folder, 1, "folder without README.md", "write one, with a line for each file"))
    for path in tree.files:
        if path.startswith(".") or PurePosixPath(path).name.startswith((".", "__init__.", "README.md")):
            continue
        nearest = _nearest_readme(tree, path)
        # A folder that lacks the README it must have is reported above, once.
        if any(violation.path == str(PurePosixPath(path).parent) for violation in violations):
            continue
        if nearest is None:
            violations.append(Violation(path, 1, "no README.md beside it or above it", "write one that names it"))
        elif not _names(tree.text(nearest), str(PurePosixPath(path).relative_to(PurePosixPath(nearest).parent))):
            violations.append(Violation(nearest, 1, f"no line names {path}", "add one that says what the file holds"))
    return violations + _stale_lines(tree)


def long_files(tree: Tree) -> list[Violation]:
    """Python files of more than `MAX_PYTHON_LINES` lines."""
    violations = []
    for path in tree.python_files():
        num_lines = len(tree.text(path).splitlines())
        if num_lines > MAX_PYTHON_LINES:
            problem = f"{num_lines} lines, more than {MAX_PYTHON_LINES}"
            violations.append(Violation(path, MAX_PYTHON_LINES + 1, problem, "give each noun a file of its own"))
    return violations


def _stale_lines(tree: Tree) -> list[Violation]:
    violations = []
    for readme in tree.files:
        if not readme.endswith("README.md"):
            continue
        for number, line in enumerate(tree.text(readme).splitlines(), start=1):
            entry = _ENTRY.match(line)
            if entry and entry[1].endswith(_SOURCE_SUFFIXES) and not _exists(tree, readme, entry[1]):
                violations.append(
                    Violation(readme, number, f"names {entry[1]}, which is not there", "take the line out")
                )
    return violations


def _exists(tree: Tree, readme: str, name: str) -> bool:
    """Paths in a README count from its folder; longer ones may count from the root."""
    return _join(str(PurePosixPath(readme).parent), name) in tree.files or ("/" in name and name in tree.files)


def _nearest_readme(tree: Tree, path: str) -> str | None:
    readmes = (_join(str(folder), "README.md") for folder in PurePosixPath(path).parents)
    return next((readme for readme in readmes if readme in tree.files), None)


def _names(text: str, relative: str) -> bool:
    """Whether the README has the file's path, or one of the folders on the way to it, as `folder/`."""
    wanted = [relative, *(f"{folder}/" for folder in PurePosixPath(relative).parents if str(folder) != ".")]
    return any(re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w/-]|\.\w)", text) for name in wanted)


def _in(tree: Tree, folder: str) -> list[str]:
    return [path for path in tree.files if str(PurePosixPath(path).parent) == folder]


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"
