"""What `sample` must draw, row by row with a full sort, in NumPy's FP64 and uint64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_FIXED_POINT = 2.0**44
_FP32_MAX = float(np.finfo(np.float32).max)
Logits = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]


def sample_reference(**inputs: Any) -> dict[str, torch.Tensor]:
    """Results and updated history of the arguments of `sample`.

    The kernel's logarithms and exponentials may differ from NumPy's in the last bit. That changes an id only when two
    scores are within about 1e-14 of each other, or the end of a top-p prefix within about 1e-13 of its share.
    """
    arrays = {name: value.numpy() for name, value in inputs.items()}
    results = {
        name: inputs[name].clone()
        for name in ("token_ids", "is_finite", "histories", "num_outputs", "recent_ids", "last_ids")
    }
    for row, slot in enumerate(inputs["slots"].tolist()):
        token_id = _draw(row, slot, arrays)
        results["token_ids"][row] = token_id
        results["is_finite"][row] = int(np.isfinite(arrays["logits"][row]).all())
        results["last_ids"][slot] = token_id
        results["num_outputs"][slot] += 1
        if _has_penalties(arrays["reals"][slot]):
            results["histories"][slot, token_id] += 1
        if arrays["counts"][slot, 1] > 0 and results["recent_ids"].shape[1] > 0:
            results["recent_ids"][slot] = torch.cat((results["recent_ids"][slot, 1:], torch.tensor([token_id])))
    return results


def gumbel_noise(seed: int, position: int, token_ids: npt.NDArray[np.int64]) -> Reals:
    """-log(-log(u)) of each id, u from SplitMix64 of seed, position and id (see noise.cuh)."""
    with np.errstate(over="ignore"):
        gamma = np.uint64(0x9E3779B97F4A7C15)
        key = _mix(_mix(np.array([seed]).astype(np.uint64) + gamma) + np.uint64(position + 1) * gamma)
        bits = _mix(key + (token_ids + 1).astype(np.uint64) * gamma)
    uniform: Reals = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: Reals = -np.log(-np.log(uniform))
    return noise


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(row: int, slot: int, arrays: dict[str, Any]) -> int:
    temperature, top_p, min_p = arrays["reals"][slot, :3].tolist()
    seed, top_k = arrays["integers"][slot, :2].tolist()
    x = _ruled(row, slot, arrays)
    if temperature == 0.0:
        return int(np.argmax(x))
    scores = x.astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(x)), -x))  # falling logit, the lowest id first among equals
    weights = np.floor(np.exp(scores[order] - scores.max()) * _FIXED_POINT).astype(np.int64)[:top_k]
    before = np.cumsum(weights) - weights
    num_kept = len(weights) if top_p >= 1.0 else int((before < float(weights.sum()) * top_p).sum())
    kept = order[:num_kept]
    kept = np.sort(kept[np.exp(scores[kept] - scores.max()) >= min_p])
    with np.errstate(invalid="ignore"):
        return int(kept[np.argmax(scores[kept] + gumbel_noise(seed, int(arrays["positions"][row]), kept))])


def _ruled(row: int, slot: int, arrays: dict[str, Any]) -> Logits:
    """The row's logits after penalties, bias and what is forbidden, NaN as -infinity."""
    x: Logits = arrays["logits"][row].copy()
    x[np.isnan(x)] = -np.inf
    num_biases, num_bad_words, num_endings = arrays["counts"][slot].tolist()
    if _has_penalties(arrays["reals"][slot]):
        x = _penalised(x, arrays["histories"][slot], *arrays["reals"][slot, 3:].tolist())
    for token_id, value in zip(arrays["bias_ids"][slot, :num_biases], arrays["bias_values"][slot], strict=False):
        x[token_id] += value
    if (mask_row := int(arrays["mask_rows"][row])) >= 0:
        bits = np.unpackbits(arrays["masks"][mask_row].view(np.uint8), bitorder="little")[: len(x)]
        x[bits == 0] = -np.inf
    best = int(np.argmax(x))
    best_logit = x[best]
    if arrays["num_outputs"][slot] < arrays["integers"][slot, 2]:
        x[arrays["ending_ids"][slot, :num_endings]] = -np.inf
    for word in arrays["bad_words"][slot, :num_bad_words]:
        prefix, recent = word[:-1], arrays["recent_ids"][slot]
        if ((prefix == recent) | (prefix < 0)).all():
            x[word[-1]] = -np.inf
    if (x == -np.inf).all():
        x[best] = best_logit if best_logit > -np.inf else 0.0  # some id is drawn even of what are no numbers
    return x


def _penalised(
    x: Logits, history: npt.NDArray[np.int32], repetition: float, presence: float, frequency: float
) -> Logits:
    counts = history & np.int32(0x7FFFFFFF)
    y = x.astype(np.float64)
    y = np.where(history != 0, np.where(y > 0, y / repetition, y * repetition), y)
    y -= (counts > 0) * presence + counts * frequency
    return np.clip(y, -_FP32_MAX, _FP32_MAX).astype(np.float32)


def _has_penalties(reals: Reals) -> bool:
    return bool((reals[3:] != (1.0, 0.0, 0.0)).any())
