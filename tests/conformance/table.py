"""The table of the README: every feature, whether it is kept, and by which test that was seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.conformance.features import Feature
from tests.conformance.record import Outcome

README = Path(__file__).with_name("README.md")
BEGIN = "<!-- conformance: begin (written by python -m tests.conformance) -->"
END = "<!-- conformance: end -->"


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
    ran = [record[test] for test in {test for feature in features for test in feature.tests} if test in record]
    commits = sorted({outcome.commit for outcome in ran})
    dates = sorted(outcome.date for outcome in ran)
    num_cases = sum(outcome.num_cases for outcome in ran)
    dated = f"{dates[0]} to {dates[-1]}" if dates and dates[0] != dates[-1] else "".join(dates[:1])
    lines += ["", f"{len(ran)} tests, {num_cases} cases; run on {dated}; commit {', '.join(commits)}."]
    return "\n".join(lines)


def written(text: str, features: list[Feature], record: Mapping[str, Outcome]) -> str:
    """The README's text with the table between its marks; ValueError without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("no marks for the table of conformance")
    return f"{before}{begin}\n\n{table(features, record)}\n\n{end}{after}"


def _outcome(test: str, record: Mapping[str, Outcome]) -> str:
    return record[test].outcome if test in record else "was not run"


def _link(test: str) -> str:
    path, _, function = test.partition("::")
    return f"[{function}](../{path})"
