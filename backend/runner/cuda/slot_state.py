"""What the sampling kernel knows of each slot: parameters, lists and history, on the device in the kernel's own form."""

from __future__ import annotations

import numpy as np
import torch

from backend.engine.plan import SlotStart
from backend.engine.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from kernels.sample import IN_PROMPT

_MAX_ENDINGS = MAX_STOP_TOKEN_IDS + 1
"""The stop ids of a request and the end of sequence."""
SLOT_BYTES = 4 * (2 * MAX_LOGIT_BIAS + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS + _MAX_ENDINGS + MAX_BAD_WORD_TOKENS + 32)
"""Bytes of a slot's state beside its history, which has 4 for every token of the vocabulary."""


class SlotState:
    """Tensors by the names of `kernels.sample`'s arguments; `start` and `force` change the rows of one slot."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        self.tensors = {
            "reals": empty(6, dtype=torch.float64),
            "integers": empty(4, dtype=torch.int64),
            "counts": empty(3),
            "bias_ids": empty(MAX_LOGIT_BIAS),
            "bias_values": empty(MAX_LOGIT_BIAS, dtype=torch.float32),
            "bad_words": empty(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
            "ending_ids": empty(_MAX_ENDINGS),
            "histories": empty(vocab_size),
            "num_outputs": empty(),
            "recent_ids": empty(MAX_BAD_WORD_TOKENS - 1),
            "last_ids": empty(),
        }
        self.num_tops = np.full(num_slots, -1, dtype=np.int64)

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
        self._set("ending_ids", slot, list(start.ending_ids))
        if words:
            padded = [[-1] * (MAX_BAD_WORD_TOKENS - len(word)) + list(word) for word in words]
            self._set("bad_words", slot, padded)
        self.tensors["recent_ids"][slot] = -1
        self.tensors["num_outputs"][slot] = 0
        self.num_tops[slot] = num_tops
        if params.has_penalties:
            history = self.tensors["histories"][slot]
            history.zero_()
            history[torch.tensor(start.prompt_token_ids, device=history.device)] = IN_PROMPT

    def force(self, slot: int, token_ids: tuple[int, ...]) -> None:
        """Take ids into the output of `slot` as if each had been drawn; all but the last drawn id's own bookkeeping."""
        ids = torch.tensor(token_ids, dtype=torch.int32, device=self.last_ids.device)
        self.tensors["num_outputs"][slot] += len(token_ids)
        recent = self.tensors["recent_ids"][slot]
        recent.copy_(torch.cat((recent, ids))[len(token_ids) :].clone())
        self.tensors["histories"][slot].index_add_(0, ids.long(), torch.ones_like(ids))

    def _set(self, name: str, slot: int, values: list[float] | list[int] | list[list[int]]) -> None:
        tensor = self.tensors[name]
        if values:
            tensor[slot, : len(values)] = torch.tensor(values, dtype=tensor.dtype, device=tensor.device)
