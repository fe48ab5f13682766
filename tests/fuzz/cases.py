"""Cases drawn and checked. How many: a few, the same every time, in `make test`; many, other ones every time, with FUZZ=full."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.parser import Case, Parser
from tests.fuzz.watch import nothing_left_open, refusal_of

IS_FULL = os.environ.get("FUZZ", "") == "full"


def cases(small: int, full: int, *, is_shrunk: bool = True) -> Callable[[Any], Any]:
    """Settings of a hypothesis test; `is_shrunk` not where the first failure may leave nothing that could fail again.

    Damage is drawn from large samples, which hypothesis would call slow.
    """
    return settings(
        max_examples=full if IS_FULL else small,
        derandomize=not IS_FULL,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if is_shrunk else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def check_damaged(name: str, parser: Parser, drawn: Callable[[Any], Any]) -> None:
    """Every damaged input is taken or refused, some are refused, and nothing stays open."""
    taken = refused = 0

    @drawn
    @given(parser.damaged())
    def run(case: Case) -> None:
        nonlocal taken, refused
        is_refused = refusal_of(parser.parse, case.content) is not None
        taken, refused = taken + (not is_refused), refused + is_refused

    with nothing_left_open():
        run()
    print(f"{name}: {refused} refused, {taken} taken")
    assert refused
