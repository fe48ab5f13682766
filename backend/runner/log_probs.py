"""Log-probabilities of the model's own logits, the rank of an id, and the most likely ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backend.engine.plan import TokenLogProbs
from backend.runner.filters import most_likely_ids
from backend.runner.row_blocks import row_blocks

_FIXED_POINT = 2.0**44
"""Units of the largest probability; with at most 2^18 tokens every sum stays below 2^63."""


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Of n ids, each at its place, on the device.

    `log_probs` [n] FP32, `ranks` [n] int64; of the k most likely ids there, in falling order, lowest id first among
    equals: `top_ids` [n, k] int64, `top_log_probs` [n, k] FP32.
    """

    log_probs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor

    def for_plan(self, num_tops: Sequence[int]) -> list[TokenLogProbs]:
        """On the host, place i with its first `num_tops[i]` most likely ids."""
        columns = (self.log_probs, self.ranks, self.top_ids, self.top_log_probs)
        return [
            TokenLogProbs(log_prob, rank, tuple(top_ids[:num_top]), tuple(top_log_probs[:num_top]))
            for log_prob, rank, top_ids, top_log_probs, num_top in zip(
                *(column.tolist() for column in columns), num_tops, strict=True
            )
        ]


def measure(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> LogProbs:
    """Log-softmax of logits [n, V] FP32 at `ids` [n] int64 and at the `num_top` most likely ids of each row.

    log p(i) = x_i - max x - log(sum of exp(x_j - max x)), natural; the sum is of integers in units of 2^-44, so that
    it does not depend on an order of additions: a row's result depends bit for bit on its own logits alone. The rank
    of an id is 1 + how many logits are greater than its own. A row that is not finite gives a log-probability that
    is not.
    """
    blocks = row_blocks(len(logits), logits.shape[1])
    parts = [_measure_block(logits[block], ids[block].unsqueeze(1), num_top) for block in blocks]
    return LogProbs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _measure_block(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    largest = logits.amax(dim=1, keepdim=True)
    sums = (logits - largest).exp_().mul_(_FIXED_POINT).long().sum(dim=1, keepdim=True)
    normaliser = largest.double() + sums.double().mul_(1.0 / _FIXED_POINT).log_()
    chosen = logits.gather(1, ids)
    ranks = (logits > chosen).sum(dim=1) + 1
    top_ids = most_likely_ids(logits, num_top) if num_top else ids[:, :0]
    log_probs, top_log_probs = ((x.double() - normaliser).float() for x in (chosen, logits.gather(1, top_ids)))
    return log_probs[:, 0], ranks, top_ids, top_log_probs
