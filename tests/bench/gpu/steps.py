"""The whole decode step over batch and context: its time, its floor, what the host takes, which kernels it waits for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backend.engine.plan import PlanRow, SlotStart, SteadyRows, StepPlan, StepResult
from backend.engine.request import SamplingParams
from backend.runner.cuda.runner import CudaRunner
from kernels.errors import CheckError
from tests.bench.gpu.floor import decode_bytes
from tests.bench.gpu.models import FP8, pages_for
from tests.bench.gpu.observed_device import ObservedDevice
from tests.bench.gpu.timeline import exposed_us, named_by_launches, profiled_spans

# The first one captures the graph.
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Cell:
    """`batch` sequences that each see `context` tokens, their own included."""

    batch: int
    context: int


class Decoding:
    """`batch` greedy sequences in the midst of their answers; `launch` runs one step of all of them."""

    def __init__(
        self, runner: CudaRunner, cell: Cell, num_steps: int, *, first_slot: int = 0, num_logprobs: int | None = None
    ) -> None:
        self._runner = runner
        self._num_logprobs = num_logprobs
        self._context = cell.context
        # Scattered pages, the same for a slot whatever the batch.
        order = torch.randperm(runner.num_pages, generator=torch.Generator().manual_seed(0)).tolist()
        size = pages_for(cell.context + num_steps)
        slots = range(first_slot, first_slot + cell.batch)
        self._slots = np.array(slots, dtype=np.int32)
        self._pages = [tuple(order[slot * size : (slot + 1) * size]) for slot in slots]
        assert all(len(pages) == size for pages in self._pages), "too few pages for this cell"
        self._given: tuple[tuple[int, ...], ...] = ()
        self._num_given = 0
        self._step = 0

    def launch(self) -> Callable[[], StepResult]:
        """Start a step and its draw; what is returned waits for it."""
        step = self._runner.launch(self.next_plan())
        step.draw({})
        return step.result

    def next_plan(self) -> StepPlan:
        """The step behind the last one."""
        start = self._context - 1 + self._step
        step, pages = self._step, self._pages_until(start)
        self._step += 1
        if step and self._num_logprobs is None:  # as the engine plans them
            starts = np.full(len(pages), start, dtype=np.int32)
            return StepPlan(step, (), steady=SteadyRows(self._slots, starts, pages))
        begin = SlotStart(SamplingParams(), (1,), num_logprobs=self._num_logprobs) if step == 0 else None
        rows = tuple(
            # The first id is given, as if it had been forced: nothing was drawn in the slot yet.
            PlanRow(slot, start, 1, (2 + slot,) if step == 0 else (), page_ids, True, begin)
            for slot, page_ids in zip(self._slots.tolist(), pages, strict=True)
        )
        return StepPlan(step, rows)

    def _pages_until(self, position: int) -> tuple[tuple[int, ...], ...]:
        """Of each slot. The same tuples until a page is added, as the engine has them."""
        num_pages = pages_for(position + 1)
        if num_pages != self._num_given:
            self._num_given = num_pages
            self._given = tuple(pages[:num_pages] for pages in self._pages)
        return self._given


def check_alone(runner: CudaRunner, cell: Cell) -> None:
    """CheckError unless the last of `batch` rows alone gives the ids and log-probabilities it gives among all, bit for bit."""
    found = []
    for batch, first_slot in ((cell.batch, 0), (1, cell.batch - 1)):
        decoding = Decoding(runner, Cell(batch, cell.context), 3, first_slot=first_slot, num_logprobs=0)
        results = [decoding.launch()() for _ in range(3)]
        found.append([(result.token_ids[-1], result.log_probs[-1]) for result in results])
    if found[0] != found[1]:
        raise CheckError(f"decode step, {cell}: a row alone gives {found[1]}, among others {found[0]}")


def time_steps(runner: CudaRunner, cell: Cell, num_steps: int) -> tuple[float, list[float]]:
    """Milliseconds of a step, and what the host took for each, when the next is launched before the last is looked at."""
    decoding = Decoding(runner, cell, _WARM_UP_STEPS + num_steps)
    for _ in range(_WARM_UP_STEPS):
        decoding.launch()()
    pending: Callable[[], StepResult] | None = None
    host_ms, started = [], time.perf_counter()
    for _ in range(num_steps):
        before = time.perf_counter()
        launched = decoding.launch()
        host_ms.append(1000 * (time.perf_counter() - before))
        if pending is not None:
            pending()
        pending = launched
    assert pending is not None
    pending()
    # The first launch is hidden by nothing: with 40 steps a few tenths of a percent are the host's.
    return 1000 * (time.perf_counter() - started) / num_steps, host_ms


def exposed_of_step(runner: CudaRunner, device: ObservedDevice, cell: Cell, *, is_gpu: bool) -> dict[str, float]:
    """Microseconds of one step by kernel, the largest first; empty where nothing could be seen."""
    decoding = Decoding(runner, cell, 4)
    for _ in range(3):
        decoding.launch()()
    device.forget()
    if is_gpu:
        spans = named_by_launches(profiled_spans(lambda: decoding.launch()()), device.launches)
    else:
        decoding.launch()()
        spans = device.spans
    exposed = exposed_us(spans)
    return dict(sorted(exposed.items(), key=lambda item: -item[1]))


def measure_cell(
    runner: CudaRunner, device: ObservedDevice, cell: Cell, bytes_per_us: float, *, num_steps: int, is_gpu: bool
) -> dict[str, Any]:
    """One entry of the results."""
    step_ms, host_ms = time_steps(runner, cell, num_steps)
    floor_ms = decode_bytes(runner.config, FP8, 1, cell.batch, cell.context) / bytes_per_us / 1000
    return {
        "batch": cell.batch,
        "context": cell.context,
        "num_steps": len(host_ms),
        "step_ms": step_ms,
        "floor_ms": floor_ms,
        "share_of_floor": floor_ms / step_ms,
        "tokens_per_s": 1000 * cell.batch / step_ms,
        "host_ms_median": statistics.median(host_ms),
        "host_ms_max": max(host_ms),
        "exposed_us": exposed_of_step(runner, device, cell, is_gpu=is_gpu),
    }


def lines(cell: dict[str, Any]) -> Sequence[str]:
    """For people: the step, and its largest parts."""
    if "skipped" in cell:
        return (f"decode step  batch {cell['batch']:>3} x {cell['context']:>6}  skipped: {cell['skipped']}",)
    head = (
        f"decode step  batch {cell['batch']:>3} x {cell['context']:>6}  {cell['step_ms']:>9.3f} ms  "
        f"floor {cell['floor_ms']:.3f} ms = {cell['share_of_floor']:.1%}  "
        f"{cell['tokens_per_s']:>8,.0f} tokens/s  host {cell['host_ms_median']:.3f} ms"
    )
    parts = [f"    {name:<32} {us:>9.1f} us" for name, us in list(cell["exposed_us"].items())[:8]]
    return head, *parts
