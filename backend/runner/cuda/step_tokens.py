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
    `sampled`: of each row with `is_sampled` the place of its last token, and `sampled_slots` its slot. `scored`: for each row
    with `num_prompt_logprobs`, the places of its tokens that a prompt token follows. Final hidden states are needed of these
    alone.
    """

    token_ids: Int32Array
    slots: Int32Array
    positions: Int32Array
    num_generated: int
    chunks: tuple[Chunk, ...]
    sampled: Int32Array
    sampled_slots: Int32Array
    scored: tuple[range, ...]

    @property
    def are_all_sampled(self) -> bool:
        """Whether every token is the only one of its row, and sampled."""
        return len(self.sampled) == len(self.token_ids)


def lay_out(plan: StepPlan, prompts: list[tuple[int, ...]]) -> StepTokens:
    """Put a plan's tokens side by side; `prompts`: of each slot."""
    rows, steady = plan.single_rows, plan.steady
    if not rows:
        places = np.arange(len(steady), dtype=np.int32)
        return StepTokens(-1 - steady.slots, steady.slots, steady.starts, len(steady), (), places, steady.slots, ())
    num_steady = len(steady)
    # NOTE: lists, then arrays of them: there may be hundreds of rows, and writing an array number by number is slow.
    row_slots = np.concatenate((steady.slots, np.array([row.slot for row in rows], dtype=np.int32)))
    starts = np.concatenate((steady.starts, np.array([row.start for row in rows], dtype=np.int32)))
    sizes = np.array([1] * num_steady + [row.num_tokens for row in rows], dtype=np.int32)
    ends = sizes.cumsum(dtype=np.int32)
    firsts = ends - sizes
    # What a token is decides which kernel computes its attention, so it must follow from its sequence alone.
    is_prompt = starts < np.array([0] * num_steady + [len(prompts[row.slot]) for row in rows], dtype=np.int32)
    num_generated_rows = len(starts) - int(is_prompt.sum())
    assert not is_prompt[:num_generated_rows].any(), "generated tokens come before those of prompts"
    slots = row_slots.repeat(sizes)
    token_ids = -1 - slots
    for index, row in enumerate(rows, num_steady):
        if row.token_ids:
            token_ids[firsts[index] : ends[index]] = row.token_ids
    positions = np.arange(len(slots), dtype=np.int32) + np.subtract(starts, firsts).repeat(sizes)
    sampled_rows = np.flatnonzero([True] * num_steady + [row.is_sampled for row in rows])
    return StepTokens(
        token_ids,
        slots,
        positions,
        int(ends[num_generated_rows - 1]) if num_generated_rows else 0,
        tuple([Chunk(row.slot, row.start, row.num_tokens) for row in rows[num_generated_rows - num_steady :]]),
        ends[sampled_rows] - np.int32(1),
        row_slots[sampled_rows],
        tuple(
            [
                range(first, first + _num_scored(row, prompts[row.slot]))
                for row, first in zip(rows, firsts[num_steady:].tolist(), strict=True)
                if row.num_prompt_logprobs is not None
            ]
        ),
    )


def _num_scored(row: PlanRow, prompt: tuple[int, ...]) -> int:
    """Tokens of the row that a prompt token follows."""
    return max(0, min(row.start + row.num_tokens, len(prompt) - 1) - row.start)
