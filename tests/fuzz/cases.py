"""How many cases are drawn: a few, the same every time, in `make test`; many, other ones every time, with FUZZ=full."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

IS_FULL = os.environ.get("FUZZ", "") == "full"


def cases(small: int, full: int) -> Callable[[Any], Any]:
    """Settings of a hypothesis test. Damage is drawn from large samples, which hypothesis would call slow."""
    return settings(
        max_examples=full if IS_FULL else small,
        derandomize=not IS_FULL,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
