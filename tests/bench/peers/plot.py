"""Draws results/peers.json; executed by the Python of .venv-peers, which has `matplotlib`.

.venv-peers/bin/python tests/bench/peers/plot.py results/peers.json results/peers.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_PANELS = {
    "tokens_per_s": "tokens per second",
    "first_token_p50_ms": "first token, median, ms",
    "memory_mb": "memory, MB",
}


def draw(source: Path, target: Path) -> None:
    """A row of panels for each engine; a line for each way of serving."""
    results = json.loads(source.read_text())
    engines = list(dict.fromkeys(cell["engine"] for cell in results["cells"]))
    figure, rows = pyplot.subplots(
        len(engines), len(_PANELS), figsize=(13, 4 * len(engines)), squeeze=False, layout="constrained"
    )
    for engine, row in zip(engines, rows, strict=True):
        for axes, (name, title) in zip(row, _PANELS.items(), strict=True):
            cells = [cell for cell in results["cells"] if cell["engine"] == engine]
            for way in dict.fromkeys(cell["way"] for cell in cells):
                line = [cell for cell in cells if cell["way"] == way]
                axes.plot([cell["streams"] for cell in line], [cell[name] for cell in line], marker="o", label=way)
            axes.set(xscale="log", yscale="log", xlabel="streams", title=f"{engine}: {title}")
            axes.set_xticks(
                sorted({cell["streams"] for cell in cells}), labels=sorted({cell["streams"] for cell in cells})
            )
            axes.grid(alpha=0.3)
        row[0].legend(fontsize="small")
    figure.suptitle(f"{results['machine']}, load {results['load_average_before']} before; commit {results['commit']}")
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
