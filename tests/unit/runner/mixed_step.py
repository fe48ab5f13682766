"""A step in which no two kinds of rows are left out: that ask for log-probabilities and that do not, forced and drawn."""

from __future__ import annotations

from backend.engine.plan import PlanRow, SlotStart, StepPlan
from backend.engine.request import MAX_LOGPROBS, SamplingParams


def mixed_step(num_tokens: int) -> StepPlan:
    """Two tokens of the first sequence, one of them forced, which asks for nothing; one each of others, which ask for all."""
    params = SamplingParams(repetition_penalty=1.1)
    silent, asking = (SlotStart(params, (1,), num_logprobs=number) for number in (None, MAX_LOGPROBS))
    others = [PlanRow(slot, 1, 1, (1,), (slot,), True, asking) for slot in range(1, num_tokens - 1)]
    return StepPlan(0, (PlanRow(0, 1, 2, (1, 1), (0,), True, silent, num_forced=1), *others))
