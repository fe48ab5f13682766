"""The kernels of a decode step of Mistral NeMo: in which order, whether each overlaps the one before, what each must move.

    python -m tests.bench.gpu.launch_table [--write]

The launches are those that the CUDA runner captures, on a device without memory. With --write the table goes into README.md;
times that each kernel is waited for come from results/gpu.json, where there is one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.weights import allocate_weights
from backend.plan import NEMO_12B as NEMO
from kernels import decode_attention, embedding, rmsnorm, rope_kv, sample, skinny_gemm, swiglu
from kernels.launch import Launch
from kernels.op import Case, Cost
from kernels.table import H200_BYTES_PER_US, readable_bytes
from tests.bench.conditions import RESULTS
from tests.bench.gpu.host_only_device import HostOnlyDevice
from tests.bench.gpu.models import FP8, pages_for, runner_of
from tests.bench.gpu.steps import Cell, Decoding
from tests.bench.gpu.timeline import label

README = Path(__file__).parent / "README.md"
BEGIN = "<!-- launches: begin (written by python -m tests.bench.gpu.launch_table --write) -->"
END = "<!-- launches: end -->"
CELLS = (Cell(1, 1024), Cell(256, 1024))
_NOT_RUN = "not yet run on hardware"
# What a kernel boundary costs inside a graph where kernels do not overlap, as measured on an H100 by Hazy Research ("Look ma, no
# bubbles", 2025). With programmatic dependent launch it is an assumption: about 1 us at most.
BOUNDARY_US = 1.3


@dataclass(frozen=True)
class Step:
    """The launches of a step: before the layers, of one layer, and behind them."""

    before: tuple[Launch, ...]
    of_layer: tuple[Launch, ...]
    after: tuple[Launch, ...]

    def num_launches(self, num_layers: int) -> int:
        """Of the whole step."""
        return len(self.before) + num_layers * len(self.of_layer) + len(self.after)


def captured_step(cell: Cell) -> Step:
    """Of a decode step of Mistral NeMo in FP8, the head in BF16; of two layers, since all but the first launch the same."""
    config = replace(NEMO, num_layers=2)
    device = HostOnlyDevice("meta")
    runner = runner_of(
        config,
        allocate_weights(config, torch.device("meta"), FP8),
        device,
        num_pages=cell.batch * pages_for(cell.context + 1),
        max_num_seqs=256,
        max_model_len=cell.context + 1,
        max_step_tokens=512,
    )
    with torch.inference_mode():
        runner.launch(Decoding(runner, cell, 1).next_plan())
    (launches,) = device.graphs
    norms = [index for index, launch in enumerate(launches) if launch.kernel == "rmsnorm"]
    first, second, end = norms[0], norms[2], norms[4]
    of_first, of_second = launches[first:second], launches[second:end]
    assert [launch.kernel for launch in of_first] == [launch.kernel for launch in of_second]
    return Step(launches[:first], of_second, launches[end:])


def launch_cost(launch: Launch, cell: Cell) -> Cost | None:
    """What a launch must move and compute at least; None: less than anything that is counted."""
    sizes = dict(launch.program.definitions)
    heads = {"T": cell.batch, "H": NEMO.num_heads, "K": NEMO.num_kv_heads}
    match launch.kernel:
        case "embedding":
            return embedding.cost(Case("", {"T": cell.batch, "E": sizes["HIDDEN"]}))
        case "rmsnorm":
            options = {"add": bool(sizes["ADD"]), "quant": sizes["QUANT"]}
            return rmsnorm.cost(Case("", {"M": cell.batch, "E": sizes["HIDDEN"]}, options))
        case "skinny_gemm" | "large_gemm":
            is_head = sizes["OUTPUTS"] == NEMO.vocab_size
            shape = {"M": cell.batch, "N": sizes["OUTPUTS"], "K": sizes["INPUTS"]}
            return skinny_gemm.cost(Case("", shape, {"bf16": is_head, "float": is_head}))
        case "rope_kv":
            return rope_kv.cost(Case("", heads, {"fp8": True}))
        case "attention_partials":
            return decode_attention.cost(Case("", heads | {"length": cell.context}, {"fp8": True, "output": 1}))
        case "swiglu":
            return swiglu.cost(Case("", {"M": cell.batch, "F": NEMO.ffn_size}, {"quant": 1}))
        case "sample_scan":
            return sample.cost(Case("", {"S": cell.batch, "V": NEMO.vocab_size}))
        case _:
            return None


def launch_table(cells: Sequence[Cell] = CELLS) -> str:
    """A row per launch, with each cell's bytes, floor and exposed time; then the sums."""
    steps = [captured_step(cell) for cell in cells]
    exposed = [exposed_of(cell) for cell in cells]
    names = " | ".join(f"{cell.batch} x {cell.context:,}: bytes | floor, us | waited for, us" for cell in cells)
    lines = [f"| place | kernel | overlaps the one before | {names} |", "|---|---|---|" + "---:|---:|---|" * len(cells)]
    for place, parts in (
        ("before the layers", [step.before for step in steps]),
        (f"each of {NEMO.num_layers} layers", [step.of_layer for step in steps]),
        ("behind them", [step.after for step in steps]),
    ):
        for launches in zip(*parts, strict=True):
            cost_cells = [_cells(*of_cell) for of_cell in zip(launches, cells, exposed, strict=True)]
            kernels = " / ".join(dict.fromkeys(f"`{label(launch)}`" for launch in launches))
            overlaps = "yes" if all(launch.overlaps_previous for launch in launches) else "no"
            lines.append(f"| {place} | {kernels} | {overlaps} | {' | '.join(cost_cells)} |")
            place = ""
    counts = [step.num_launches(NEMO.num_layers) for step in steps]
    floors = [_floor_us(step, cell) for step, cell in zip(steps, cells, strict=True)]
    told = [
        f"Batch {cell.batch} at {cell.context:,}: {count} kernels; their floors are {floor / 1000:.2f} ms together, and their "
        f"boundaries, at {BOUNDARY_US} us each, {count * BOUNDARY_US / 1000:.2f} ms: {count * BOUNDARY_US / floor:.1%} of that."
        for cell, count, floor in zip(cells, counts, floors, strict=True)
    ]
    return "\n".join([*lines, "", *told])


