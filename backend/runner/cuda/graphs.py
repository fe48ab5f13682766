"""Parts of a step, captured as graphs when they are first needed, and replayed alone or several as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backend.runner.cuda.attention import StepShape
from kernels.launch import Device, Graph


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Logits of up to `width` rows: the first ones, or, if `is_gathered`, those that the step names."""

    width: int
    is_gathered: bool


@dataclass(frozen=True, slots=True)
class DrawShape:
    """Draws for up to `width` rows."""

    width: int


Part = StepShape | HeadShape | DrawShape


class StepGraphs:
    """`record` launches a part's kernels, on a device that is capturing them."""

    def __init__(self, device: Device, record: Callable[[Part], None]) -> None:
        self._device = device
        self._record = record
        self._graphs: dict[tuple[Part, ...], Graph] = {}

    def replay(self, *parts: Part) -> None:
        """Run parts one behind the other, as one graph."""
        graph = self._graphs.get(parts)
        if graph is None:
            graph = self._graphs[parts] = self._device.capture(lambda: self._record_all(parts))
        graph.replay()

    def _record_all(self, parts: tuple[Part, ...]) -> None:
        for part in parts:
            self._record(part)
