"""Steps that are run before anything is served, so that no request waits for what only the first one of its kind does.

On a GPU that is: loading kernels, PyTorch's own ones too, capturing graphs, and growing the allocator's pools to what a
step takes at most. The steps are made up; every sequence that comes later begins by forgetting what its slot knew, and
writes its pages before it reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from backend.engine.plan import PAGE_TOKENS, PlanRow, SlotStart, StepPlan
from backend.engine.request import MAX_LOGPROBS, SamplingParams
from backend.runner.model_runner import ModelRunner

_TOKEN_ID = 1
# Everything that a sampler has work of its own for.
_PARAMS = SamplingParams(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((0, 1.0),),
    bad_words=((0, 0),),
)


@dataclass(frozen=True, slots=True)
class StepSize:
    """Tokens of a step: `num_generated` of as many sequences in the midst of their answers, the others of prompts.

    `is_guided`: a grammar says what the first may be followed by. `num_forced`: more tokens, of the first sequence, which a
    grammar forces.
    """

    num_generated: int
    num_prompt_tokens: int
    is_guided: bool = True
    num_forced: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the steps of a runner."""

    max_num_seqs: int
    max_model_len: int
    num_pages: int
    vocab_size: int


def run_steps(runner: ModelRunner, sizes: Iterable[StepSize], limits: Limits) -> int:
    """Run a step of each size, all of whose tokens ask for all that can be asked for; gives how many there were.

    A size that the limits do not allow is left out. EngineFailure when logits are not finite: the weights are damaged.
    """
    num_steps = 0
    for size in sizes:
        rows = _rows(size, limits)
        if rows is None:
            continue
        step = runner.launch(StepPlan(num_steps, rows))
        words = np.full(-(-limits.vocab_size // 32), -1, dtype=np.int32)
        words[-1] = np.uint32((1 << (limits.vocab_size - 1) % 32 + 1) - 1).astype(np.int32)
        step.draw({row.slot: words for row in rows if row.is_guided})
        step.result()
        num_steps += 1
    return num_steps


def _rows(size: StepSize, limits: Limits) -> tuple[PlanRow, ...] | None:
    """Rows that share no page; None when there are too few pages or slots."""
    rows: list[PlanRow] = []
    for slot in range(size.num_generated):
        start = SlotStart(_PARAMS, (_TOKEN_ID,), 1, (0,), MAX_LOGPROBS)
        # The token behind a prompt of one, given as a grammar would, since nothing was drawn before.
        num_forced = 0 if slot else size.num_forced
        ids = (_TOKEN_ID,) * (1 + num_forced)
        rows.append(
            PlanRow(slot, 1, len(ids), ids, (slot,), True, start, num_forced=num_forced, is_guided=size.is_guided)
        )
    first_page, left = size.num_generated, size.num_prompt_tokens
    while left:
        num_tokens = min(left, limits.max_model_len - 1)
        num_pages = -(-num_tokens // PAGE_TOKENS)
        ids, pages = (_TOKEN_ID,) * num_tokens, tuple(range(first_page, first_page + num_pages))
        start = SlotStart(_PARAMS, ids, 1, (0,), MAX_LOGPROBS)
        rows.append(PlanRow(len(rows), 0, num_tokens, ids, pages, True, start, num_prompt_logprobs=MAX_LOGPROBS))
        first_page, left = first_page + num_pages, left - num_tokens
    return tuple(rows) if len(rows) <= limits.max_num_seqs and first_page <= limits.num_pages else None
