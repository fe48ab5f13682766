"""The interface between the engine loop and whatever executes a step."""

from __future__ import annotations

from typing import Protocol

from backend.engine.plan import StepPlan, StepResult


class InFlightStep(Protocol):
    """A step that was launched and may still run."""

    def result(self) -> StepResult:
        """Wait for the step and return its sampled ids. Called once."""


class ModelRunner(Protocol):
    """Owns weights, KV pages and per-slot sampler state.

    Steps execute in the order they are launched. A step may be launched before the result of the one before is known; its
    decode rows then read the id sampled there.
    """

    num_pages: int
    """KV pages of 64 tokens that plans may use: ids 0 to num_pages - 1."""
    max_num_seqs: int
    """Slots: 0 to max_num_seqs - 1."""

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Start the step and return at once, or when it is finished; the caller cannot tell."""

    def describe(self) -> dict[str, str]:
        """What runs here and why, for the log and the model's metadata: runner, device, dtypes, batch_invariant."""

    def close(self) -> None:
        """Free weights and pages."""
