"""What the kernels know of each slot: pages, sampling parameters, lists and history, on the device in the kernels' own form.

It lies in one memory. What the host changes of it between two steps is collected as words and their places (`take_updates`),
and `kernels.scatter` puts them there at the beginning of the next step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backend.engine.plan import SlotStart, StepPlan
from backend.engine.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from backend.runner.cuda.carving import Fields, carve, first_words, num_words
from kernels.sample import IN_PROMPT

_MAX_ENDINGS = MAX_STOP_TOKEN_IDS + 1
"""The stop ids of a request and the end of sequence."""
SLOT_BYTES = 4 * (2 * MAX_LOGIT_BIAS + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS + _MAX_ENDINGS + MAX_BAD_WORD_TOKENS + 32)
"""Bytes of a slot's state beside its history, which has 4 for every token of the vocabulary, and its pages, 4 for each."""
Int32Array = npt.NDArray[np.int32]
_WORD_BYTES = 4
_NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32, torch.float64: np.float64
}  # fmt: skip


def _fields(num_slots: int, vocab_size: int, max_pages: int) -> Fields:
    """By the names of `kernels.sample`'s arguments, and `page_tables`; the first dimension is the slot."""
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "reals": (torch.float64, (6,)),
        "integers": (torch.int64, (4,)),
        "counts": (torch.int32, (3,)),
        "bias_ids": (torch.int32, (MAX_LOGIT_BIAS,)),
        "bias_values": (torch.float32, (MAX_LOGIT_BIAS,)),
        "bad_words": (torch.int32, (MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)),
        "ending_ids": (torch.int32, (_MAX_ENDINGS,)),
        "histories": (torch.int32, (vocab_size,)),
        "num_outputs": (torch.int32, ()),
        "recent_ids": (torch.int32, (MAX_BAD_WORD_TOKENS - 1,)),
        "last_ids": (torch.int32, ()),
        "page_tables": (torch.int32, (max_pages,)),
    }
    return {name: (dtype, (num_slots, *shape)) for name, (dtype, shape) in sizes.items()}


class SlotState:
    """`start` and `set_pages` change a slot's state from the next `take_updates` on, `force` at once."""

    def __init__(self, num_slots: int, vocab_size: int, max_pages: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        fields = _fields(num_slots, vocab_size, max_pages)
        self.memory = torch.zeros(num_words(fields), dtype=torch.int32, device=device)
        self.tensors = carve(self.memory, fields)
        self.page_tables = self.tensors.pop("page_tables")
        self._firsts = first_words(fields)
        self._slot_words = {
            name: dtype.itemsize * int(np.prod(shape[1:])) // _WORD_BYTES for name, (dtype, shape) in fields.items()
        }
        self._dtypes = {name: _NUMPY_DTYPES[dtype] for name, (dtype, _) in fields.items()}
        self.num_tops = np.full(num_slots, -1, dtype=np.int64)
        self._known_pages: list[tuple[int, ...]] = [()] * num_slots
        self._steady_pages: tuple[tuple[int, ...], ...] = ()
        self._places: list[npt.NDArray[np.int64]] = []
        self._values: list[Int32Array] = []

    @property
    def last_ids(self) -> torch.Tensor:
        """[slots] INT32, the id last drawn in each."""
        return self.tensors["last_ids"]

    def start(self, slot: int, start: SlotStart) -> None:
        """Begin a sequence in `slot`, forgetting the one before."""
        params = start.sampling
        biases: dict[int, float] = {}
        for token_id, value in params.logit_bias:
            biases[token_id] = biases.get(token_id, 0.0) + value
        # The one kind of word that may follow the others is the longest: the kernel matches them from their ends.
        words = list(dict.fromkeys(params.bad_words))
        self._set("reals", slot, [
            params.temperature, params.top_p, params.min_p,
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
        ])  # fmt: skip
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size
        min_tokens = start.min_tokens if start.ending_ids else 0
        num_tops = -1 if start.num_logprobs is None else start.num_logprobs
        self._set("integers", slot, [int(np.uint64(params.seed).view(np.int64)), top_k, min_tokens, num_tops])
        self._set("counts", slot, [len(biases), len(words), len(start.ending_ids)])
        self._set("bias_ids", slot, list(biases))
        self._set("bias_values", slot, list(biases.values()))
        self._set("ending_ids", slot, start.ending_ids)
        self._set("bad_words", slot, [[-1] * (MAX_BAD_WORD_TOKENS - len(word)) + list(word) for word in words])
        self._set("recent_ids", slot, [-1] * (MAX_BAD_WORD_TOKENS - 1))
        self._set("num_outputs", slot, 0)
        self.num_tops[slot] = num_tops
        if params.has_penalties:
            self.tensors["histories"][slot].zero_()
            ids = np.unique(np.array(start.prompt_token_ids, dtype=np.int64))
            self._put(self._place("histories", slot) + ids, np.full(len(ids), IN_PROMPT, dtype=np.int32))

    def set_pages(self, plan: StepPlan) -> None:
        """Where the tokens of the plan's sequences lie; only what has changed is sent."""
        known_pages, steady = self._known_pages, plan.steady
        if steady.page_ids is not self._steady_pages:
            self._steady_pages = steady.page_ids
            for slot, page_ids in zip(steady.slots.tolist(), steady.page_ids, strict=True):
                if page_ids is not known_pages[slot]:
                    self._set_pages(slot, page_ids)
        for row in plan.single_rows:
            if row.page_ids is not known_pages[row.slot]:
                self._set_pages(row.slot, row.page_ids)

    def take_updates(self) -> Int32Array:
        """[n, 2], place and value of each word of `memory` that has changed since the last call; a place comes once."""
        if not self._places:
            return np.empty((0, 2), dtype=np.int32)
        updates = np.stack((np.concatenate(self._places), np.concatenate(self._values)), axis=1).astype(np.int32)
        self._places.clear()
        self._values.clear()
        return updates

    def force(self, slot: int, token_ids: torch.Tensor) -> None:
        """Take ids [n] INT32 into the output of `slot` as if each had been drawn; all but the last drawn id's own bookkeeping."""
        self.tensors["num_outputs"][slot] += len(token_ids)
        recent = self.tensors["recent_ids"][slot]
        recent.copy_(torch.cat((recent, token_ids))[len(token_ids) :].clone())
        self.tensors["histories"][slot].index_add_(0, token_ids.long(), torch.ones_like(token_ids))

    def _set_pages(self, slot: int, page_ids: tuple[int, ...]) -> None:
        known = self._known_pages[slot]
        first = len(known) if page_ids[: len(known)] == known else 0
        place = self._place("page_tables", slot)
        self._put(np.arange(place + first, place + len(page_ids)), np.array(page_ids[first:], dtype=np.int32))
        self._known_pages[slot] = page_ids

    def _set(self, name: str, slot: int, values: npt.ArrayLike) -> None:
        words = np.asarray(values, dtype=self._dtypes[name]).reshape(-1).view(np.int32)
        first = self._place(name, slot)
        self._put(np.arange(first, first + len(words)), words)

    def _place(self, name: str, slot: int) -> int:
        return self._firsts[name] + slot * self._slot_words[name]

    def _put(self, places: npt.NDArray[np.int64], values: Int32Array) -> None:
        self._places.append(places)
        self._values.append(values)
