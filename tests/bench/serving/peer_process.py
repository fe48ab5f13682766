"""python -m tests.bench.serving.peer_process NAME JOB: measures one peer, and prints a line of JSON for each scenario.

JOB is JSON: {"scale", "checkpoint", "scenarios": [names], "window_s", "seconds"}. A line is a cell without its way, or
{"missing": why} when the peer cannot be imported or does not work: then it is the last. What else the peer prints goes to
standard error.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.bench.serving.load import NO_TIME, measure
from tests.bench.serving.peers import PEERS
from tests.bench.serving.scale import FULL, SMALL, Scale
from tests.bench.serving.static_batch import measure_static_batch
from tests.bench.serving.transformers_way import transformers_way
from tests.bench.serving.vllm_way import vllm_way
from tests.bench.serving.way import Way

Say = Callable[[dict[str, Any]], None]
_VLLM, _STATIC, _TRANSFORMERS = PEERS
_WAYS: dict[str, Callable[[Path, Scale, torch.device], Way]] = {_VLLM: vllm_way, _TRANSFORMERS: transformers_way}


def measure_peer(name: str, job: dict[str, Any], say: Say) -> None:
    """Every scenario for which there is time; whatever the peer raises is said as its reason to be missing."""
    scale = FULL if job["scale"] == FULL.name else SMALL
    scenarios = tuple(each for each in scale.scenarios if each.name in job["scenarios"])
    scale = replace(scale, scenarios=scenarios, window_s=job["window_s"])
    ends_s = time.monotonic() + job["seconds"]
    time_is_left = lambda: time.monotonic() < ends_s  # noqa: E731
    device = torch.device("cuda" if scale.name == FULL.name else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(scale.settings["num_threads"]))
    try:
        if name == _STATIC:
            measure_static_batch(scale, device, time_is_left, say)
        else:
            way = _WAYS[name](Path(job["checkpoint"]), scale, device)
            _measure_way(way, scale, time_is_left, say)
    except Exception as problem:  # whatever a peer does, our own measurement goes on, and this is in the results
        say({"missing": f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:300]}"})


def _measure_way(way: Way, scale: Scale, time_is_left: Callable[[], bool], say: Say) -> None:
    handles = itertools.count(1)
    for scenario in scale.scenarios:
        about = scenario.describe()
        if not time_is_left():
            say(about | {"skipped": NO_TIME})
            continue
        measure(way, scenario, handles, scale, shares=(), time_is_left=time_is_left, keep=_with(about, say))
    way.close()


def _with(about: dict[str, Any], say: Say) -> Say:
    return lambda cell: say(about | cell)


def main(name: str, job: dict[str, Any]) -> None:
    """Measure, then end at once: threads of a peer would be waited for."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(news: dict[str, Any]) -> None:
        print(json.dumps(news), file=out, flush=True)

    measure_peer(name, job, say)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
