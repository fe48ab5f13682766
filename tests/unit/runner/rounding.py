"""How far the logits of CudaRunner and TorchRunner may lie apart, from the size of the roundings that only one of them makes.

Both compute the same function of the same weights, scales and FP8 pages. What the kernels store between them in BF16 and
TorchRunner keeps in FP32 is: q, k and v out of the linear layer, and again after the rotation; the outputs of o, gate_up and
down; the residual stream after each addition; the head's input. Attention rounds its weights, to BF16 or FP16. Each of these
moves a value by at most 2^-9 of itself (half a unit of 8 significant bits); orders of FP32 sums, and inverses in place of
quotients, move by some 2^-20, which is nothing beside it.

How such moves reach the logits depends on the weights: norms, softmax, and e4m3 roundings that tip over by 2^-4 of a value,
after which nothing is left of how small the move was (with moves of 2^-18 the logits of a tiny random model still lie half as
far apart). Worst cases of every layer multiplied exceed the logits themselves and bound nothing. So the model carries the
moves through itself: TorchRunner runs again with each of these values moved by the most that rounding may, 2^-9 of itself, up
or down by chance; real roundings are spread between zero and that, 0.4 of it root mean square.

CudaRunner's difference is, then, at most one more draw of such a run's. To exceed the largest of three would be no surprise,
twice that would: so the bounds are twice the largest that three runs show on the same tokens. They are measured, from
roundings of a derived size, and no worst case; nothing in them comes from CudaRunner. With BF16 weights they are sharp, and
hold all that the kernels have in common; with FP8 ones they are about the size of the quantisation's own error, and hold scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from backend.checkpoint.matrix import Matrix
from backend.runner.torch_runner import TorchRunner
from tests.unit.runner.driver import Driver, Script

LARGEST_MOVE = 2.0**-9
NUM_RUNS = 3


def move_values(runner: TorchRunner, seed: int) -> None:
    """From now on `runner` moves everything that the kernels round and it does not."""
    transformer = runner._transformer
    generator = torch.Generator().manual_seed(seed)
    linear, norm, weights = transformer._linear, transformer._norm, transformer._weights
    of_layers = {id(getattr(layer, name)): name for layer in weights.layers for name in ("qkv", "output")}

    def move(x: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator).float().mul_(2.0).sub_(1.0)
        return x.mul_(signs.mul_(LARGEST_MOVE).add_(1.0))

    def moving_linear(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        if matrix is weights.head:
            return linear(move(x) if matrix.scales is None else x, matrix)
        name = of_layers.get(id(matrix))
        # Attention weights that are rounded move what they are the weights of.
        result = move(linear(move(x) if name == "output" else x, matrix))
        return move(result) if name == "qkv" else result

    def moving_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # In place: it is the residual stream itself. The first of it are rows of the embedding, which are BF16.
        return norm(x if weight is weights.layers[0].attention_norm else move(x), weight)

    transformer._linear = moving_linear  # type: ignore[method-assign]
    transformer._norm = moving_norm  # type: ignore[method-assign]


@dataclass(frozen=True)
class Bound:
    """Of the difference of two logits: root mean square over the vocabulary at one step, and any single one."""

    rms: float
    largest: float

    @staticmethod
    def seen(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> Bound:
        """The largest there are between logits [steps, V] of several sequences."""
        error = torch.cat(tuple(actual)) - torch.cat(tuple(expected))
        return Bound(float(error.square().mean(dim=1).sqrt().max()), float(error.abs().max()))

    def holds(self, other: Bound) -> bool:
        """Whether the other stays within."""
        return other.rms <= self.rms and other.largest <= self.largest


def logits_and_bound(
    make_runner: Callable[[], TorchRunner], make_scripts: Callable[[], list[Script]]
) -> tuple[list[torch.Tensor], Bound]:
    """TorchRunner's logits [sampled rows, V] of each script, and the bound of what roundings may do to them."""

    def run(seed: int | None) -> list[torch.Tensor]:
        runner = make_runner()
        if seed is not None:
            move_values(runner, seed)
        scripts = make_scripts()
        Driver(runner).run(scripts)
        runner.close()
        return [torch.stack(script.logits) for script in scripts]

    expected = run(None)
    moved = [Bound.seen(run(seed), expected) for seed in range(NUM_RUNS)]
    return expected, Bound(2 * max(bound.rms for bound in moved), 2 * max(bound.largest for bound in moved))
