"""Does this machine's arithmetic keep a row's bits independent of its neighbours? Asked at start-up, not assumed.

The runner's promise rests on three properties of the libraries under PyTorch that no documentation gives: in a
product of one fixed shape a row's sum does not depend on which row it is, in a batched product not on which item it
is, and exp and log do not depend on where in a vector a number stands. Each is tried on the shapes that will run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from backend.checkpoint.matrix import Matrix
from backend.engine.plan import PAGE_TOKENS
from backend.runner import work_items
from backend.runner.linear import TILE_ROWS, linear


def find_dependence(weights: Iterable[Matrix], head_dim: int) -> str | None:
    """What depends on a row's neighbours here, in words, or None: then results are batch-invariant.

    `weights`: one linear weight [outputs, inputs] of each shape that runs.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        if not _is_linear_invariant(weight, generator):
            return f"linear layers of shape {list(weight.shape)} round by row"
    if not _is_product_invariant(head_dim, generator):
        return "batched products round by item"
    if not _is_elementwise_invariant(generator):
        return "exp or log round by place"
    return None


def _is_linear_invariant(weight: Matrix, generator: torch.Generator) -> bool:
    x = torch.randn(TILE_ROWS, weight.shape[1], generator=generator)
    expected = linear(x, weight, is_tiled=True)
    alone = torch.zeros_like(x)
    alone[-1] = x[0]
    return (
        torch.equal(linear(x.flip(0), weight, is_tiled=True).flip(0), expected)
        and torch.equal(linear(x.roll(1, 0), weight, is_tiled=True).roll(-1, 0), expected)
        and torch.equal(linear(alone, weight, is_tiled=True)[-1], expected[0])
    )


def _is_product_invariant(head_dim: int, generator: torch.Generator) -> bool:
    num_items = work_items.CPU_SIZES.per_call
    queries = torch.randn(num_items, work_items.TILE_ROWS, head_dim, generator=generator)
    keys = torch.randn(num_items, PAGE_TOKENS, head_dim, generator=generator)
    scores = torch.randn(num_items, work_items.TILE_ROWS, PAGE_TOKENS, generator=generator)
    moved = [x.flip(0, 1) for x in (queries, scores)]
    return torch.equal(
        torch.bmm(moved[0], keys.flip(0).transpose(1, 2)).flip(0, 1), torch.bmm(queries, keys.transpose(1, 2))
    ) and torch.equal(torch.bmm(moved[1], keys.flip(0)).flip(0, 1), torch.bmm(scores, keys))


def _is_elementwise_invariant(generator: torch.Generator) -> bool:
    numbers = torch.rand(1021, generator=generator) * 20.0
    for dtype in (torch.float32, torch.float64):
        for function in (torch.exp, torch.log):
            x = numbers.to(dtype)
            expected = function(x)
            for shift in (1, 7, 40_000):
                if not torch.equal(function(torch.cat((x.new_ones(shift), x)))[shift:], expected):
                    return False
    return True
