"""How many rows of logits are worked on at once where each needs temporary memory of several times its size."""

from __future__ import annotations

_MAX_ELEMENTS = 2**20
"""8 rows of Mistral NeMo's vocabulary: 8 MB for an FP64 copy, so that memory does not grow with the number of rows."""


def row_blocks(num_rows: int, vocab_size: int) -> list[slice]:
    """Slices of 0 to `num_rows` - 1, each so long that its logits stay within the bound, at least one row.

    >>> row_blocks(3, 524288)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    size = max(1, _MAX_ELEMENTS // vocab_size)
    return [slice(first, first + size) for first in range(0, num_rows, size)]
