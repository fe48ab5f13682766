"""A StepPlan as blocks of tokens: at most 128 rows pass through the layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from backend.engine.plan import PlanRow, StepPlan
from kernels.skinny_gemm import MAX_ROWS

MAX_BLOCK_TOKENS = MAX_ROWS
"""Rows of a block at most: what the skinny GEMM takes."""
BLOCK_WIDTHS = (8, 16, 32, 64, 128)
"""Widths that are captured as graphs; a block runs in the narrowest that holds it."""


@dataclass(slots=True)
class TokenBlock:
    """Tokens in the order of the plan's rows; a token of a row lies behind all earlier ones, perhaps in a block before.

    `token_ids`: an id, or -1 - slot for the one last drawn in the slot. `slots`, `positions`: of each token.
    `kept_tokens`: tokens of this block whose final hidden states are needed, in rising order.
    """

    token_ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kept_tokens: list[int] = field(default_factory=list)

    @property
    def width(self) -> int:
        """The narrowest width that holds the block."""
        return next(width for width in BLOCK_WIDTHS if width >= len(self.token_ids))


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Where the kept hidden states of a plan are, counted over all of its blocks.

    `sampled`: one for each row with `is_sampled`. `scored`: for each row with `num_prompt_logprobs`, those of its tokens
    that a prompt token follows.
    """

    sampled: tuple[int, ...]
    scored: tuple[range, ...]


def split_plan(plan: StepPlan, prompts: list[tuple[int, ...]]) -> tuple[list[TokenBlock], KeptRows]:
    """Cut a plan into blocks; `prompts`: of each slot."""
    blocks = [TokenBlock()]
    sampled: list[int] = []
    scored: list[range] = []
    num_kept = 0
    for row in plan.rows:
        num_scored = _num_scored(row, prompts[row.slot])
        if num_scored is not None:
            scored.append(range(num_kept, num_kept + num_scored))
        for index, token_id in enumerate(_ids(row)):
            if len(blocks[-1].token_ids) == MAX_BLOCK_TOKENS:
                blocks.append(TokenBlock())
            block = blocks[-1]
            is_drawn_from = row.is_sampled and index == row.num_tokens - 1
            if is_drawn_from or index < (num_scored or 0):
                if is_drawn_from:
                    sampled.append(num_kept)
                block.kept_tokens.append(len(block.token_ids))
                num_kept += 1
            block.token_ids.append(token_id)
            block.slots.append(row.slot)
            block.positions.append(row.start + index)
    return blocks, KeptRows(tuple(sampled), tuple(scored))


def _ids(row: PlanRow) -> Iterator[int]:
    if row.is_decode:
        yield -1 - row.slot
    yield from row.token_ids


def _num_scored(row: PlanRow, prompt: tuple[int, ...]) -> int | None:
    """Tokens of the row that a prompt token follows, when it asks for their scores."""
    if row.num_prompt_logprobs is None:
        return None
    return max(0, min(row.start + row.num_tokens, len(prompt) - 1) - row.start)
