"""Draws the plots of the results page; executed by the Python of .venv-peers, which has `matplotlib`.

.venv-peers/bin/python tests/bench/plots.py tests/bench/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_WAYS = ("engine", "triton")


def draw_host(results: Path) -> None:
    """What the ensemble lets through over streams, and what the scheduler takes over sequences."""
    ensemble, scheduler = (json.loads((results / f"{name}.json").read_text()) for name in ("ensemble", "scheduler"))
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, (name, title) in zip(
        panels, (("tokens_per_s", "tokens a second"), ("first_token_p50_ms", "first token, median, ms")), strict=False
    ):
        for max_tokens, label in ((0, "a response carries what has come"), (1, "one token a response")):
            cells = [cell for cell in ensemble["cells"] if cell["max_tokens_per_response"] == max_tokens]
            axes.plot([cell["streams"] for cell in cells], [cell[name] for cell in cells], marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="streams", title=f"ensemble: {title}")
    for part in ("plan", "commit", "message", "total"):
        cells = [cell for cell in scheduler["cells"] if not cell["stop_strings"]]
        panels[2].plot(
            [cell["sequences"] for cell in cells], [cell[f"{part}_us"] for cell in cells], marker="o", label=part
        )
    panels[2].set(xscale="log", yscale="log", xlabel="sequences", title="scheduler, us a step")
    _finish(figure, panels, results / "host.png", [ensemble, scheduler])


def draw_serving(results: Path, suffix: str, target: str) -> None:
    """Bars of capacity for each scenario and way; time between tokens over load. Nothing where nothing was measured."""
    files = [results / f"serving_{way}{suffix}.json" for way in _WAYS]
    sources: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files if file.exists()]
    if not sources:
        return
    cells = [cell for source in sources for cell in source["cells"] if "capacity" in cell]
    scenarios, ways = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("scenario", "way"))
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    width = 0.8 / len(ways)
    for place, way in enumerate(ways):
        of_way = [cell for cell in cells if cell["way"] == way]
        at = [scenarios.index(cell["scenario"]) + width * (place - (len(ways) - 1) / 2) for cell in of_way]
        panels[0].bar(at, [cell["capacity"]["tokens_per_s"] for cell in of_way], width, label=way)
    panels[0].set_xticks(range(len(scenarios)), labels=scenarios)
    panels[0].set(yscale="log", title="capacity, tokens a second", xlabel="prompt / output tokens")
    for cell in cells:
        measured = [n for n in cell.get("poisson", ()) if n.get("inter_token_p50_ms") is not None]
        points = sorted((100 * numbers["load"], numbers["inter_token_p50_ms"]) for numbers in measured)
        if points:
            panels[1].plot(*zip(*points, strict=True), marker="o", label=f"{cell['way']}, {cell['scenario']}")
    panels[1].set(yscale="log", title="time for a token, median, ms", xlabel="arrivals, % of capacity")
    _finish(figure, panels, results / target, sources)


def _finish(figure: Any, panels: Any, target: Path, sources: list[dict[str, Any]]) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    about = dict.fromkeys(
        f"{s['machine']}, load {s['load_average_before']}; {s['date']}, {s['commit']}" for s in sources
    )
    scale = "TOY SCALE. " if any(source.get("scale") == "toy" for source in sources) else ""
    figure.suptitle(scale + " / ".join(about), fontsize="small")
    # Without the version of matplotlib, which would make another file of the same plot.
    figure.savefig(target, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw_host(folder)
    draw_serving(folder, "_toy", "serving_toy.png")
    draw_serving(folder, "", "serving.png")
