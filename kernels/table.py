"""The kernel table of README.md: what each operation costs, what its kernels take, where it has run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kernels.build import build
from kernels.cubin_cache import CubinCache
from kernels.op import Case, Op
from kernels.recording import recorded_launches

README = Path(__file__).parent / "README.md"
HARDWARE_RUNS = Path(__file__).parent / "hardware_runs.json"
TABLE_BEGIN = "<!-- kernels: begin (written by python -m kernels list --write) -->"
TABLE_END = "<!-- kernels: end -->"
# NVIDIA's datasheet says 4.8; copies reach this.
H200_BYTES_PER_US = 4.3e6
_HEAD = (
    "| operation | case | kernel | grid x block | bytes | floor | registers | spills | shared | emulated | on hardware |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def kernel_table(ops: Iterable[Op], cache: CubinCache) -> str:
    """Formulas as a list, then a table with a row for every kernel that an operation's first timed case launches."""
    ops = tuple(ops)
    launched = {op.name: recorded_launches(op, _shown_case(op)) for op in ops}
    build((launch.program for launches in launched.values() for launch in launches), cache)
    runs = read_hardware_runs()
    formulas = [f"- **{op.name}**: `{op.formula}`" for op in ops]
    rows = [row for op in ops for row in _rows(op, launched[op.name], cache, runs.get(op.name))]
    return "\n".join([*formulas, "", _HEAD, *rows])


def read_hardware_runs(path: Path = HARDWARE_RUNS) -> dict[str, dict[str, Any]]:
    """Operation -> date, gpu and commit of the last run on a GPU in which every case passed its check."""
    runs: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return runs


def write_table(table: str, readme: Path = README) -> None:
    """Puts the table between the README's markers."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(TABLE_BEGIN)
    _, after = rest.split(TABLE_END)
    readme.write_text(f"{before}{TABLE_BEGIN}\n\n{table}\n\n{TABLE_END}{after}", encoding="utf-8")


def written_table(readme: Path = README) -> str:
    """The table that the README has."""
    return readme.read_text(encoding="utf-8").split(TABLE_BEGIN)[1].split(TABLE_END)[0].strip("\n")


def readable_bytes(num_bytes: int) -> str:
    """Three digits and a decimal unit.

    >>> readable_bytes(512), readable_bytes(34_560), readable_bytes(1_073_741_824)
    ('512 B', '34.6 KB', '1.07 GB')
    """
    value, unit = float(num_bytes), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def readable_us(value_us: float) -> str:
    """Three digits, in microseconds or milliseconds.

    >>> readable_us(0.5333), readable_us(249.7), readable_us(2849.0)
    ('0.533 us', '250 us', '2.85 ms')
    """
    return f"{value_us:.3g} us" if value_us < 1000 else f"{value_us / 1000:.3g} ms"


def _shown_case(op: Op) -> Case:
    return next(case for case in op.cases if case.is_timed)


def _rows(op: Op, launches: list[Any], cache: CubinCache, run: dict[str, Any] | None) -> Iterator[str]:
    case = _shown_case(op)
    cost = op.cost(case)
    sizes = ", ".join(f"{letter} {size}" for letter, size in case.sizes.items())
    num_emulated = sum(case.is_emulated for case in op.cases)
    where = f"{run['date'][:10]}, {run['gpu']}, {run['commit']}" if run else "not yet run on hardware"
    for position, launch in enumerate(launches):
        taken = cache.get(launch.program).kernels[launch.kernel]
        grid = " x ".join(str(size) for size in launch.grid if size > 1) or "1"
        block = launch.block[0] * launch.block[1] * launch.block[2]
        cells = [
            op.name if position == 0 else "",
            f"{case.name} ({sizes})" if position == 0 else "",
            f"`{launch.kernel}`",
            f"{grid} x {block}",
            readable_bytes(cost.bytes) if position == 0 else "",
            readable_us(cost.floor_us(H200_BYTES_PER_US)) if position == 0 else "",
            str(taken.num_registers),
            str(taken.spill_bytes + taken.stack_bytes),
            readable_bytes(taken.shared_bytes + launch.shared_bytes),
            f"{num_emulated} of {len(op.cases)} cases" if position == 0 else "",
            where if position == 0 else "",
        ]
        yield f"| {' | '.join(cells)} |"
