"""`python -m tests.conformance`: runs every test that `features.toml` names, records what came, and writes the README's table.

The record is then of one commit and one date. With `--missing` only those run that are not recorded as passed, and the others
stay as they were recorded; with `--table` none, the table alone is written.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable

import pytest

from tests.conformance.features import TESTS, problems, read_features
from tests.conformance.record import RECORD, Outcome, outcome_of, read_record, write_record
from tests.conformance.table import README, answer, written


class Watcher:
    """Remembers the outcome of every case of every test."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[str, list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.partition("[")[0].removeprefix("tests/")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[test].append(report.outcome)


def run(tests: Iterable[str]) -> dict[str, Outcome]:
    """The outcome of each of these tests."""
    watcher = Watcher()
    names = [str(TESTS / test) for test in sorted(tests)]  # so that the tests of a folder share their server
    date, commit = datetime.datetime.now(datetime.UTC).date().isoformat(), _commit()
    os.environ.setdefault("DEPLOY_CHECKS", "all")  # with those that `make test` leaves out for their length
    pytest.main(["--quiet", f"--rootdir={TESTS.parent}", *names], plugins=[watcher])
    return {
        test: Outcome(outcome_of(outcomes), len(outcomes), date, commit) for test, outcomes in watcher.outcomes.items()
    }


def _commit() -> str:
    """What is checked out, marked when the sources differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=TESTS, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Exit status 1 when a row that should be kept is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("--missing", action="store_true", help="run only tests that are not recorded as passed")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    features = read_features()
    if found := problems(features):
        print("\n".join(found), file=sys.stderr)
        return 1
    tests = list(dict.fromkeys(test for feature in features for test in feature.tests))
    kept = read_record() if (arguments.missing or arguments.table) and RECORD.exists() else {}
    record = {test: outcome for test, outcome in kept.items() if test in tests}
    if arguments.missing:
        tests = [test for test in tests if test not in record or record[test].outcome != "passed"]
    if not arguments.table and tests:
        record |= {test: outcome for test, outcome in run(tests).items() if test in tests}
        write_record(record)
    README.write_text(written(README.read_text(), features, record))
    broken = [each for each in features if not each.reason and answer(each, record) != "yes"]
    for each in broken:
        print(f"{each.section} / {each.name}: {answer(each, record)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
