"""One piece of memory cut into tensors, so that one copy, or one kernel, reaches all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape, in the order in which they lie in memory."""
_WORD_BYTES = 4
# Kernels want every tensor at a multiple of 16 bytes.
_ALIGNMENT_WORDS = 4


def first_words(fields: Fields) -> dict[str, int]:
    """Name -> the word at which the field begins; "" -> the words of all.

    >>> first_words({"a": (torch.int32, (3,)), "b": (torch.float64, (2, 2)), "c": (torch.int32, ())})
    {'a': 0, 'b': 4, 'c': 12, '': 16}
    """
    firsts, end = {}, 0
    for name, (dtype, shape) in fields.items():
        firsts[name] = end
        num_words = -(-dtype.itemsize * math.prod(shape) // _WORD_BYTES)
        end += -(-num_words // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS
    return firsts | {"": end}


def num_words(fields: Fields) -> int:
    """Words of INT32 that `carve` wants."""
    return first_words(fields)[""]


def carve(memory: torch.Tensor, fields: Fields) -> dict[str, torch.Tensor]:
    """Views of `memory` [at least num_words] INT32, which must lie at a multiple of 16 bytes."""
    views = {}
    for name, first in list(first_words(fields).items())[:-1]:
        dtype, shape = fields[name]
        words = memory[first : first + dtype.itemsize * math.prod(shape) // _WORD_BYTES]
        views[name] = words.view(dtype).view(shape)
    return views
