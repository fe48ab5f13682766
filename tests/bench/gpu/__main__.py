"""python -m tests.bench.gpu (`make bench-gpu`): kernels and decode steps on a Hopper GPU, in under 8 minutes.

Without a GPU, or with --emulated, the same at toy sizes on the emulator: that shows that it works; its numbers are no results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.model_config import ModelConfig
from backend.plan import NEMO_12B as NEMO
from backend.runner.cuda.runner import CudaRunner
from kernels import read_bandwidth
from kernels.bench import describe_machine, time_case
from kernels.build import build
from kernels.clock import Clock, GpuClock
from kernels.cubin_cache import CubinCache
from kernels.driver import CudaDevice
from kernels.errors import KernelError
from kernels.launch import Device
from kernels.op import Case, Op
from kernels.ops import OPS, select_ops
from tests.bench.conditions import RESULTS
from tests.bench.gpu import kernel_timings, long_context, prompts, steps
from tests.bench.gpu.host_clock import HostClock
from tests.bench.gpu.models import TOY, pages_for, random_runner
from tests.bench.gpu.observed_device import ObservedDevice
from tests.bench.gpu.prompts import Prompt
from tests.bench.gpu.steps import Cell
from tests.emulator.device import PLAIN, EmulatedDevice

EMULATED = "EMULATED, toy sizes: no number below is a result"


@dataclass(frozen=True)
class Scale:
    """What is measured: on a GPU the real thing, on the emulator a model of the same shape in small."""

    config: ModelConfig
    cells: tuple[Cell, ...]
    num_steps: int
    checked: Cell
    prompts: tuple[Prompt, ...]
    checked_chunks: tuple[int, ...]
    context_lengths: tuple[int, ...]
    cases: tuple[tuple[Op, Case], ...]


def _small_cases() -> Iterator[tuple[Op, Case]]:
    """Of each operation the first case that is small; and those whose peers run on a CPU, too."""
    for op in OPS:
        small = [case for case in op.cases if case.is_emulated]
        yield op, small[0]
        yield from ((op, case) for case in small[1:] if case.name in ("BF16", "all of one length"))


FULL = Scale(
    NEMO,
    (Cell(1, 1024), Cell(64, 4096), Cell(1, 131072), Cell(8, 4096), Cell(64, 1024), Cell(256, 1024), Cell(8, 32768)),
    num_steps=40,
    checked=Cell(8, 1024),
    prompts=(
        *(Prompt(1024, 8192), Prompt(8192, 8192), Prompt(8192, 2048), Prompt(8192, 512)),
        *(Prompt(32768, 8192), Prompt(131072, 8192), Prompt(131072, 2048)),
    ),
    checked_chunks=(8192, 2048, 512),
    context_lengths=long_context.LENGTHS,
    cases=tuple((op, case) for op in OPS for case in op.cases if case.is_timed),
)
SMALL = Scale(
    TOY,
    (Cell(1, 70), Cell(3, 130)),
    num_steps=2,
    checked=Cell(3, 70),
    prompts=(Prompt(150, 150), Prompt(150, 64)),
    checked_chunks=(150, 70),
    context_lengths=(70, 300),
    cases=tuple(_small_cases()),
)


class Bench:
    """Sections one after the other; `results` holds what is there so far, and is written after each."""

    def __init__(
        self, device: Device, clock: Clock, scale: Scale, *, is_gpu: bool, seconds: float, json_file: Path | None
    ) -> None:
        self.results: dict[str, Any] = {}
        self._device = device
        self._clock = clock
        self._scale = scale
        self._is_gpu = is_gpu
        self._ends = time.monotonic() + seconds
        self._json_file = json_file
        self._bytes_per_us = 0.0

    def run(self, ops: str | None) -> None:
        """Everything; CheckError and LaunchError end it, and leave the results of before."""
        self._read_ceiling()
        if ops is None:
            self._whole_steps()
        self._kernels(ops)
        if ops is None:
            self._long_contexts()

    def _read_ceiling(self) -> None:
        case = next(case for op, case in self._scale.cases if op is read_bandwidth.OP)
        ceiling = time_case(read_bandwidth.OP, case, self._device, self._clock, bytes_per_us=None)
        self._bytes_per_us = ceiling.tb_per_s * 1e6
        self._keep("read_ceiling_tb_per_s", ceiling.tb_per_s, f"read ceiling: {ceiling.line()}")

    def _whole_steps(self) -> None:
        """Decode steps, then prompts, of one random model."""
        scale, started = self._scale, time.monotonic()
        most = max(pages_for(cell.context + 2 * scale.num_steps) * cell.batch for cell in (*scale.cells, scale.checked))
        longest_prompt = max(*(prompt.length for prompt in scale.prompts), *scale.checked_chunks)
        longest = max(*(cell.context + 2 * scale.num_steps for cell in scale.cells), longest_prompt)
        observed = ObservedDevice(self._device, is_timed=not self._is_gpu)
        runner = random_runner(
            scale.config,
            observed,
            num_pages=max(most, pages_for(longest_prompt)),
            max_num_seqs=max(cell.batch for cell in scale.cells),
            max_model_len=longest,
            max_step_tokens=max(scale.checked_chunks),
        )
        self._device.synchronize()
        seconds = time.monotonic() - started
        self._keep("random_model_s", seconds, f"random model of {scale.config.num_layers} layers in {seconds:.1f} s")
        steps.check_alone(runner, scale.checked)
        cells: list[dict[str, Any]] = []
        for cell in scale.cells:
            if self._time_is_left():
                cells.append(
                    steps.measure_cell(
                        runner, observed, cell, self._bytes_per_us, num_steps=scale.num_steps, is_gpu=self._is_gpu
                    )
                )
            else:
                cells.append({"batch": cell.batch, "context": cell.context, "skipped": "no time left"})
            self._keep("decode_steps", cells, "\n".join(steps.lines(cells[-1])))
        self._prompts(runner)
        runner.close()

    def _prompts(self, runner: CudaRunner) -> None:
        if self._time_is_left():
            prompts.check_chunks(runner, max(self._scale.checked_chunks), self._scale.checked_chunks)
        entries: list[dict[str, Any]] = []
        for prompt in self._scale.prompts:
            if self._time_is_left():
                entries.append(prompts.measure(runner, prompt, self._bytes_per_us))
            else:
                entries.append({"length": prompt.length, "chunk": prompt.chunk, "skipped": "no time left"})
            self._keep("prompts", entries, prompts.line(entries[-1]))

    def _kernels(self, name: str | None) -> None:
        chosen = [
            (op, case) for op, case in self._scale.cases if op is not read_bandwidth.OP and op in select_ops(name)
        ]
        entries: list[dict[str, Any]] = []
        for op, case in chosen:
            if self._time_is_left():
                entry = kernel_timings.time_case(op, case, self._device, self._clock, self._bytes_per_us)
            else:
                entry = {"op": op.name, "case": case.name, "skipped": "no time left"}
            entries.append(entry)
            self._keep("kernels", entries, kernel_timings.line(entry))

    def _long_contexts(self) -> None:
        """Errors, not times: so they come last."""
        cells: list[dict[str, Any]] = []
        for length in self._scale.context_lengths:
            if not self._time_is_left():
                self._keep("long_context", cells, f"errors over {length} tokens  skipped: no time left")
                continue
            for cell in long_context.measure(self._device, (length,), num_queries=8, num_heads=8, num_kv_heads=2):
                cells.append(cell)
                self._keep("long_context", cells, long_context.line(cell))

    def _time_is_left(self) -> bool:
        return time.monotonic() < self._ends

    def _keep(self, name: str, value: Any, line: str) -> None:
        self.results[name] = value
        print(line, flush=True)
        if self._json_file is not None:
            self._json_file.parent.mkdir(parents=True, exist_ok=True)
            self._json_file.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was measured, or that for which there was time."""
    options = _parser().parse_args(argv)
    is_gpu = torch.cuda.is_available() and not options.emulated
    json_file = options.json or (RESULTS / "gpu.json" if is_gpu else None)
    if not is_gpu and json_file is not None and json_file.resolve().is_relative_to(RESULTS):
        print(f"bench-gpu: {json_file} is among the results, and the emulator gives none", file=sys.stderr)
        return 2
    try:
        device: Device = CudaDevice() if is_gpu else EmulatedDevice(PLAIN[0])
        if isinstance(device, CudaDevice):
            build([program for op in OPS for program in op.programs], CubinCache())
            clock: Clock = GpuClock(device)
            machine = describe_machine(device)
        else:
            clock, machine = HostClock(), {"gpu": EMULATED}
        bench = Bench(
            device, clock, FULL if is_gpu else SMALL, is_gpu=is_gpu, seconds=options.seconds, json_file=json_file
        )
        bench.results |= {
            "machine": machine,
            "command": " ".join(["python -m tests.bench.gpu", *(argv or sys.argv[1:])]),
        }
        print(f"bench-gpu: {machine['gpu']}", flush=True)
        bench.run(options.op)
        print(f"bench-gpu: {EMULATED}" if not is_gpu else f"bench-gpu: results in {json_file}", flush=True)
    except KernelError as error:
        print(f"bench-gpu: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", allow_abbrev=False, description=__doc__)
    parser.add_argument("--op", help="only the kernels of one operation, and no decode steps")
    parser.add_argument("--emulated", action="store_true", help="toy sizes on the emulator, though a GPU is there")
    parser.add_argument("--seconds", type=float, default=420.0, help="nothing new is begun after that (default: 420)")
    parser.add_argument("--json", type=Path, help="results (default: tests/bench/results/gpu.json on a GPU, else none)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
