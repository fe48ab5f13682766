"""What this server promises, row by row, and the tests that prove each: `features.toml`, read without running anything."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FEATURES = Path(__file__).with_name("features.toml")


@dataclass(frozen=True)
class Feature:
    """One promise: the tests that prove it (`folder/file.py::test` below tests/), or why it is not kept."""

    section: str
    name: str
    tests: tuple[str, ...]
    reason: str = ""


def read_features(path: Path = FEATURES) -> list[Feature]:
    """The rows in the order of the file.

    A section is a table of TOML; a row's value is a list of tests, or `{ no = "reason", tests = [...] }` for what is not kept:
    its tests then hold what happens instead.
    """
    features = []
    for section, rows in tomllib.loads(path.read_text()).items():
        for name, value in rows.items():
            row = value if isinstance(value, dict) else {"tests": value}
            features.append(Feature(section, name, tuple(row["tests"]), row.get("no", "")))
    return features


def problems(features: list[Feature]) -> list[str]:
    """Rows without a test, tests that do not exist, names that stand twice."""
    found = []
    seen: set[tuple[str, str]] = set()
    for feature in features:
        row = f"{feature.section} / {feature.name}"
        if (feature.section, feature.name) in seen:
            found.append(f"{row}: stands twice")
        seen.add((feature.section, feature.name))
        if not feature.tests and not feature.reason:
            found.append(f"{row}: names no test")
        for test in feature.tests:
            path, _, function = test.partition("::")
            if function not in test_functions(path):
                found.append(f"{row}: there is no {test}")
    return found


@cache
def test_functions(path: str) -> frozenset[str]:
    """Names of the test functions of a file below tests/; none when there is no such file."""
    file = TESTS / path
    if not file.is_file():
        return frozenset()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(
        node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds) and node.name[:5] == "test_"
    )
