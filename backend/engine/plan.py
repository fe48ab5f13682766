"""What the Scheduler hands to a ModelRunner for one step, and what comes back. Made once, then frozen.

A runner keeps, per slot, what must survive between steps: the last sampled id, the output so far (for penalties) and the
sampling parameters. The Scheduler therefore sends parameters once, in the sequence's first step, and a decode row carries
no id at all: the id sampled in the step before is still on the device when this step is planned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from backend.engine.request import SamplingParams

PAGE_TOKENS = 64
"""Tokens per KV page (shape letter G)."""


@dataclass(frozen=True, slots=True)
class SlotStart:
    """Sent with the first row of a sequence: everything the sampler needs to know of it.

    `prompt_token_ids` is the whole prompt (repetition penalty). `ending_ids` must not be sampled before `min_tokens` outputs.
    `num_logprobs` None: no log-probabilities; otherwise the chosen token's and those of the so many most likely.
    """

    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...]
    min_tokens: int = 0
    ending_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None


class PageCopy(msgspec.Struct, frozen=True):
    """K and V of one page, all layers, copied between a device page and a host page before anything of the step runs."""

    source: int
    target: int
    is_to_host: bool


class PlanRow(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The tokens of one sequence that run in this step: `num_tokens` of them from position `start`.

    A prefill row carries its ids in `token_ids` (length `num_tokens`); a decode row has none and `num_tokens` 1: its id is
    the one last sampled in `slot`. `page_ids` covers positions 0 to `start + num_tokens - 1` at least; token t lies in
    `page_ids[t // 64]` at offset `t % 64`. `is_sampled`: draw the next id from the logits of the last of these tokens.
    `num_prompt_logprobs`: also give the log-probability of each next prompt token, with those of the so many most likely; for
    the chunk's tokens at positions p with p + 1 in the prompt.
    A decode row may carry ids too, when a grammar forces them: `token_ids` then begins with the id last sampled in the slot,
    and the other `num_forced` ones become part of the output without being drawn. `is_guided`: the draw needs a mask.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    page_ids: tuple[int, ...]
    is_sampled: bool
    slot_start: SlotStart | None = None
    num_prompt_logprobs: int | None = None
    num_forced: int = 0
    is_guided: bool = False
    # NOTE: a Struct, because hundreds of these are made each step, and a frozen dataclass takes six times as long to make.

    @property
    def is_decode(self) -> bool:
        """Whether the id to run is the one last sampled in the slot, and known there alone."""
        return not self.token_ids

    @property
    def forced_ids(self) -> tuple[int, ...]:
        """Ids that become output without being drawn."""
        return self.token_ids[len(self.token_ids) - self.num_forced :] if self.num_forced else ()


@dataclass(frozen=True, slots=True, eq=False)
class SteadyRows:
    """Decode rows as columns: in each of `slots` [n] INT32 the id drawn last runs at `starts` [n] INT32, and the next is drawn.

    `page_ids` as in PlanRow. `slots` and `page_ids` are the same objects from step to step, until anything of them changes.
    """

    slots: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    page_ids: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.page_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SteadyRows) and self.rows() == other.rows()

    def row(self, index: int) -> PlanRow:
        """One of them by itself."""
        return PlanRow(int(self.slots[index]), int(self.starts[index]), 1, (), self.page_ids[index], True)

    def rows(self) -> tuple[PlanRow, ...]:
        """All of them one by one."""
        columns = zip(self.slots.tolist(), self.starts.tolist(), self.page_ids, strict=True)
        return tuple([PlanRow(slot, start, 1, (), page_ids, True) for slot, start, page_ids in columns])


NO_STEADY_ROWS = SteadyRows(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32), ())


@dataclass(frozen=True)
class StepPlan:
    """One step: the copies in order, then decode rows first, then prefill chunks. `step` counts from 0.

    Its rows are those of `steady`, then `single_rows`; `rows` has all of them one by one, for whoever has the time.
    """

    step: int
    single_rows: tuple[PlanRow, ...]
    copies: tuple[PageCopy, ...] = ()
    steady: SteadyRows = field(default_factory=lambda: NO_STEADY_ROWS)

    @cached_property
    def rows(self) -> tuple[PlanRow, ...]:
        """All rows, in their order."""
        return (*self.steady.rows(), *self.single_rows)

    @property
    def needs_masks(self) -> bool:
        """Whether a draw of this step depends on a grammar, and so on the ids of the step before."""
        return any(row.is_guided and row.is_sampled for row in self.single_rows)

    @property
    def num_tokens(self) -> int:
        """Tokens in the step (shape letter T)."""
        return len(self.steady) + sum([row.num_tokens for row in self.single_rows])


class TokenLogProbs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural, of the model's own logits, before penalties, filters and temperature) at one place.

    `rank` of the token that stands there, 1 for the most likely; `top_ids` and `top_log_probs` in falling order.
    """

    log_prob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step, in the order of its rows.

    `token_ids` and `log_probs`: one per row with `is_sampled`; a log-probability is None where none was asked for, and
    `log_probs` is empty when nobody asked. `prompt_log_probs`: one tuple per row with `num_prompt_logprobs`.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[TokenLogProbs | None, ...] = ()
    prompt_log_probs: tuple[tuple[TokenLogProbs, ...], ...] = ()
