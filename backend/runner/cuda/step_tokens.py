"""A StepPlan as tokens side by side: one row of every tensor each, all of which pass through the layers at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend.engine.plan import PlanRow, StepPlan
from kernels.prefill_attention import Chunk

Int32Array = npt.NDArray[np.int32]
_NARROWEST = 8


def step_widths(max_tokens: int) -> tuple[int, ...]:
    """Numbers of rows that are captured as graphs; a step runs in the narrowest that holds it.

    Rows that a step does not fill cost next to nothing, because kernels read on the device how many there are.

    >>> step_widths(40), step_widths(5)
    ((8, 16, 32, 40), (5,))
    """
    widths = [_NARROWEST]
    while widths[-1] < max_tokens:
        widths.append(2 * widths[-1])
    return (*widths[:-1], max_tokens)


def width_for(num_rows: int, max_rows: int) -> int:
    """The narrowest of `step_widths(max_rows)` that holds `num_rows`."""
    return next(width for width in step_widths(max_rows) if width >= num_rows)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The tokens of a step [T] in the order of the plan's rows; those of a row lie behind one another.

    `token_ids`: an id, or -1 - slot for the one last drawn in the slot. `slots`, `positions`: of each token.
    `num_generated`: tokens behind their prompts, drawn or forced; they come first. `chunks`: the rows of prompts behind them.
    Places among the tokens: `sampled`, of the last one of each row with `is_sampled`; `scored`, for each row with
    `num_prompt_logprobs`, of its tokens that a prompt token follows. Final hidden states are needed of these alone.
    """

    token_ids: Int32Array
    slots: Int32Array
    positions: Int32Array
    num_generated: int
    chunks: tuple[Chunk, ...]
    sampled: tuple[int, ...]
    scored: tuple[range, ...]


def lay_out(plan: StepPlan, prompts: list[tuple[int, ...]]) -> StepTokens:
    """Put a plan's tokens side by side; `prompts`: of each slot."""
    token_ids, slots, positions = (np.empty(plan.num_tokens, dtype=np.int32) for _ in range(3))
    chunks: list[Chunk] = []
    sampled: list[int] = []
    scored: list[range] = []
    first = num_generated = 0
    for row in plan.rows:
        end = first + row.num_tokens
        token_ids[first:end] = row.token_ids or -1 - row.slot
        slots[first:end] = row.slot
        positions[first:end] = np.arange(row.start, row.start + row.num_tokens)
        # What a token is decides which kernel computes its attention, so it must follow from its sequence alone.
        if row.start < len(prompts[row.slot]):
            chunks.append(Chunk(row.slot, row.start, row.num_tokens))
        else:
            assert not chunks, "generated tokens come before those of prompts"
            num_generated = end
        if row.is_sampled:
            sampled.append(end - 1)
        if row.num_prompt_logprobs is not None:
            scored.append(range(first, first + _num_scored(row, prompts[row.slot])))
        first = end
    return StepTokens(token_ids, slots, positions, num_generated, tuple(chunks), tuple(sampled), tuple(scored))


def _num_scored(row: PlanRow, prompt: tuple[int, ...]) -> int:
    """Tokens of the row that a prompt token follows."""
    return max(0, min(row.start + row.num_tokens, len(prompt) - 1) - row.start)
