"""The table of the README: every feature, whether it is kept, and by which test that was seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.conformance.features import Feature
from tests.conformance.record import Outcome
from tests.marked import with_table

README = Path(__file__).with_name("README.md")


def answer(feature: Feature, record: Mapping[str, Outcome]) -> str:
    """`yes` only when every test of the row is recorded as passed; else `no`, and why."""
    if feature.reason:
        return f"no: {feature.reason}"
    bad = [test for test in feature.tests if test not in record or record[test].outcome != "passed"]
    if not bad:
        return "yes"
    return "no: " + ", ".join(f"{test.partition('::')[2]} {_outcome(test, record)}" for test in bad)


def table(features: list[Feature], record: Mapping[str, Outcome]) -> str:
    """A table a section, and below them what was run, when and from which commit."""
    answers = [answer(feature, record) for feature in features]
    lines = [f"{answers.count('yes')} of {len(features)} rows: yes."]
    section = ""
    for feature, said in zip(features, answers, strict=True):
        if feature.section != section:
            section = feature.section
            lines += ["", f"### {section}", "", "| feature | kept | tests |", "|---|---|---|"]
        lines.append(f"| {feature.name} | {said} | {', '.join(map(_link, feature.tests))} |")
    tests = {test for feature in features for test in feature.tests}
    lines += ["", *_runs([record[test] for test in tests if test in record])]
    return "\n".join(lines)


def _runs(outcomes: Iterable[Outcome]) -> list[str]:
    """A line a run: `make conformance` leaves one, later runs of single tests more."""
    runs: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for outcome in outcomes:
        runs[outcome.date, outcome.commit].append(outcome.num_cases)
    return [
        f"- Recorded on {date} at commit {commit}: {len(cases)} tests, {sum(cases)} cases."
        for (date, commit), cases in sorted(runs.items())
    ]


def written(text: str, features: list[Feature], record: Mapping[str, Outcome]) -> str:
    """The README's text with the table between its marks; ValueError without them."""
    return with_table(text, "conformance", table(features, record))


def _outcome(test: str, record: Mapping[str, Outcome]) -> str:
    return record[test].outcome if test in record else "was not run"


def _link(test: str) -> str:
    path, _, function = test.partition("::")
    return f"[{function}](../{path})"
