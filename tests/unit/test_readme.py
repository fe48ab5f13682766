"""What the README has from the code is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from backend.settings import TABLE_BEGIN, TABLE_END, settings_table
from tests.bench.conditions import RESULTS
from tests.bench.serving_tables import capacity_table, gpu_table, poisson_table
from tests.bench.tables import PAGE, PLACES, section, written

README = Path(__file__).parents[2] / "README.md"


def test_settings_table_is_the_one_printed() -> None:
    text = README.read_text()
    assert text.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip() == settings_table(), (
        "run `python -m backend.settings`"
    )


@pytest.mark.parametrize("place", PLACES, ids=lambda path: path.parent.name)
def test_measurements_are_those_of_the_results(place: Path) -> None:
    text = place.read_text()
    assert written(text, place) == text, "run `python -m tests.bench.tables`"


@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place, names in PLACES.items() for name in names],
    ids=lambda part: getattr(part, "stem", part),
)
def test_a_table_that_differs_from_its_results_is_found(place: Path, name: str) -> None:
    text = place.read_text()
    table = text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    assert table.strip()
    assert written(text.replace(table, "other"), place) == text
    with pytest.raises(ValueError, match=f"no marks for the table {name}"):
        written(text.replace(f"<!-- {name}: begin -->", ""), place)


def test_every_table_says_where_its_numbers_come_from() -> None:
    """Machine, date, commit and command; or that they are not there yet, as everything of a GPU."""
    for name in PLACES[PAGE]:
        text = section(name, PAGE)
        if name.partition(" ")[0] in ("gpu", "serving_engine", "serving_triton"):
            assert text.strip() == "**Not yet run on hardware.**"
        else:
            assert re.search(
                r"\d cores, load [\d.]+ before; \d{4}-\d\d-\d\d, commit [0-9a-f]{7}\S*; `python -m [^`]+` ", text
            )
    assert all('"scale": "toy"' in (RESULTS / f"serving_{way}_toy.json").read_text() for way in ("engine", "triton"))


def test_tables_of_a_gpu_hold_what_was_measured_and_what_was_not() -> None:
    latency = {f"{name}_p{percent}_ms": 10.0 for name in ("first_token", "inter_token") for percent in (50, 90, 99)}
    numbers = latency | {"tokens_per_s": 1234.5, "requests_per_s": 1.2345, "share": 0.625, "inter_token_share": 0.5}
    cell = {
        "way": "engine alone",
        "scenario": "1000/1000",
        "prompt_tokens": 1000,
        "output_tokens": 1000,
        "concurrent": 256,
    }
    arrivals = [{"load": 0.8, "skipped": "no time left"}, numbers | {"load": 0.5, "rate_per_s": 0.6, "in_flight": 99.0}]
    results: dict[str, Any] = {
        "cells": [
            cell | {"capacity": numbers, "poisson": arrivals},
            cell | {"way": "other", "skipped": "no time left"},
        ],
        "missing": {"vLLM": "ModuleNotFoundError: No module named 'vllm'"},
    }
    lines = capacity_table(results).splitlines()
    assert (
        lines[2] == "| 1000/1000 | 256 | engine alone | 1,234 | 1.23 | 62% | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 50% |"
    )
    assert lines[3].startswith("| 1000/1000 | 256 | other | no time left |")
    assert lines[-1] == "* vLLM: ModuleNotFoundError: No module named 'vllm'"
    lines = poisson_table(results).splitlines()
    assert lines[2].startswith("| 1000/1000 | engine alone | 50 | 0.60 | 99.0 | 10.0 |")
    assert lines[3].startswith("| 1000/1000 | engine alone | 80 | no time left |")
    assert {line.count("|") for line in lines} == {13}
    skipped = {"batch": 1, "context": 2048, "skipped": "no time left"}
    step = {"batch": 1, "context": 1024, "step_ms": 3.4, "floor_ms": 2.8, "share_of_floor": 0.82, "tokens_per_s": 294.0}
    kernel = {"op": "rope", "case": "x", "median_us": 2.0, "share_of_ceiling": 0.5, "peers_us": {"torch": 3.0}}
    text = gpu_table({"decode_steps": [step | {"host_ms_median": 0.1}, skipped], "kernels": [kernel]})
    assert "| 1 | 1,024 | 3.400 | 2.800 | 82% | 294 | 0.100 |\n| 1 | 2,048 | no time left |" in text
    assert "| rope | x | 2.00 | 50% | torch 1.50 |" in text


def test_python_examples_are_python() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        ast.parse(example)
