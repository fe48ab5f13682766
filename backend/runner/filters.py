"""Top-k, top-p and min-p: how many of the most likely tokens a row may draw from, and which those are.

All three keep a prefix of the tokens sorted by falling probability (lowest id first among equals), so they amount to
one number per row. Probabilities are added as integers, in units of 2^-44 of the largest: integer sums do not depend
on order, so neither the row's neighbours, nor padding, nor the device changes where a prefix ends.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
import torch

_FIXED_POINT = 2.0**44
"""Units of the largest probability; with at most 2^18 tokens every sum stays below 2^63."""
_FIRST_NUM_CANDIDATES = 128
_CANDIDATE_GROWTH = 16


@dataclass(frozen=True, slots=True)
class Filters:
    """Per row, on the host: top_k [S] int64, V when off; top_p [S] FP64, 1 when off; min_p [S] FP64, 0 when off."""

    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The most likely tokens of each row, in falling order: ids [S, n] int64; scores [S, n] FP64, -inf where
    filtered."""

    ids: torch.Tensor
    scores: torch.Tensor


def filter_candidates(logits: torch.Tensor, temperatures: torch.Tensor, filters: Filters) -> Candidates:
    """Keep of each row of logits [S, V] FP32 over temperatures [S] FP64 what passes top-k, then top-p, then min-p.

    top-p keeps the smallest prefix whose share of what top-k left reaches top_p; min-p keeps what has at least min_p
    times the largest probability. At least one token is kept.
    """
    vocab_size = logits.shape[1]
    scores = logits.double().div_(temperatures.unsqueeze(1))
    largest = scores.amax(dim=1, keepdim=True)
    total = _weights(scores, largest).sum(dim=1, keepdim=True)
    keys = _sort_keys(logits)
    # top-p takes its share of what top-k left, so the first look must hold all of that.
    shares = filters.top_k[(filters.top_k < vocab_size) & (filters.top_p < 1.0)]
    num_candidates = min(max(_FIRST_NUM_CANDIDATES, int(shares.max(initial=1))), vocab_size)
    top_k, top_p, min_p = (torch.from_numpy(a).to(logits.device).unsqueeze(1) for a in astuple(filters))
    while True:
        ids = _ids_of(torch.topk(keys, num_candidates, dim=1).values, vocab_size)
        sorted_scores = scores.gather(1, ids)
        weights = _weights(sorted_scores, largest)
        reached = weights.cumsum(dim=1)
        share_of = torch.where(top_k < vocab_size, reached.gather(1, top_k.clamp(max=num_candidates) - 1), total)
        is_in_top_k = torch.arange(num_candidates, device=logits.device) < top_k
        is_in_top_p = ((reached - weights).double() < share_of.double() * top_p) | (top_p >= 1.0)
        is_in_min_p = torch.exp(sorted_scores - largest) >= min_p
        is_kept = is_in_top_k & is_in_top_p & is_in_min_p
        if num_candidates == vocab_size or not bool(is_kept[:, -1].any()):
            return Candidates(ids, sorted_scores.masked_fill_(~is_kept, -torch.inf))
        num_candidates = min(num_candidates * _CANDIDATE_GROWTH, vocab_size)  # some prefix reaches further: look again


def _weights(scores: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return torch.exp(scores - largest).mul_(_FIXED_POINT).long()


def most_likely_ids(logits: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Ids [S, num_ids] int64 of the largest of logits [S, V] FP32, falling, the lowest id first among equals."""
    return _ids_of(torch.topk(_sort_keys(logits), num_ids, dim=1).values, logits.shape[1])


def _sort_keys(logits: torch.Tensor) -> torch.Tensor:
    """int64 keys [S, V] that order like the FP32 logits, and by falling id among equals, so that no two are equal."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: no negative zero
    # FP32 compares like its bits, but for negative numbers reversed. In place, because new memory is what costs here.
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    falling_ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return keys.bitwise_left_shift_(32).bitwise_or_(falling_ids)


def _ids_of(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return (vocab_size - 1) - (keys & 0xFFFFFFFF)
