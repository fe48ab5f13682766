"""The interface between the engine loop and whatever executes a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from backend.engine.plan import StepPlan, StepResult

Mask = npt.NDArray[np.int32]
"""Allowed ids of one draw: INT32 [ceil(V / 32)], bit `id & 31` of word `id >> 5`."""


class InFlightStep(Protocol):
    """A step that was launched and may still run."""

    def draw(self, masks: Mapping[int, Mask]) -> None:
        """Draw the ids, those of a slot in `masks` from its allowed ids alone. Called once, before `result`.

        Apart from `launch`, because a grammar needs the id of step t before it can say what is allowed in step t + 1, and the
        forward pass of t + 1 need not wait for that.
        """

    def result(self) -> StepResult:
        """Wait for the step and return what came out. Called once."""


class ModelRunner(Protocol):
    """Owns weights, KV pages and per-slot sampler state.

    Steps execute in the order they are launched. A step may be launched before the result of the one before is known; its
    decode rows then read the id sampled there.
    """

    num_pages: int
    """KV pages of 64 tokens that plans may use: ids 0 to num_pages - 1."""
    num_host_pages: int
    """Pages in host memory that plans may copy to and from: ids 0 to num_host_pages - 1."""
    max_num_seqs: int
    """Slots: 0 to max_num_seqs - 1."""
    caches_outputs: bool
    """Whether K and V of a generated token are, bit for bit, what they would be if it were part of a prompt.

    Only then may a prompt find them in the prefix cache: ids must not depend on a hit.
    """

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Start copies and forward pass of the step and return at once, or when they are finished; the caller cannot tell."""

    def describe(self) -> dict[str, str]:
        """What runs here and why, for the log and the model's metadata: runner, device, dtypes, batch_invariant."""

    def close(self) -> None:
        """Free weights and pages."""
