"""Log-probabilities of prompt tokens: what the model gave each, at the position before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from backend.engine.plan import StepPlan, TokenLogProbs
from backend.errors import EngineFailure
from backend.runner.log_probs import LogProbs, measure
from backend.runner.memory_plan import PIECE_ROWS
from backend.runner.transformer import Transformer
from backend.runner.work_items import IntArray


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of the rows of a step with `num_prompt_logprobs`, still on the device.

    `slots`, `num_positions`, `num_tops`: of each such row; `pieces` hold the positions of all of them in that order.
    """

    slots: tuple[int, ...]
    num_positions: tuple[int, ...]
    num_tops: tuple[int, ...]
    pieces: tuple[LogProbs, ...]

    def for_plan(self) -> tuple[tuple[TokenLogProbs, ...], ...]:
        """On the host, one tuple per row. EngineFailure names the slots with a log-probability that is not a number."""
        num_tops = np.repeat(self.num_tops, self.num_positions).tolist()
        scores: list[TokenLogProbs] = []
        for piece in self.pieces:
            scores += piece.for_plan(num_tops[len(scores) : len(scores) + len(piece.ranks)])
        ends = np.cumsum(self.num_positions).tolist()
        rows = tuple(tuple(scores[end - n : end]) for end, n in zip(ends, self.num_positions, strict=True))
        broken = [
            slot
            for slot, row in zip(self.slots, rows, strict=True)
            if not np.isfinite([score.log_prob for score in row]).all()
        ]
        if broken:
            names = ", ".join(map(str, broken))
            raise EngineFailure(
                f"logits: must be finite, got NaN or infinity in the prompt of slot {names}; are the weights damaged?"
            )
        return rows


def score_prompts(
    plan: StepPlan,
    first_tokens: IntArray,
    prompts: Sequence[Sequence[int]],
    hidden: torch.Tensor,
    transformer: Transformer,
) -> PromptScores | None:
    """Score the positions p of the plan's chunks for which the prompt has a token at p + 1; None when no row asks.

    `first_tokens` [rows]: row of `hidden` [R, E] at which a plan row begins; `prompts`: of each slot.
    """
    asking = [index for index, row in enumerate(plan.rows) if row.num_prompt_logprobs is not None]
    if not asking:
        return None
    rows = [plan.rows[index] for index in asking]
    # A slice ends with the prompt, so its last token asks for nothing.
    next_ids = [prompts[row.slot][row.start + 1 : row.start + row.num_tokens + 1] for row in rows]
    tokens = np.concatenate(
        [first_tokens[index] + np.arange(len(ids)) for index, ids in zip(asking, next_ids, strict=True)]
    )
    targets = torch.tensor([token_id for ids in next_ids for token_id in ids], dtype=torch.int64, device=hidden.device)
    num_tops = tuple(row.num_prompt_logprobs or 0 for row in rows)
    pieces = []
    for first in range(0, len(tokens), PIECE_ROWS):
        piece = slice(first, first + PIECE_ROWS)
        pieces.append(measure(transformer.logits(hidden, tokens[piece]), targets[piece], max(num_tops)))
    return PromptScores(tuple(row.slot for row in rows), tuple(map(len, next_ids)), num_tops, tuple(pieces))
