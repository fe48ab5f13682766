"""Ways of serving measured one after the other, each number kept as soon as it is there."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from backend.errors import NemoError
from kernels.errors import KernelError
from tests.bench.serving.engine_way import EngineWay, emulated_engine, engine_in_its_process, settings_for
from tests.bench.serving.load import NO_TIME, measure
from tests.bench.serving.peers import PEERS, run_peer
from tests.bench.serving.roofline import Roofline
from tests.bench.serving.scale import EMULATED, Scale
from tests.bench.serving.triton_way import TritonWay, running_server
from tests.bench.serving.way import ServingError
from tests.gpu.emulation import emulator, why_not_emulated

OURS, ON_EMULATOR = "engine alone", "engine alone, CUDA runner emulated"
ENSEMBLE, MODEL = "ensemble over gRPC", "mistral_nemo over gRPC"
WAYS = {"engine": (OURS, ON_EMULATOR, *PEERS), "triton": (ENSEMBLE, MODEL)}
"""What each of the two commands measures, in this order."""
_MODEL_NAMES = {ENSEMBLE: "ensemble", MODEL: "mistral_nemo"}
_KILL_PEERS_AFTER_S = 50.0


class Bench:
    """`results` is what there is so far; `has_failed`: one of our own ways did not work."""

    def __init__(
        self, scale: Scale, about: dict[str, Any], *, seconds: float, json_file: Path | None, roofline: Roofline | None
    ) -> None:
        self.results = about | {"scale": scale.name, "cells": [], "missing": {}}
        self.has_failed = False
        self._scale = scale
        self._ends_s = time.monotonic() + seconds
        self._json_file = json_file
        self._roofline = roofline
        self._handles = itertools.count(1)

    def engine(self, checkpoint: Path, folder: Path, ways: Sequence[str]) -> None:
        """Our engine without Triton, then the peers; at toy scale the CUDA runner on the emulator, too."""
        starts: dict[str, tuple[Callable[[], EngineWay], Scale]] = {
            OURS: (lambda: engine_in_its_process(settings_for(checkpoint, self._scale.settings)), self._scale)
        }
        if self._scale.name == "toy":
            starts[ON_EMULATOR] = (
                lambda: emulated_engine(EMULATED.config, emulator(), EMULATED.settings),
                EMULATED,
            )
        for name in (name for name in starts if name in ways):
            if name == ON_EMULATOR and (reason := why_not_emulated()) is not None:
                self._miss(name, reason)
                continue
            with self._on_its_own(name):
                start, scale = starts[name]
                started_s = time.monotonic()
                with closing(start()) as way:
                    print(f"{name}: started in {time.monotonic() - started_s:.1f} s", flush=True)
                    self._scenarios(name, way, scale, scale.shares)
        for name in (name for name in PEERS if name in ways):
            self._peer(name, checkpoint, folder)

    def triton(self, checkpoint: Path, folder: Path, ways: Sequence[str], wheel: Path | None) -> None:
        """Both models of one server. Arrivals by themselves for the ensemble alone, which is what clients call."""
        with self._on_its_own("tritonserver"):
            started_s = time.monotonic()
            with running_server(checkpoint, folder / "server", self._scale.settings, wheel) as server:
                print(f"tritonserver: started in {time.monotonic() - started_s:.1f} s", flush=True)
                for name in (name for name in WAYS["triton"] if name in ways):
                    shares = self._scale.shares if name == ENSEMBLE else ()
                    with self._on_its_own(name), closing(TritonWay(server, _MODEL_NAMES[name])) as way:
                        self._scenarios(name, way, self._scale, shares)

    def _scenarios(self, name: str, way: EngineWay | TritonWay, scale: Scale, shares: tuple[float, ...]) -> None:
        for scenario in scale.scenarios:
            about = {"way": name} | scenario.describe()
            if not self._time_is_left():
                self._keep(about | {"skipped": NO_TIME})
                continue
            hits = way.num_prefix_hit_tokens

            def keep(cell: dict[str, Any], about: dict[str, Any] = about, hits: int = hits) -> None:
                if not scale.has_latencies:
                    cell = cell | {"capacity": _without_latencies(cell["capacity"])}
                self._keep(about | cell | {"prefix_hit_tokens": way.num_prefix_hit_tokens - hits})

            measure(way, scenario, self._handles, scale, shares=shares, time_is_left=self._time_is_left, keep=keep)

    def _peer(self, name: str, checkpoint: Path, folder: Path) -> None:
        if not self._time_is_left():
            self._miss(name, NO_TIME)
            return
        seconds = self._ends_s - time.monotonic()
        job = {"scale": self._scale.name, "checkpoint": str(checkpoint), "seconds": seconds}
        job["scenarios"] = [scenario.name for scenario in self._scale.scenarios]
        job["window_s"] = self._scale.window_s
        for news in run_peer(name, job, folder, seconds + _KILL_PEERS_AFTER_S):
            if "missing" in news:
                self._miss(name, news["missing"])
            else:
                self._keep({"way": name} | news)

    @contextmanager
    def _on_its_own(self, name: str) -> Iterator[None]:
        """What goes wrong with one way is in the results, and the others go on."""
        try:
            yield
        except (ServingError, NemoError, KernelError, AssertionError) as error:
            self.has_failed = True
            self._miss(name, f"{type(error).__name__}: {error}")

    def _miss(self, name: str, reason: str) -> None:
        self.results["missing"][name] = reason
        print(f"{name}: missing: {reason}", flush=True)
        self.write()

    def _keep(self, cell: dict[str, Any]) -> None:
        """Add a cell, or put it into the place of what there was of it."""
        cells = self.results["cells"]
        cell = self._with_shares(cell)
        if cells and all(cells[-1][name] == cell[name] for name in ("way", "scenario")):
            cells.pop()
        cells.append(cell)
        print(line(cell), flush=True)
        self.write()

    def _with_shares(self, cell: dict[str, Any]) -> dict[str, Any]:
        if self._roofline is None or "capacity" not in cell:
            return cell
        scenario = next(each for each in self._scale.scenarios if each.name == cell["scenario"])
        added: dict[str, Any] = {
            "capacity": cell["capacity"] | self._roofline.shares(scenario, cell["capacity"], is_capacity=True)
        }
        added["poisson"] = [
            numbers if "skipped" in numbers else numbers | self._roofline.shares(scenario, numbers, is_capacity=False)
            for numbers in cell.get("poisson", ())
        ]
        return cell | added

    def _time_is_left(self) -> bool:
        return time.monotonic() < self._ends_s

    def write(self) -> None:
        """The results so far."""
        if self._json_file is not None:
            self._json_file.parent.mkdir(parents=True, exist_ok=True)
            self._json_file.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")


def _without_latencies(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if not name.endswith("_ms")}


def line(cell: dict[str, Any]) -> str:
    """For people: the newest number of a cell."""
    head = f"{cell['way']:<36} {cell['scenario']:<10} x {cell['concurrent']:>3}"
    if "skipped" in cell:
        return f"{head}  skipped: {cell['skipped']}"
    if poisson := cell.get("poisson"):
        head, numbers = f"{head}  at {poisson[-1]['load']:.0%}", poisson[-1]
        if "skipped" in numbers:
            return f"{head}  skipped: {numbers['skipped']}"
    else:
        numbers = cell["capacity"]
    share = f" ({numbers['share']:.0%} of the roofline)" if "share" in numbers else ""
    times = "".join(
        f"  {title} p50 {numbers[f'{name}_p50_ms']} ms, p99 {numbers.get(f'{name}_p99_ms')}"
        for name, title in (("first_token", "first token"), ("inter_token", "then a token"))
        if f"{name}_p50_ms" in numbers
    )
    return f"{head}  {numbers['tokens_per_s']:>9,.1f} tokens/s{share}{times}"
