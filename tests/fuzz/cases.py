"""How many cases are drawn: a few, the same every time, in `make test`; many, other ones every time, with FUZZ=full."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

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
