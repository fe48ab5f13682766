"""The sizes of steps that come to every graph a server will need, so that all are captured before it is ready.

One after the other: a capture is host work of some hundred launches, and Python runs those of several threads no faster.
"""

from __future__ import annotations

from collections.abc import Iterator

from backend.runner.cuda.attention import SLICE_ROWS, num_slices
from backend.runner.cuda.step_tokens import step_widths
from backend.runner.warm_up import StepSize


def step_sizes(max_num_seqs: int, max_step_tokens: int) -> Iterator[StepSize]:
    """For each width, numbers of slices of generated tokens with and without prompts: a step for each shape there is.

    Generated tokens alone come twice: guided, as parts of a step that are captured one by one, and not, as a single graph.
    The last step has a shape that was there before, and an id that a grammar forces: PyTorch's kernels take it in.

    Without those that more generated tokens than sequences would take: a grammar that forces many ids in one step waits for the
    capture, once.

    >>> [(size.num_generated, size.num_prompt_tokens) for size in step_sizes(12, 16) if size.is_guided]
    [(0, 8), (8, 0), (7, 1), (0, 16), (12, 0), (11, 5), (1, 0)]
    >>> [(size.num_generated, size.num_prompt_tokens) for size in step_sizes(12, 16) if not size.is_guided]
    [(8, 0), (12, 0)]
    """
    narrower = 0
    for width in step_widths(max_step_tokens):
        most = min(max_num_seqs, width)
        yield StepSize(0, width)
        for slices in range(1, num_slices(most) + 1):
            num_generated = min(most, slices * SLICE_ROWS)
            if num_generated > narrower:
                yield StepSize(num_generated, 0)
                yield StepSize(num_generated, 0, is_guided=False)
            if width > 1:
                beside_prompts = min(num_generated, width - 1, max_num_seqs - 1)
                if num_slices(beside_prompts) == slices:
                    yield StepSize(beside_prompts, width - beside_prompts)
        narrower = width
    yield StepSize(1, 0, num_forced=1)
