"""Which kernel a step waits for: spans of kernels, and how much of each nothing else hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from kernels.launch import Launch


@dataclass(frozen=True)
class Span:
    """A kernel or a copy, from its start to its end in microseconds."""

    name: str
    start_us: float
    end_us: float


def exposed_us(spans: Iterable[Span]) -> dict[str, float]:
    """By name, the time by which each span moved the end of everything on; `idle` is the time between.

    With overlapping launches a kernel starts while the one before still runs, and waits: that time is not its own. The
    values add up to the time from the first start to the last end.

    >>> exposed_us([Span("a", 0, 5), Span("b", 3, 7), Span("a", 8, 9), Span("c", 8, 9)])
    {'a': 6, 'b': 2, 'idle': 1, 'c': 0}
    """
    exposed: dict[str, float] = {}
    covered_to: float | None = None
    for span in sorted(spans, key=lambda span: (span.start_us, span.end_us)):
        if covered_to is None:
            covered_to = span.start_us
        if span.start_us > covered_to:
            exposed["idle"] = exposed.get("idle", 0) + span.start_us - covered_to
            covered_to = span.start_us
        exposed[span.name] = exposed.get(span.name, 0) + max(0, span.end_us - covered_to)
        covered_to = max(covered_to, span.end_us)
    return exposed


def named_by_launches(spans: Sequence[Span], launches: Sequence[Launch]) -> list[Span]:
    """Spans of our kernels get the sizes of their launches; as they are when the two do not belong together."""
    kernels = {launch.kernel for launch in launches}
    ours = [span for span in sorted(spans, key=lambda span: span.start_us) if span.name in kernels]
    if [span.name for span in ours] != [launch.kernel for launch in launches]:
        return list(spans)
    named = [Span(label(launch), span.start_us, span.end_us) for span, launch in zip(ours, launches, strict=True)]
    return named + [span for span in spans if span.name not in kernels]


def label(launch: Launch) -> str:
    """The kernel, and the sizes of a matrix.

    >>> from kernels.program import Program
    >>> label(Launch(Program.of("skinny_gemm", OUTPUTS=64, INPUTS=128), "skinny_gemm", (1, 1, 1), (1, 1, 1), ()))
    'skinny_gemm 64x128'
    """
    sizes = dict(launch.program.definitions)
    return f"{launch.kernel} {sizes['OUTPUTS']}x{sizes['INPUTS']}" if "OUTPUTS" in sizes else launch.kernel


def profiled_spans(run: Callable[[], object]) -> list[Span]:
    """What the GPU did during `run`, by torch's profiler; empty where it sees nothing (a container without CUPTI)."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA"
    ]
