"""What the Scheduler hands to a ModelRunner for one step, and what comes back. Made once, then frozen.

A runner keeps, per slot, what must survive between steps: the last sampled id, the output so far (for penalties) and the
sampling parameters. The Scheduler therefore sends parameters once, in the sequence's first step, and a decode row carries
no id at all: the id sampled in the step before is still on the device when this step is planned.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from backend.engine.request import SamplingParams

PAGE_TOKENS = 64
"""Tokens per KV page (shape letter G)."""


@dataclass(frozen=True, slots=True)
class SlotStart:
    """Sent with the first row of a sequence: everything the sampler needs to know of it.

    `prompt_token_ids` is the whole prompt (repetition penalty). `ending_ids` must not be sampled before `min_tokens` outputs.
    """

    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...]
    min_tokens: int = 0
    ending_ids: tuple[int, ...] = ()


class PlanRow(msgspec.Struct, frozen=True, gc=False):
    """The tokens of one sequence that run in this step: `num_tokens` of them from position `start`.

    A prefill row carries its ids in `token_ids` (length `num_tokens`); a decode row has none and `num_tokens` 1: its id is
    the one last sampled in `slot`. `page_ids` covers positions 0 to `start + num_tokens - 1` at least; token t lies in
    `page_ids[t // 64]` at offset `t % 64`. `is_sampled`: draw the next id from the logits of the last of these tokens.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    page_ids: tuple[int, ...]
    is_sampled: bool
    slot_start: SlotStart | None = None
    # NOTE: a Struct, because hundreds of these are made each step, and a frozen dataclass takes ten times as long to make.

    @property
    def is_decode(self) -> bool:
        """Whether the id to run is the one last sampled in the slot."""
        return not self.token_ids


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decode rows first, then prefill chunks. `step` counts from 0."""

    step: int
    rows: tuple[PlanRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the step (shape letter T)."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled ids: one per row with `is_sampled`, in the order of the rows."""

    token_ids: tuple[int, ...]
