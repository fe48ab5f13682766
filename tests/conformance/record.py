"""What the last run of each test said: `record.json`, a line a test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = Path(__file__).with_name("record.json")


@dataclass(frozen=True)
class Outcome:
    """A test as it last ran, all of its cases together: `passed` only when each of them passed."""

    outcome: str
    num_cases: int
    date: str
    commit: str


def outcome_of(outcomes: Iterable[str]) -> str:
    """One word for all cases of a test: the worst of them."""
    found = set(outcomes)
    return next((each for each in ("failed", "skipped", "passed") if each in found), "not run")


def read_record(path: Path = RECORD) -> dict[str, Outcome]:
    """Outcome by test."""
    return {test: Outcome(**values) for test, values in json.loads(path.read_text()).items()}


def write_record(record: Mapping[str, Outcome], path: Path = RECORD) -> None:
    """A line a test, so that two runs can be compared and merged by git."""
    lines = [f"{json.dumps(test)}: {json.dumps(asdict(record[test]))}" for test in sorted(record)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
