"""Logits to token ids, and the state per slot that this needs: parameters, rules, ids seen so far, the last id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backend.engine.plan import SlotStart
from backend.runner.filters import Filters, filter_candidates
from backend.runner.log_probs import LogProbs, measure
from backend.runner.logit_rules import LogitRules
from backend.runner.model_runner import Mask
from backend.runner.noise import gumbel_noise, row_keys
from backend.runner.row_blocks import row_blocks

_FP32_MAX = float(np.finfo(np.float32).max)


def sampler_bytes(num_slots: int, vocab_size: int) -> int:
    """Bytes of the per-slot state: one flag and one int32 count for every token of the vocabulary."""
    return num_slots * vocab_size * (torch.bool.itemsize + torch.int32.itemsize)


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn for S rows, on the device.

    `token_ids` [S] int64, and `is_finite` [S] bool: whether the row's logits were numbers. `log_probs`: of the ids of
    rows that want log-probabilities, None when none does. `num_tops` [S] (NumPy): how many of the most likely ids a row
    wants besides, -1 for a row that wants nothing.
    """

    token_ids: torch.Tensor
    is_finite: torch.Tensor
    log_probs: LogProbs | None
    num_tops: npt.NDArray[np.int64]


class Sampler:
    """Draws one id per row in the order that SamplingParams gives, and keeps per slot what the next draw depends on.

    A row's draw and its log-probabilities depend bit for bit on nothing but its own logits, parameters and history:
    everything is elementwise, an exact integer sum, or a maximum. `last_ids` [slots] int64 holds the id last drawn,
    from which the next step goes on.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.last_ids = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._vocab_size = vocab_size
        self._device = device
        self._is_seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)  # prompt and output
        self._output_counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._temperature = np.zeros(num_slots)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots)
        self._min_p = np.zeros(num_slots)
        self._repetition_penalty = np.ones(num_slots)
        self._presence_penalty = np.zeros(num_slots)
        self._frequency_penalty = np.zeros(num_slots)
        self._has_penalties = np.zeros(num_slots, dtype=bool)
        self._seed = np.zeros(num_slots, dtype=np.uint64)
        self._num_tops = np.full(num_slots, -1, dtype=np.int64)
        self._rules = LogitRules(num_slots, vocab_size, device)

    def start(self, slot: int, start: SlotStart) -> None:
        """Begin a sequence in `slot`, forgetting the one before."""
        params = start.sampling
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k if params.top_k > 0 else self._vocab_size
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._repetition_penalty[slot] = params.repetition_penalty
        self._presence_penalty[slot] = params.presence_penalty
        self._frequency_penalty[slot] = params.frequency_penalty
        self._has_penalties[slot] = params.has_penalties
        self._seed[slot] = params.seed
        self._num_tops[slot] = -1 if start.num_logprobs is None else start.num_logprobs
        self._rules.start(slot, start)
        if params.has_penalties:
            self._is_seen[slot] = False
            self._output_counts[slot] = 0
            self._is_seen[slot, torch.tensor(start.prompt_token_ids, device=self._device)] = True

    def force(self, slot: int, token_ids: tuple[int, ...]) -> None:
        """Take ids into the output of `slot` as if each had been drawn."""
        for token_id in torch.tensor(token_ids, device=self._device).split(1):
            self._append(np.array([slot]), token_id)

    def sample(
        self,
        logits: torch.Tensor,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        masks: Mapping[int, Mask],
    ) -> Draw:
        """Draw the next id of `slots` [S] (each at most once), to stand at `positions` [S] of their sequences.

        logits [S, V] FP32 are changed in place. `masks`: by slot, the only ids it may draw. When mask, bad words and
        `min_tokens` together leave nothing, the mask's most likely id is drawn.
        """
        # NOTE: NaN goes through both; and a sum in FP64 would copy all logits.
        is_finite = torch.isfinite(logits.amin(dim=1)) & torch.isfinite(logits.amax(dim=1))
        num_tops = self._num_tops[slots]
        asking = np.flatnonzero(num_tops >= 0)
        models_own = logits[self._to_device(asking)] if len(asking) > 0 else None
        penalised = np.flatnonzero(self._has_penalties[slots])
        if len(penalised) > 0:
            self._penalise(logits, penalised, slots[penalised])
        self._rules.add_bias(logits, slots)
        self._rules.restrict(logits, slots, masks)
        token_ids = self._draw(logits, slots, positions)
        self.last_ids[self._to_device(slots)] = token_ids
        self._append(slots, token_ids)
        log_probs = None
        if models_own is not None:
            log_probs = measure(models_own, token_ids[self._to_device(asking)], int(num_tops.max()))
        return Draw(token_ids, is_finite, log_probs, num_tops)

    def _append(self, slots: npt.NDArray[np.int64], token_ids: torch.Tensor) -> None:
        self._rules.append(slots, token_ids)
        penalised = np.flatnonzero(self._has_penalties[slots])
        if len(penalised) > 0:
            its_slots, its_ids = self._to_device(slots[penalised]), token_ids[self._to_device(penalised)]
            self._is_seen[its_slots, its_ids] = True
            self._output_counts[its_slots, its_ids] += 1

    def _penalise(self, logits: torch.Tensor, rows: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
        for block in row_blocks(len(rows), self._vocab_size):
            device_rows, device_slots = self._to_device(rows[block]), self._to_device(slots[block])
            repetition = self._column(self._repetition_penalty, slots[block])
            presence = self._column(self._presence_penalty, slots[block])
            frequency = self._column(self._frequency_penalty, slots[block])
            x = logits[device_rows].double()
            counts = self._output_counts[device_slots]
            x = torch.where(self._is_seen[device_slots], torch.where(x > 0, x / repetition, x * repetition), x)
            x -= (counts > 0) * presence + counts * frequency
            logits[device_rows] = x.clamp_(-_FP32_MAX, _FP32_MAX).float()

    def _draw(
        self, logits: torch.Tensor, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        is_random = self._temperature[slots] > 0.0
        is_filtered = (self._top_k[slots] < self._vocab_size) | (self._top_p[slots] < 1.0) | (self._min_p[slots] > 0.0)
        if not is_random.any():
            return logits.argmax(dim=1)  # the first, so the lowest id, of equals
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        for rows, draw in (
            (np.flatnonzero(~is_random), None),
            (np.flatnonzero(is_random & ~is_filtered), self._draw_from_all),
            (np.flatnonzero(is_random & is_filtered), self._draw_filtered),
        ):
            for block in row_blocks(len(rows), self._vocab_size):
                device_rows = self._to_device(rows[block])
                its_logits, its_slots = logits[device_rows], slots[rows[block]]
                if draw is None:
                    token_ids[device_rows] = its_logits.argmax(dim=1)
                else:
                    keys = self._to_device(row_keys(self._seed[its_slots], positions[rows[block]]))
                    token_ids[device_rows] = draw(its_logits, its_slots, keys)
        return token_ids

    def _draw_from_all(self, logits: torch.Tensor, slots: npt.NDArray[np.int64], keys: torch.Tensor) -> torch.Tensor:
        noise = gumbel_noise(keys, torch.arange(self._vocab_size, device=self._device))
        return noise.add_(logits.double() / self._column(self._temperature, slots)).argmax(dim=1)

    def _draw_filtered(self, logits: torch.Tensor, slots: npt.NDArray[np.int64], keys: torch.Tensor) -> torch.Tensor:
        filters = Filters(self._top_k[slots], self._top_p[slots], self._min_p[slots])
        kept = filter_candidates(logits, self._column(self._temperature, slots)[:, 0], filters)
        winners = (kept.scores + gumbel_noise(keys, kept.ids)).argmax(dim=1, keepdim=True)
        return kept.ids.gather(1, winners)[:, 0]

    def _column(self, values: npt.NDArray[np.float64], slots: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values[slots]).to(self._device).unsqueeze(1)

    def _to_device(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
