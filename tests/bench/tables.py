"""The tables in READMEs and on the page of all results: `python -m tests.bench.tables` writes them from results/."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.bench.conditions import PROJECT, RESULTS, read_results
from tests.bench.serving_tables import capacity_table, gpu_table, number, poisson_table
from tests.evaluation.report import report as evaluation_tables
from tests.marked import with_table

README = PROJECT / "README.md"
PAGE = RESULTS / "README.md"
Table = Callable[[dict[str, Any]], str]
_ENSEMBLE_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "responses_per_s": "responses/s",
    "tokens_per_response": "tokens/response",
    "first_token_p50_ms": "first token p50, ms",
    "first_token_p99_ms": "p99",
    "gap_p50_ms": "gap p50, ms",
    "gap_p99_ms": "p99",
}


def ensemble_table(results: dict[str, Any]) -> str:
    """Of bench_ensemble."""
    lines = ["| a response carries | streams | " + " | ".join(_ENSEMBLE_COLUMNS.values()) + " |"]
    lines += ["|---|" + "---:|" * (len(_ENSEMBLE_COLUMNS) + 1)]
    for cell in results["cells"]:
        kind = "one token" if cell["max_tokens_per_response"] else "what has come"
        numbers = " | ".join(number(cell[name]) for name in _ENSEMBLE_COLUMNS)
        lines.append(f"| {kind} | {cell['streams']} | {numbers} |")
    return "\n".join(lines)


def overlap_table(results: dict[str, Any]) -> str:
    """Of bench_overlap."""
    lines = [
        "| sequences | device, ms a step | what runs | device idle, % | steps that came late, % | "
        "late p99, ms | longest, ms | host per step, ms |",
        "|---:|---:|---|" + "---:|" * 5,
    ]
    for cell in results["cells"]:
        lines.append(
            f"| {cell['sequences']} | {cell['device_ms']:g} | {cell['runs']} | {cell['idle_percent']:.2f} | "
            f"{cell['gap_percent']:.2f} | {cell['gap_p99_ms']:.2f} | {cell['gap_max_ms']:.2f} | {cell['host_ms_per_step']:.2f} |"
        )
    return "\n".join(lines)


def runner_host_table(results: dict[str, Any]) -> str:
    """Of bench_runner_host."""
    lines = ["| sequences | host per step p50, ms | p99 |", "|---:|---:|---:|"]
    for cell in results["cells"]:
        lines.append(f"| {cell['sequences']} | {cell['p50_ms']:.3f} | {cell['p99_ms']:.3f} |")
    return "\n".join(lines)


def scheduler_table(results: dict[str, Any]) -> str:
    """Of bench_scheduler."""
    lines = ["| sequences | stop strings | plan, us | commit, us | message, us | in all, us |", "|" + "---:|" * 6]
    for cell in results["cells"]:
        parts = " | ".join(f"{cell[f'{name}_us']:,.0f}" for name in ("plan", "commit", "message", "total"))
        lines.append(f"| {cell['sequences']} | {cell['stop_strings']} | {parts} |")
    return "\n".join(lines)


def first_token_table(results: dict[str, Any]) -> str:
    """Of bench_first_token."""
    lines = ["| way | first token p50, ms | p90 | p99 |", "|---|---:|---:|---:|"]
    for cell in results["cells"]:
        lines.append(f"| {cell['way']} | {cell['p50_ms']:.2f} | {cell['p90_ms']:.2f} | {cell['p99_ms']:.2f} |")
    return "\n".join(lines)


def soak_table(results: dict[str, Any]) -> str:
    """Of the soak."""
    lines = ["| KV pool | requests | whole | taken back | deadline | bad | tokens | preemptions | problems | seconds |"]
    lines += ["|---|" + "---:|" * 9]
    for cell in results["cells"]:
        fates = cell["fates"]
        parts = [
            cell["num_calls"],
            fates.get("whole", 0),
            fates.get("cancelled", 0) + fates.get("cancelled at once", 0),
            fates.get("deadline", 0) + fates.get("deadline, no token", 0),
            fates.get("bad", 0),
            cell["num_tokens"],
            cell["num_preemptions"],
            cell["num_problems"],
            round(cell["wall_s"]),
        ]
        lines.append(f"| {cell['server']} | " + " | ".join(f"{part:,}" for part in parts) + " |")
    return "\n".join(lines)


def quality_table(results: dict[str, Any]) -> str:
    """Of bench_quality."""
    lines = [
        "| held in | error of logits, % | KL, nats | same best id, % | right answers |",
        "|---|---:|---:|---:|---:|",
    ]
    for cell in results["cells"]:
        lines.append(
            f"| {cell['held']} | {cell['logits_error_percent']:.2f} | {cell['mean_kl_nats']:.5f} | "
            f"{cell['same_best_id_percent']:.2f} | {cell['num_right']} of {cell['num_questions']} |"
        )
    return "\n".join(lines)


def tekken_table(results: dict[str, Any]) -> str:
    """Of bench_tekken: a line a kind of text, its corpora together, and the range among them."""
    lines = [
        "| text | corpora | kB | SentencePiece tokens to one of Tekken: claimed | measured | by corpus | fewer tokens, % |",
        "|---|---|" + "---:|" * 5,
    ]
    for kind, group in groupby(results["cells"], key=lambda cell: str(cell["kind"])):
        cells = list(group)
        num_tekken, num_before = (sum(cell[name] for cell in cells) for name in ("num_tekken", "num_sentence_piece"))
        ratios = [cell["num_sentence_piece"] / cell["num_tekken"] for cell in cells]
        lines.append(
            f"| {kind} | {', '.join(cell['source'] for cell in cells)} | {sum(cell['num_bytes'] for cell in cells) / 1e3:,.0f} | "
            f"{cells[0]['claim']:.1f} | {num_before / num_tekken:.2f} | {min(ratios):.2f} .. {max(ratios):.2f} | "
            f"{100 * (1 - num_tekken / num_before):.0f} |"
        )
    return "\n".join(lines)


def tokenizers_table(results: dict[str, Any]) -> str:
    """Of bench_tokenizers: the slowest and the fastest kind of text, and all kinds together."""
    lines = [
        "| MB/s of UTF-8 | encode, one by one | slowest .. fastest text | encode, batched | decode | documents with other ids |",
        "|---|" + "---:|" * 5,
    ]
    ways = dict.fromkeys(cell["way"] for cell in results["cells"])
    for way in ways:
        cells = [cell for cell in results["cells"] if cell["way"] == way]
        num_bytes = sum(cell["num_bytes"] for cell in cells)
        single, batched, decode = (
            num_bytes / sum(cell["num_bytes"] / cell[f"{name}_mb_per_s"] for cell in cells)
            for name in ("single", "batched", "decode")
        )
        rates = [cell["single_mb_per_s"] for cell in cells]
        different = sum(cell["num_different"] for cell in cells)
        lines.append(
            f"| {way} | {single:.1f} | {min(rates):.1f} .. {max(rates):.1f} | {batched:.1f} | {decode:.1f} | {different} |"
        )
    return "\n".join(lines)


def gateway_table(results: dict[str, Any]) -> str:
    """Of bench_gateway, whose requests went both ways in turns."""
    first = {way: statistics.median(values) for way, values in results["first_token_ms"].items()}
    ways = (results["first_token_ms"][way] for way in ("grpc", "gateway"))
    added = statistics.median(gateway - grpc for grpc, gateway in zip(*ways, strict=True))
    lines = ["| | raw gRPC | gateway | |", "|---|---:|---:|---:|"]
    lines.append(f"| first token, p50, ms | {first['grpc']:.1f} | {first['gateway']:.1f} | {added:+.1f} |")
    for cell in results["cells"]:
        grpc, gateway = (statistics.median(cell[f"{way}_tokens_per_s"]) for way in ("grpc", "gateway"))
        name = f"tokens/s, {cell['streams']} streams" if cell["streams"] > 1 else "tokens/s, 1 stream"
        lines.append(f"| {name} | {grpc:,.0f} | {gateway:,.0f} | {gateway / grpc:.0%} |")
    return "\n".join(lines)


def peers_table(results: dict[str, Any]) -> str:
    """Of bench_peers: for each engine and number of streams every way, its speed also as a multiple of the first's."""
    lines = [
        "| engine | streams | way | tokens/s | of the first | first token p50, ms | p99 | memory, MB |",
        "|---|---:|---|" + "---:|" * 5,
    ]
    firsts: dict[tuple[str, int], float] = {}
    cells = sorted(
        results["cells"], key=lambda cell: (cell["engine"] != results["cells"][0]["engine"], cell["streams"])
    )
    for cell in cells:
        first = firsts.setdefault((cell["engine"], cell["streams"]), cell["tokens_per_s"]) or math.inf
        times = " | ".join(number(cell[f"first_token_{name}_ms"]) for name in ("p50", "p99"))
        lines.append(
            f"| {cell['engine']} | {cell['streams']} | {cell['way']} | {number(cell['tokens_per_s'])} | "
            f"{cell['tokens_per_s'] / first:.2f} | {times} | {cell['memory_mb']:,.0f} |"
        )
    return "\n".join(lines)


