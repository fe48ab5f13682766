"""What the README has from the code is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from backend.settings import TABLE_BEGIN, TABLE_END, settings_table
from tests.bench.tables import PLACES, TABLES, written

README = Path(__file__).parents[2] / "README.md"


def test_settings_table_is_the_one_printed() -> None:
    text = README.read_text()
    assert text.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip() == settings_table(), (
        "run `python -m backend.settings`"
    )


@pytest.mark.parametrize("place", sorted(set(PLACES.values())), ids=lambda path: path.parent.name)
def test_measurements_are_those_of_the_results(place: Path) -> None:
    text = place.read_text()
    assert written(text, place) == text, "run `python -m tests.bench.tables`"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_differs_from_its_results_is_found(name: str) -> None:
    text = PLACES[name].read_text()
    table = text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    assert written(text.replace(table, table.replace("1", "7")), PLACES[name]) == text
    with pytest.raises(ValueError, match=f"no marks for the table {name}"):
        written(text.replace(f"<!-- {name}: begin -->", ""), PLACES[name])


def test_python_examples_are_python() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        ast.parse(example)