def exposed_of(cell: Cell) -> dict[str, float] | None:
    """Microseconds of a whole step by kernel, of the last bench-gpu; None when it has not run."""
    file = RESULTS / "gpu.json"
    if not file.exists():
        return None
    steps: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")).get("decode_steps", [])
    found = [step for step in steps if (step["batch"], step["context"]) == (cell.batch, cell.context)]
    exposed: dict[str, float] | None = found[0].get("exposed_us") if found else None
    return exposed


def _cells(launch: Launch, cell: Cell, exposed: dict[str, float] | None) -> str:
    cost = launch_cost(launch, cell)
    if cost is None:
        moved, floor = "little", "0"
    else:
        moved, floor = readable_bytes(cost.bytes), f"{cost.floor_us(H200_BYTES_PER_US):.3g}"
    # What the bench knows by kernel and sizes is the whole step's.
    seen = _NOT_RUN if exposed is None else f"{exposed.get(label(launch), 0):.1f} in the step"
    return f"{moved} | {floor} | {seen}"


def _floor_us(step: Step, cell: Cell) -> float:
    def of(launches: Sequence[Launch]) -> float:
        costs = [launch_cost(launch, cell) for launch in launches]
        return sum(cost.floor_us(H200_BYTES_PER_US) for cost in costs if cost is not None)

    return of(step.before) + NEMO.num_layers * of(step.of_layer) + of(step.after)


def written_table(readme: Path = README) -> str:
    """What README.md has."""
    return readme.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip("\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu.launch_table")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    table = launch_table()
    if not parser.parse_args(argv).write:
        print(table)
        return
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
