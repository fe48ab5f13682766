"""Tables of an evaluation: measured beside published, and what changes from one precision to the next."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tests.evaluation.published import TASKS


def report(results: dict[str, Any]) -> str:
    """All tables that `results` has something for, in Markdown."""
    tables = [scores_table(results), needle_table(results), behind_text_table(results), log_probs_table(results)]
    return "\n\n".join(table for table in tables if table)


def scores_table(results: dict[str, Any]) -> str:
    """A line a task: published, measured in each precision, and how the samples differ from the first precision."""
    names = [name for name in TASKS if any(name in run["scores"] for run in results["runs"])]
    if not names:
        return ""
    precisions = [run["precision"] for run in results["runs"]]
    lines = ["| task (shots, metric) | samples | published | " + " | ".join(precisions) + " | other answers |"]
    lines += ["|---|---:|---:|" + "---:|" * len(precisions) + "---|"]
    for name in names:
        task, scores = TASKS[name], [run["scores"][name] for run in results["runs"]]
        published = "none" if task.published is None else f"{task.published:.1f}"
        values = " | ".join(_value(name, score) for score in scores)
        changes = ", ".join(str(score["num_changed"]) for score in scores[1:]) or "-"
        metric = task.metric.partition(",")[0]
        lines.append(
            f"| {name} ({task.num_fewshot}, {metric}) | {scores[0]['num_samples']} | {published} | {values} | {changes} |"
        )
    return "\n".join(lines)


def needle_table(results: dict[str, Any]) -> str:
    """Needles found and what the needle adds to the answer's log-probability, by length and precision."""
    return _by_length(
        results,
        "needle",
        "tokens",
        "needle in N tokens: found, gain in nats a token",
        lambda cells: (
            f"{sum(c['is_found'] for c in cells)} of {len(cells)}, {fmean(c['gain_nats'] for c in cells):+.2f}"
        ),
    )


def behind_text_table(results: dict[str, Any]) -> str:
    """Own questions answered exactly behind N tokens of other text."""
    return _by_length(
        results,
        "behind_text",
        "tokens_before",
        "own questions behind N tokens of other text",
        lambda cells: f"{cells[0]['num_right']} of {cells[0]['num_questions']}",
    )


def log_probs_table(results: dict[str, Any]) -> str:
    """Mean log-probability by position, and the mean distance from the FP32 reference where there is one."""

    def shown(cells: Sequence[dict[str, Any]]) -> str:
        (cell,) = cells
        distance = f", off by {cell['mean_distance_nats']:.4f}" if "mean_distance_nats" in cell else ""
        return f"{cell['mean_nats']:.3f}{distance}"

    return _by_length(results, "log_probs", "end", "positions up to N: mean log-probability in nats", shown)


def _by_length(results: dict[str, Any], kind: str, key: str, title: str, shown: Any) -> str:
    runs = [run for run in results["runs"] if run.get(kind)]
    if not runs:
        return ""
    lines = [f"| {title} | " + " | ".join(run["precision"] for run in runs) + " |", "|---:|" + "---:|" * len(runs)]
    for length in dict.fromkeys(cell[key] for cell in runs[0][kind]):
        cells = [[cell for cell in run[kind] if cell[key] == length] for run in runs]
        lines.append(f"| {length:,} | " + " | ".join(map(shown, cells)) + " |")
    return "\n".join(lines)


def _value(name: str, score: dict[str, Any]) -> str:
    if name == "demo_text":
        return f"{score['value']:.4f}"
    error = score["standard_error"]
    return f"{100 * score['value']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