def long_context_table(results: dict[str, Any]) -> str:
    """Of bench_long_context: percent by length, a column for each kernel, context and KV dtype, and for the demo's logits."""
    errors: dict[str, dict[int, float]] = {}
    for cell in results["cells"]:
        column = f"{cell['kernel'].partition('_')[0]}, {cell['context']}, {cell['kv_dtype'].upper()}"
        errors.setdefault(column, {})[cell["length"]] = cell["error"]
    for cell in results["demo"]:
        errors.setdefault(f"demo's logits, {cell['kv_dtype'].upper()}", {})[cell["length"]] = cell["error"]
    lines = ["| tokens | " + " | ".join(errors) + " |", "|---:|" + "---:|" * len(errors)]
    for length in sorted({length for column in errors.values() for length in column}):
        parts = [f"{100 * column[length]:.2f}" if length in column else "" for column in errors.values()]
        lines.append(f"| {length:,} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


TABLES: dict[str, Table] = {
    "ensemble": ensemble_table,
    "evaluation": evaluation_tables,
    "first_token": first_token_table,
    "overlap": overlap_table,
    "peers": peers_table,
    "quality": quality_table,
    "runner_host": runner_host_table,
    "scheduler": scheduler_table,
    "soak": soak_table,
    "tekken": tekken_table,
    "tokenizers": tokenizers_table,
}
_SERVING: dict[str, Table] = {
    f"serving_{way}{scale} {what}": table
    for scale in ("", "_toy")
    for way in ("engine", "triton")
    for what, table in (("capacity", capacity_table), ("poisson", poisson_table))
}
_EVALUATION = PROJECT / "tests" / "evaluation" / "README.md"
PLACES: dict[Path, dict[str, Table]] = {
    README: {name: TABLES[name] for name in ("ensemble", "first_token", "quality", "peers")},
    _EVALUATION: {"evaluation": evaluation_tables},
    PAGE: {"gpu": gpu_table, **_SERVING, "gateway": gateway_table, "long_context": long_context_table} | TABLES,
}
"""The tables that stand in each file. The first word of a table's name is that of its results; more tables may be of the same."""


def section(name: str, place: Path) -> str:
    """What stands between the marks of a table: the table, and where its numbers come from; or that there are none."""
    source = name.partition(" ")[0]
    file = RESULTS / f"{source}.json"
    if not file.exists():
        return "**Not yet run on hardware.**"
    results = read_results(source)
    return f"{PLACES[place][name](results)}\n\n{_about(results)} ([all of it]({os.path.relpath(file, place.parent)}))"


def _about(results: dict[str, Any]) -> str:
    """Machine, date, commit and command; bench-gpu has its machine in parts."""
    machine = results["machine"]
    if isinstance(machine, dict):
        return f"{machine['gpu']}; {machine['date']}, commit {machine['commit']}; `{results['command']}`"
    gpu = f"{results['gpu']}, " if "gpu" in results else ""
    where = f"{gpu}{machine}, load {results['load_average_before']} before"
    return f"{where}; {results['date']}, commit {results['commit']}; `{results['command']}`"


def written(text: str, path: Path = README) -> str:
    """`text` of the file `path` with every table of it as the results have it; ValueError when one has no marks."""
    for name in PLACES[path]:
        text = with_table(text, name, section(name, path))
    return text


def draw_plots() -> None:
    """The plots of the page, by the Python of .venv-peers, which has matplotlib; without it they stay as they are."""
    python = PROJECT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        print("no .venv-peers: the plots stay as they are (`make .venv-peers/.ready`)", file=sys.stderr)
        return
    script = Path(__file__).with_name("plots.py")
    subprocess.run([str(python), str(script), str(RESULTS)], check=True)


if __name__ == "__main__":
    for place in PLACES:
        place.write_text(written(place.read_text(), place))
    draw_plots()
