"""Seconds by phase, and the age of a process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from backend.phases import Phases, process_began_s


def test_every_second_belongs_to_the_phase_that_ends_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((12.0, 13.5, 13.5, 20.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    watch = Phases(began_s=10.0)
    for name in ("imports", "weights", "kernels", "weights"):
        watch.end(name)
    assert watch.line() == "10.0 s: imports 2.0, weights 8.0, kernels 0.0"
    assert watch.fields() == {"fields": {"total_s": 10.0, "phases_s": {"imports": 2.0, "weights": 8.0, "kernels": 0.0}}}


def test_a_process_knows_when_it_was_started() -> None:
    """Between the moments before and after its start, in another process whose name has spaces and brackets."""
    code = (
        "import time; from backend.phases import process_began_s\n"
        "open('/proc/self/comm', 'w').write('a) b (c')\n"
        "time.sleep(0.2)\n"
        "print(process_began_s())"
    )
    before_s = time.monotonic()
    began_s = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
    after_s = time.monotonic()
    assert before_s - 0.02 <= began_s <= after_s - 0.2
    assert process_began_s() < before_s
