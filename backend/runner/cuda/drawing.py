"""The end of a step: logits of the rows that are sampled, the draw, and log-probabilities, by kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from backend.engine.plan import PlanRow, TokenLogProbs
from backend.runner.cuda.activations import LinearInput
from backend.runner.cuda.slot_state import SlotState
from backend.runner.cuda.step_tokens import width_for
from backend.runner.cuda.transformer import CudaTransformer
from backend.runner.memory_plan import PIECE_ROWS
from backend.runner.model_runner import Mask
from kernels.launch import Device
from kernels.log_probs import log_probs
from kernels.sample import make_workspace, sample


class Drawn:
    """What was drawn for the rows of a step, on its way to the host: to be read when `mark` has been waited for."""

    def __init__(
        self,
        token_ids: torch.Tensor,
        is_finite: torch.Tensor,
        scores: list[TokenScores],
        places: Sequence[int],
        device: Device,
    ) -> None:
        self._token_ids = to_host(token_ids)
        self._is_finite = to_host(is_finite)
        self._scores = scores
        self._places = places
        self.mark = device.mark()

    def broken_rows(self) -> list[int]:
        """Rows whose logits are not all finite."""
        return [row for row, is_finite in enumerate(self._is_finite.tolist()) if not is_finite]

    def token_ids(self) -> tuple[int, ...]:
        """One id per row."""
        return tuple(self._token_ids.tolist())

    def log_probs(self) -> tuple[TokenLogProbs | None, ...]:
        """Of the drawn ids, None where none was asked for; empty when nobody asked."""
        if not self._scores:
            return ()
        found: list[TokenLogProbs | None] = [None] * len(self._token_ids)
        scores = [score for piece in self._scores for score in piece.for_plan()]
        for place, score in zip(self._places, scores, strict=True):
            found[place] = score
        return tuple(found)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy into pinned memory, which is whole when a mark made afterwards has been waited for."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class TokenScores:
    """Log-probabilities of n ids, each with its `num_tops` most likely alternatives, on their way to the host as in Drawn."""

    def __init__(self, device: Device, logits: torch.Tensor, ids: torch.Tensor, num_tops: Sequence[int]) -> None:
        """Measure logits [n, V] FP32 at ids [n] INT32."""
        num_rows, place = len(logits), logits.device
        most = max(num_tops)
        self._num_tops = num_tops
        chosen = torch.empty(num_rows, device=place)
        ranks = torch.empty(num_rows, dtype=torch.int32, device=place)
        top_ids = torch.empty(num_rows, most, dtype=torch.int32, device=place) if most else None
        top_log_probs = torch.empty(num_rows, most, device=place) if most else None
        log_probs(
            device,
            logits=logits,
            ids=ids,
            chosen_log_probs=chosen,
            ranks=ranks,
            top_ids=top_ids,
            top_log_probs=top_log_probs,
            num_rows=torch.tensor([num_rows], dtype=torch.int32, device=place),
        )
        self._log_probs, self._ranks = to_host(chosen), to_host(ranks)
        self._top_ids = None if top_ids is None else to_host(top_ids)
        self._top_log_probs = None if top_log_probs is None else to_host(top_log_probs)

    def for_plan(self) -> list[TokenLogProbs]:
        """As the engine takes them."""
        no_tops: list[list[int]] = [[]] * len(self._num_tops)
        top_ids = no_tops if self._top_ids is None else self._top_ids.tolist()
        top_log_probs = no_tops if self._top_log_probs is None else self._top_log_probs.tolist()
        return [
            TokenLogProbs(log_prob, rank, tuple(ids[:num_top]), tuple(its_log_probs[:num_top]))
            for log_prob, rank, ids, its_log_probs, num_top in zip(
                self._log_probs.tolist(), self._ranks.tolist(), top_ids, top_log_probs, self._num_tops, strict=True
            )
        ]


class Drawer:
    """Owns the logits of a step's sampled rows and the workspace of the draw."""

    def __init__(
        self, device: Device, transformer: CudaTransformer, state: SlotState, num_rows: int, vocab_size: int
    ) -> None:
        self._device = device
        self._transformer = transformer
        self._state = state
        self._vocab_size = vocab_size
        self._logits = torch.empty(num_rows, vocab_size, device=device.torch_device)
        self._workspace = make_workspace(num_rows, vocab_size, device.torch_device)

    def compute_logits(self, hidden: LinearInput, places: Sequence[int]) -> None:
        """Of the rows to be drawn from, n at most `num_rows`: those at `places` of `hidden`."""
        self._compute(hidden, places, self._logits)

    def score(self, hidden: LinearInput, places: Sequence[int], ids: Sequence[int], num_top: int) -> list[TokenScores]:
        """Log-probabilities of given ids at `places` of `hidden`, in pieces that bound the logits held at once."""
        pieces = []
        for first in range(0, len(ids), PIECE_ROWS):
            piece = slice(first, first + PIECE_ROWS)
            its_ids = self._tensor(ids[piece])
            num_rows = width_for(len(its_ids), PIECE_ROWS)
            logits = torch.empty(num_rows, self._vocab_size, device=its_ids.device)
            self._compute(hidden, places[piece], logits)
            pieces.append(TokenScores(self._device, logits[: len(its_ids)], its_ids, [num_top] * len(its_ids)))
        return pieces

    def draw(self, plan_rows: Sequence[PlanRow], masks: Mapping[int, Mask]) -> Drawn:
        """One id for each of the plan's sampled rows, whose logits were computed last, in their order."""
        for row in plan_rows:
            if row.num_forced:
                self._state.force(row.slot, row.token_ids[-row.num_forced :])
        num_rows, place = len(plan_rows), self._logits.device
        token_ids = torch.empty(num_rows, dtype=torch.int32, device=place)
        is_finite = torch.empty(num_rows, dtype=torch.int32, device=place)
        if num_rows == 0:
            return Drawn(token_ids, is_finite, [], (), self._device)
        slots = [row.slot for row in plan_rows]
        masked = [slot for slot in slots if slot in masks]
        mask_words = [masks[slot] for slot in masked] or [np.zeros(-(-self._vocab_size // 32), dtype=np.int32)]
        logits = self._logits[:num_rows]
        sample(
            self._device,
            logits=logits,
            slots=self._tensor(slots),
            positions=self._tensor([row.start + row.num_tokens for row in plan_rows]),
            mask_rows=self._tensor([masked.index(slot) if slot in masks else -1 for slot in slots]),
            masks=torch.from_numpy(np.stack(mask_words)).to(place),
            **self._state.tensors,
            **{name: tensor[:num_rows] for name, tensor in self._workspace.items()},
            token_ids=token_ids,
            is_finite=is_finite,
            num_rows=self._tensor([num_rows]),
        )
        num_tops = self._state.num_tops[slots]
        asking = np.flatnonzero(num_tops >= 0).tolist()
        scores = []
        if asking:
            its_rows = torch.tensor(asking, device=place)
            scores = [TokenScores(self._device, logits[its_rows], token_ids[its_rows], num_tops[asking].tolist())]
        return Drawn(token_ids, is_finite, scores, asking, self._device)

    def _compute(self, hidden: LinearInput, places: Sequence[int], logits: torch.Tensor) -> None:
        """Into the first rows of `logits`. As many run as a step may be wide, so that few kernels serve all numbers of rows."""
        width = width_for(len(places), len(logits))
        self._transformer.logits(hidden.gathered(places, width), logits[:width], self._tensor([len(places)]))

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self._logits.device)
