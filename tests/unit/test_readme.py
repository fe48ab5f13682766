"""What the README has from the code is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from backend.settings import TABLE_BEGIN, TABLE_END, settings_table

README = Path(__file__).parents[2] / "README.md"


def test_settings_table_is_the_one_printed() -> None:
    text = README.read_text()
    assert text.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip() == settings_table(), (
        "run `python -m backend.settings`"
    )


def test_python_examples_are_python() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        ast.parse(example)
