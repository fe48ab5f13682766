"""The tables of `make bench-serving` and `make bench-gpu` on the results page."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]


def capacity_table(results: Results) -> str:
    """Of each scenario every way: tokens a second in steady state, time to first token, time between tokens."""
    lines = [
        "| prompt / output tokens | at a time | way | tokens/s | requests/s | of the roofline | first token p50, ms | p90 | p99 "
        "| then a token p50, ms | p99 | of its floor |",
        "|---|---:|---|" + "---:|" * 9,
    ]
    for name in dict.fromkeys(cell["scenario"] for cell in results["cells"]):
        for cell in (cell for cell in results["cells"] if cell["scenario"] == name):
            head = f"| {lengths(cell)} | {cell['concurrent']} | {cell['way']} |"
            if "skipped" in cell:
                lines.append(f"{head} {cell['skipped']} |" + " |" * 8)
                continue
            numbers = cell["capacity"]
            values = [numbers["tokens_per_s"], numbers["requests_per_s"]]
            times = [numbers.get(f"first_token_p{percent}_ms") for percent in (50, 90, 99)]
            between = [numbers.get(f"inter_token_p{percent}_ms") for percent in (50, 99)]
            parts = [number(values[0]), f"{values[1]:.2f}", share(numbers, "share"), *map(number, times)]
            lines.append(f"{head} {' | '.join([*parts, *map(number, between), share(numbers, 'inter_token_share')])} |")
    return "\n".join(lines) + _missing(results)


def poisson_table(results: Results) -> str:
    """Latency of each way for which requests arrived by themselves."""
    lines = [
        "| prompt / output tokens | way | load, % of capacity | arrivals/s | in flight, mean | first token p50, ms | p90 | p99 "
        "| then a token p50, ms | p90 | p99 | of its floor |",
        "|---|---|" + "---:|" * 10,
    ]
    for cell in results["cells"]:
        for numbers in sorted(cell.get("poisson", ()), key=lambda numbers: float(numbers["load"])):
            head = f"| {lengths(cell)} | {cell['way']} | {100 * numbers['load']:.0f} |"
            if "skipped" in numbers:
                lines.append(f"{head} {numbers['skipped']} |" + " |" * 8)
                continue
            parts = [f"{numbers['rate_per_s']:.2f}", f"{numbers['in_flight']:.1f}"]
            for name in ("first_token", "inter_token"):
                parts += [number(numbers[f"{name}_p{percent}_ms"]) for percent in (50, 90, 99)]
            lines.append(f"{head} {' | '.join(parts)} | {share(numbers, 'inter_token_share')} |")
    return "\n".join(lines)


def gpu_table(results: Results) -> str:
    """Of bench-gpu: decode steps, prompts, kernels."""
    lines = [
        "| decode step: batch | context | ms | floor, ms | of the floor | tokens/s | host, ms |",
        "|" + "---:|" * 7,
    ]
    for cell in results.get("decode_steps", ()):
        head = f"| {cell['batch']} | {cell['context']:,} |"
        if "skipped" in cell:
            lines.append(f"{head} {cell['skipped']} |" + " |" * 4)
            continue
        values = f"{cell['step_ms']:.3f} | {cell['floor_ms']:.3f} | {cell['share_of_floor']:.0%}"
        lines.append(f"{head} {values} | {cell['tokens_per_s']:,.0f} | {cell['host_ms_median']:.3f} |")
    lines += ["", "| prompt, tokens | in chunks of | first token, ms | floor, ms | of the floor |", "|" + "---:|" * 5]
    for cell in results.get("prompts", ()):
        head = f"| {cell['length']:,} | {cell['chunk']:,} |"
        if "skipped" in cell:
            lines.append(f"{head} {cell['skipped']} |" + " |" * 2)
            continue
        lines.append(f"{head} {cell['first_token_ms']:.2f} | {cell['floor_ms']:.2f} | {cell['share_of_floor']:.0%} |")
    lines += [
        "",
        "| kernel | case | us | of the ceiling | ours is so many times as fast as |",
        "|---|---|---:|---:|---|",
    ]
    for entry in results.get("kernels", ()):
        if "skipped" in entry:
            lines.append(f"| {entry['op']} | {entry['case']} | {entry['skipped']} | | |")
            continue
        peers = ", ".join(f"{name} {us / entry['median_us']:.2f}" for name, us in entry["peers_us"].items())
        values = f"{entry['median_us']:.2f} | {entry['share_of_ceiling']:.0%}"
        lines.append(f"| {entry['op']} | {entry['case']} | {values} | {peers} |")
    return "\n".join(lines)


def lengths(cell: Results) -> str:
    """The scenario, and its lengths where they are smaller."""
    real = f"{cell['prompt_tokens']}/{cell['output_tokens']}"
    return cell["scenario"] if real == cell["scenario"] else f"{cell['scenario']}, here {real}"


def number(value: float | None) -> str:
    """As wide as it must be; a dash where nothing was measured."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def share(numbers: Results, name: str) -> str:
    """In percent; a dash where there is no roofline."""
    return f"{numbers[name]:.0%}" if name in numbers else "-"


def _missing(results: Results) -> str:
    lines = [f"* {name}: {' '.join(reason.split())[:200]}" for name, reason in results["missing"].items()]
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""
