"""What requests add to their logits and what they forbid: bias, bad words, endings before their time, a grammar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backend.engine.plan import SlotStart
from backend.runner.model_runner import Mask
from backend.runner.row_blocks import row_blocks
from backend.runner.work_items import IntArray

_WORD_BITS = 32
_ANY_ID = -1
"""In a prefix: matches whatever stands there. In the recent ids: nothing stands there."""


@dataclass(frozen=True, slots=True)
class _BadWords:
    """n words: `last_ids` [n], and `prefixes` [n, W], the ids before them, right-aligned behind _ANY_ID."""

    prefixes: IntArray
    last_ids: IntArray


class LogitRules:
    """Per slot: bias, bad words and endings, and as much of the output as these depend on.

    A slot without a rule costs nothing. The ids of an output stay on the device, because the host does not know them
    yet when the next step is drawn.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._has_bias = np.zeros(num_slots, dtype=bool)
        self._bias_ids: list[IntArray] = [_no_ids()] * num_slots
        self._bias_values: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * num_slots
        self._has_bad_words = np.zeros(num_slots, dtype=bool)
        self._bad_words = [_parse_bad_words(())] * num_slots
        self._has_prefixes = np.zeros(num_slots, dtype=bool)
        self._recent_ids = torch.zeros(num_slots, 0, dtype=torch.int64, device=device)  # widened when a word needs it
        self._min_tokens = np.zeros(num_slots, dtype=np.int64)
        self._ending_ids = [_no_ids()] * num_slots
        self._num_outputs = np.zeros(num_slots, dtype=np.int64)

    def start(self, slot: int, start: SlotStart) -> None:
        """Begin a sequence in `slot`, forgetting the one before."""
        biases: dict[int, float] = {}
        for token_id, value in start.sampling.logit_bias:
            biases[token_id] = biases.get(token_id, 0.0) + value
        self._has_bias[slot] = len(biases) > 0
        self._bias_ids[slot] = np.array(list(biases), dtype=np.int64)
        self._bias_values[slot] = np.array(list(biases.values()), dtype=np.float32)
        words = _parse_bad_words(start.sampling.bad_words)
        num_prefix_ids = words.prefixes.shape[1]
        self._has_bad_words[slot] = len(words.last_ids) > 0
        self._bad_words[slot] = words
        self._has_prefixes[slot] = num_prefix_ids > 0
        if num_prefix_ids > 0:
            num_new = max(0, num_prefix_ids - self._recent_ids.shape[1])
            self._recent_ids = torch.nn.functional.pad(self._recent_ids, (num_new, 0), value=_ANY_ID)
            self._recent_ids[slot] = _ANY_ID
        self._min_tokens[slot] = start.min_tokens if start.ending_ids else 0
        self._ending_ids[slot] = np.array(start.ending_ids, dtype=np.int64)
        self._num_outputs[slot] = 0

    def append(self, slots: IntArray, token_ids: torch.Tensor) -> None:
        """Take over the next output id [S] int64 of each of `slots` [S]."""
        self._num_outputs[slots] += 1
        rows = np.flatnonzero(self._has_prefixes[slots])
        if len(rows) > 0:
            device_slots = self._to_device(slots[rows])
            before = self._recent_ids[device_slots]
            its_ids = token_ids[self._to_device(rows)].unsqueeze(1)
            self._recent_ids[device_slots] = torch.cat((before[:, 1:], its_ids), dim=1)

    def add_bias(self, logits: torch.Tensor, slots: IntArray) -> None:
        """Add the bias of `slots` [S] to logits [S, V], in place."""
        rows = np.flatnonzero(self._has_bias[slots])
        if len(rows) > 0:
            ids = [self._bias_ids[slot] for slot in slots[rows]]
            values = np.concatenate([self._bias_values[slot] for slot in slots[rows]])
            _add(logits, np.repeat(rows, [len(a) for a in ids]), np.concatenate(ids), self._to_device(values))

    def restrict(self, logits: torch.Tensor, slots: IntArray, masks: Mapping[int, Mask]) -> None:
        """Set to -inf in logits [S, V] what `slots` [S] must not draw, in place.

        Those are the ids that are not in the slot's mask, the last ids of bad words whose other ids end the output,
        and ending ids before `min_tokens`. When nothing is left, the largest logit that the mask allows stays (of all,
        where there is no mask): the grammar wins over bad words and over `min_tokens`.
        """
        masked = np.flatnonzero([slot in masks for slot in slots]) if masks else _no_ids()
        assert len(masked) == len(masks), "a mask for a slot that draws nothing"
        for block in row_blocks(len(masked), self._vocab_size):
            allowed = self._allowed([masks[slot] for slot in slots[masked[block]].tolist()])
            rows = self._to_device(masked[block])
            logits[rows] = torch.where(allowed, logits[rows], -torch.inf)
        is_early = self._num_outputs[slots] < self._min_tokens[slots]
        forbidding = np.flatnonzero(is_early | self._has_bad_words[slots])
        if len(forbidding) > 0:
            at_risk = [row for row in forbidding if slots[row] in masks or self._may_forbid_all(slots[row])]
            rows = self._to_device(np.array(at_risk, dtype=np.int64))
            best_ids = logits[rows].argmax(dim=1)
            best = logits[rows, best_ids]
            self._forbid_endings(logits, slots, np.flatnonzero(is_early))
            self._forbid_bad_words(logits, slots, np.flatnonzero(self._has_bad_words[slots]))
            is_nothing_left = logits[rows].amax(dim=1) == -torch.inf
            logits[rows, best_ids] = torch.where(is_nothing_left, best, logits[rows, best_ids])

    def _may_forbid_all(self, slot: int) -> bool:
        return len(self._ending_ids[slot]) + len(self._bad_words[slot].last_ids) >= self._vocab_size

    def _forbid_endings(self, logits: torch.Tensor, slots: IntArray, rows: IntArray) -> None:
        if len(rows) > 0:
            ids = [self._ending_ids[slot] for slot in slots[rows]]
            values = torch.full((sum(map(len, ids)),), -torch.inf, device=self._device)
            _add(logits, np.repeat(rows, [len(a) for a in ids]), np.concatenate(ids), values)

    def _forbid_bad_words(self, logits: torch.Tensor, slots: IntArray, rows: IntArray) -> None:
        if len(rows) == 0:
            return
        words = [self._bad_words[slot] for slot in slots[rows]]
        counts = [len(w.last_ids) for w in words]
        width = max(w.prefixes.shape[1] for w in words)
        prefixes = self._to_device(np.concatenate([_widened(w.prefixes, width) for w in words]))
        recent = self._recent_ids[self._to_device(np.repeat(slots[rows], counts)), self._recent_ids.shape[1] - width :]
        is_matched = ((recent == prefixes) | (prefixes == _ANY_ID)).all(dim=1)
        values = torch.where(is_matched, -torch.inf, 0.0)
        _add(logits, np.repeat(rows, counts), np.concatenate([w.last_ids for w in words]), values)

    def _allowed(self, masks: list[Mask]) -> torch.Tensor:
        """Unpacked [n, V] bool; ids behind the end of a mask are not allowed."""
        words = np.zeros((len(masks), -(-self._vocab_size // _WORD_BITS)), dtype=np.int32)
        for row, mask in zip(words, masks, strict=True):
            num_words = min(len(row), len(mask))
            row[:num_words] = mask[:num_words]
        if num_last_bits := self._vocab_size % _WORD_BITS:
            words[:, -1] &= (1 << num_last_bits) - 1
        assert words.any(axis=1).all(), "a mask that allows nothing"
        bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=self._device)
        unpacked = (torch.from_numpy(words).to(self._device).unsqueeze(2) >> bits).bitwise_and_(1)
        return unpacked.bool().flatten(1)[:, : self._vocab_size]

    def _to_device(self, values: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _add(logits: torch.Tensor, rows: IntArray, ids: IntArray, values: torch.Tensor) -> None:
    """Add `values` [n] to logits [S, V] at `rows` [n], `ids` [n], in place.

    A place may come twice only with values 0 and -inf, whose sum does not depend on the order.
    """
    places = tuple(torch.from_numpy(a).to(logits.device) for a in (rows, ids))
    logits.index_put_(places, values, accumulate=True)


def _parse_bad_words(words: tuple[tuple[int, ...], ...]) -> _BadWords:
    width = max((len(word) - 1 for word in words), default=0)
    prefixes = np.full((len(words), width), _ANY_ID, dtype=np.int64)
    for row, word in zip(prefixes, words, strict=True):
        assert word, "a bad word without ids"
        if len(word) > 1:
            row[1 - len(word) :] = word[:-1]
    return _BadWords(prefixes, np.array([word[-1] for word in words], dtype=np.int64))


def _widened(prefixes: IntArray, width: int) -> IntArray:
    """`prefixes` [n, W] with so much of _ANY_ID before them that they are [n, width].

    >>> _widened(np.array([[7]]), 3)
    array([[-1, -1,  7]])
    """
    padding = ((0, 0), (width - prefixes.shape[1], 0))
    return np.pad(prefixes, padding, constant_values=_ANY_ID)


def _no_ids() -> IntArray:
    return np.zeros(0, dtype=np.int64)
