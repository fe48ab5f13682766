"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tests.house.imports import module_name
from tests.house.tree import project_tree

TREE = project_tree(Path(__file__).resolve().parents[2])
WITH_EXAMPLES = [
    module_name(path)
    for path in TREE.python_files()
    if path.startswith(("backend/", "client/", "kernels/", "tests/"))
    and path != "tests/unit/test_doctests.py"
    and ">>> " in TREE.text(path)
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
