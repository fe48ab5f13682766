"""Where K and V of a token lie, in Python: the same as `kv_layout.cuh`.

    pages [P, K, 64, 128], K and V apart, BF16 or e4m3

The row of token t of a page consists of 16-byte chunks (16 in BF16, 8 in e4m3); chunk c is stored as chunk c ^ (t & 7).
"""

from __future__ import annotations

import torch

PAGE_TOKENS = 64
HEAD_DIM = 128
_CHUNK_BYTES = 16


def stored_dimensions(dtype: torch.dtype) -> torch.Tensor:
    """[64, 128] INT64: at which place of its row each dimension of each token of a page is stored.

    >>> stored_dimensions(torch.bfloat16)[3, :17].tolist()  # chunk 0 as chunk 3, chunk 1 as chunk 2
    [24, 25, 26, 27, 28, 29, 30, 31, 16, 17, 18, 19, 20, 21, 22, 23, 8]
    """
    chunk_elements = _CHUNK_BYTES // dtype.itemsize
    dimensions = torch.arange(HEAD_DIM)
    tokens = torch.arange(PAGE_TOKENS).unsqueeze(1)
    return ((dimensions // chunk_elements) ^ (tokens & 7)) * chunk_elements + dimensions % chunk_elements


def unswizzled(pages: torch.Tensor) -> torch.Tensor:
    """pages [..., 64, 128] in the order of their dimensions; a new tensor of the same dtype."""
    places = stored_dimensions(pages.dtype).to(pages.device).expand(pages.shape)
    return _bits(pages).gather(-1, places).view(pages.dtype)


def swizzled(pages: torch.Tensor) -> torch.Tensor:
    """The reverse, which is the same exchange: pages [..., 64, 128] as the kernels store them."""
    return unswizzled(pages)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16)
