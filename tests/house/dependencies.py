"""What pyproject.toml pins, what the lock files hold, and what the code imports: all three must agree."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from tests.house.imports import read_imports
from tests.house.tree import Tree, Violation

# Which extra's packages each folder may import; the longest that a file is in counts.
_EXTRA_OF = {
    "backend": "server",
    "model_repository": "server",
    "kernels": "kernels",
    "client": "client",
    "client/gateway": "gateway",
    "tests": "tests",
}
# Given by Triton's stub, not by a package.
_GIVEN = ("triton_python_backend_utils",)
# Scripts that run in an environment of their own, which the Makefile or the script that starts them makes with pinned packages.
_ELSEWHERE = {
    "tests/evaluation/run_lm_eval.py": ("lm_eval",),
    "tests/bench/count_sentencepiece.py": ("sentencepiece",),
    "tests/bench/peers/llama_server.py": ("xllamacpp",),
    "tests/bench/peers/plot.py": ("matplotlib",),
    "tests/bench/plots.py": ("matplotlib",),
}
# Installed before everything else, since its build differs by machine.
_UNLOCKED = "torch"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)")


def undeclared_imports(tree: Tree) -> list[Violation]:
    """Imports of packages that the extra of their folder does not list (pulled in by another package is not enough)."""
    pins = _pins(tree)
    distributions = packages_distributions()
    violations = []
    for path, imports in read_imports(tree).items():
        folders = [folder for folder in _EXTRA_OF if path.startswith(f"{folder}/")]
        extra = _EXTRA_OF[max(folders, key=len)] if folders else "tests"
        for found in imports:
            top = found.module.split(".")[0]
            if top in sys.stdlib_module_names or top in _EXTRA_OF or top in (*_GIVEN, *_ELSEWHERE.get(path, ())):
                continue
            names = {_normal(name) for name in distributions.get(top, [top])}
            if not names & pins[extra].keys():
                remedy = f"pin it in pyproject.toml's extra {extra} and run make lock"
                violations.append(
                    Violation(path, found.line, f"imports {top}, which no pin of {extra} provides", remedy)
                )
    return violations


def stale_locks(tree: Tree) -> list[Violation]:
    """Pins that a lock file lacks or has otherwise, entries without hash, and lines that name an index or a folder."""
    violations = []
    for extra, pins in _pins(tree).items():
        path = f"requirements/{extra}.txt"
        entries = {}
        lines = tree.text(path).splitlines() if path in tree.files else []
        for number, line in enumerate(lines, start=1):
            if match := _PIN.match(line):
                entries[_normal(match[1])] = match[2]
                if number == len(lines) or "--hash=" not in lines[number]:
                    violations.append(Violation(path, number, f"{match[1]} without hash", "run make lock"))
            elif line and not line.startswith(("#", "    --hash=sha256:")):
                violations.append(Violation(path, number, f"unexpected: {line[:60]}", "run make lock"))
        for name, version in pins.items():
            if name != _UNLOCKED and entries.get(name) != version:
                problem = f"{name}=={version} is pinned, the lock has {entries.get(name)}"
                violations.append(Violation(path, 1, problem, "run make lock"))
        if _UNLOCKED in entries:
            violations.append(
                Violation(path, 1, f"{_UNLOCKED} is locked", "its build differs by machine: run make lock")
            )
    default = re.search(r"^TORCH \?= (\S+)$", tree.text("Makefile"), re.MULTILINE)
    if not default or default[1] != f"{_UNLOCKED}=={_pins(tree)['server'][_UNLOCKED]}":
        violations.append(Violation("Makefile", 1, "TORCH is not pyproject.toml's pin", "make the two equal"))
    return violations


def _pins(tree: Tree) -> dict[str, dict[str, str]]:
    """Package -> version for each extra, extras that it includes among them."""
    project = tomllib.loads(tree.text("pyproject.toml"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def collect(extra: str) -> dict[str, str]:
        pins: dict[str, str] = {}
        for requirement in extras[extra]:
            if inner := re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", requirement):
                for name in inner[1].split(","):
                    pins |= collect(name)
            elif match := _PIN.match(requirement):
                pins[_normal(match[1])] = match[2]
            else:
                raise ValueError(f"pyproject.toml, extra {extra}: {requirement!r} is not an exact pin")
        return pins

    return {extra: collect(extra) for extra in extras}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
