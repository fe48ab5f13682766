"""What host and device tell each other of a step, through pinned memory that is allocated once and never waited for.

A step costs one copy to the device when it is launched, and one to the host when it is drawn; grammars and log-probabilities
cost one more each. A step is launched while the one before still runs, so there are two sets of host memory, used in turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backend.engine.request import MAX_LOGPROBS
from backend.runner.cuda.carving import Fields, carve, first_words, num_words
from backend.runner.model_runner import Mask
from kernels.launch import Device, Mark

MAX_UPDATES = 8192
"""Words of the slots' state that a step's own copy can change; more go before it."""
_NUM_STEPS = 2


def input_fields(max_sampled: int) -> Fields:
    """What the host says of any step. INT32.

    num_*: how many there are. Of each row that is sampled: head_rows, its place among the tokens; its slot, the position of
    its new id, and the row of its mask or -1. scored_rows: which of them also want log-probabilities.
    """
    counts = ("num_tokens", "num_tiles", "num_sampled", "num_scored", "num_updates")
    of_sampled = ("head_rows", "draw_slots", "draw_positions", "mask_rows", "scored_rows")
    return {
        **dict.fromkeys(counts, (torch.int32, (1,))),
        **dict.fromkeys(of_sampled, (torch.int32, (max_sampled,))),
    }


def token_fields(width: int, num_tiles: int) -> Fields:
    """What the host says besides of a step that runs in `width` rows, behind the `input_fields`. INT32.

    Of each token: id, or -1 - slot for the id last drawn in the slot; slot; position; length, the keys it sees if it is a
    generated token, else 0. tiles: of the prompts' attention. updates: (place, value) of words of the slots' state.
    """
    of_tokens = ("token_ids", "slots", "positions", "lengths")
    return {
        **dict.fromkeys(of_tokens, (torch.int32, (width,))),
        "tiles": (torch.int32, (num_tiles, 4)),
        "updates": (torch.int32, (MAX_UPDATES, 2)),
    }


def output_fields(max_sampled: int) -> Fields:
    """What the device says of a step: of each row that is sampled its id, and 1 if its logits are all finite; INT32."""
    return dict.fromkeys(("token_ids", "is_finite"), (torch.int32, (max_sampled,)))


def score_fields(num_rows: int, num_tops: int) -> Fields:
    """Log-probabilities of ids, their ranks, and the most likely ids with theirs."""
    return {
        "log_probs": (torch.float32, (num_rows,)),
        "ranks": (torch.int32, (num_rows,)),
        "top_ids": (torch.int32, (num_rows, num_tops)),
        "top_log_probs": (torch.float32, (num_rows, num_tops)),
    }


def staging_bytes(max_width: int, max_sampled: int, max_tiles: int, mask_words: int) -> int:
    """What Staging allocates on the device, whose widest steps have `max_tiles` tiles."""
    fields = (
        input_fields(max_sampled),
        token_fields(max_width, max_tiles),
        output_fields(max_sampled),
        score_fields(max_sampled, MAX_LOGPROBS),
    )
    return 4 * (sum(map(num_words, fields)) + max_sampled * mask_words)


class StepMemory:
    """Host memory of one step: the device is done with it when `mark` has passed. `num_uses` counts the steps it was for."""

    def __init__(
        self, device: Device, inputs: Fields, tokens: Mapping[int, Fields], max_sampled: int, mask_words: int
    ) -> None:
        """`inputs`, and behind them the `tokens` of each width."""

        def pinned(*shape: int) -> torch.Tensor:
            return device.pinned(*shape, dtype=torch.int32)

        first_token = num_words(inputs)
        self.input_words = pinned(first_token + num_words(tokens[max(tokens)]))
        self.inputs = _arrays(self.input_words, inputs)
        self.tokens = {width: _arrays(self.input_words[first_token:], fields) for width, fields in tokens.items()}
        self.output_words = pinned(num_words(output_fields(max_sampled)))
        self.outputs = carve(self.output_words, output_fields(max_sampled))
        self.score_words = pinned(num_words(score_fields(max_sampled, MAX_LOGPROBS)))
        self.masks = pinned(max_sampled, mask_words)
        self.mask_words: npt.NDArray[np.int32] = self.masks.numpy()
        self.mark: Mark | None = None
        self.num_uses = 0


class Staging:
    """The device's side, which graphs have the addresses of, and the host's, two steps of it.

    `inputs` lie in one place, and behind them the `tokens` of a width, as long as that is: so a narrow step's copy is short.
    """

    def __init__(self, device: Device, *, num_tiles: Mapping[int, int], max_sampled: int, mask_words: int) -> None:
        """For steps of these widths, each with its number of tiles at most; up to `max_sampled` tokens are sampled.

        `mask_words`: INT32 words of a mask.
        """
        self._device = device
        inputs = input_fields(max_sampled)
        tokens = {width: token_fields(width, number) for width, number in num_tiles.items()}
        first_token = num_words(inputs)
        self._first_updates = {width: first_token + first_words(fields)["updates"] for width, fields in tokens.items()}

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device.torch_device)

        self._input_words = zeros(first_token + num_words(tokens[max(tokens)]))
        self.inputs = carve(self._input_words, inputs)
        self.tokens = {width: carve(self._input_words[first_token:], fields) for width, fields in tokens.items()}
        self._output_words = zeros(num_words(output_fields(max_sampled)))
        self.outputs = carve(self._output_words, output_fields(max_sampled))
        self.score_words = zeros(num_words(score_fields(max_sampled, MAX_LOGPROBS)))
        self.masks = zeros(max_sampled, mask_words)
        self._steps = [StepMemory(device, inputs, tokens, max_sampled, mask_words) for _ in range(_NUM_STEPS)]
        self._num_begun = 0

    def begin(self) -> StepMemory:
        """Memory for the next step, whose results must be read before the step after the next begins."""
        memory = self._steps[self._num_begun % _NUM_STEPS]
        if memory.mark is not None:
            memory.mark.wait()  # Passed already where the results were read.
        memory.num_uses += 1
        self._num_begun += 1
        return memory

    def upload(self, memory: StepMemory, width: int, num_updates: int) -> None:
        """Start the copy of what is said of a step that runs in `width` rows; of the updates only those there are."""
        end = self._first_updates[width] + 2 * num_updates
        memory.inputs["num_updates"][0] = num_updates
        self._input_words[:end].copy_(memory.input_words[:end], non_blocking=True)

    def upload_masks(self, memory: StepMemory, masks: list[Mask | None]) -> None:
        """Start the copy of the rows' masks, None for a row that may draw any id."""
        for row, mask in enumerate(masks):
            memory.mask_words[row] = -1 if mask is None else mask
        self.masks[: len(masks)].copy_(memory.masks[: len(masks)], non_blocking=True)

    def download(self, memory: StepMemory) -> None:
        """Start the copy of a step's outputs."""
        memory.output_words.copy_(self._output_words, non_blocking=True)

    def end(self, memory: StepMemory) -> Mark:
        """Nothing more is copied for the step: what was, is there when the mark has passed."""
        memory.mark = self._device.mark()
        return memory.mark


def _arrays(words: torch.Tensor, fields: Fields) -> dict[str, npt.NDArray[Any]]:
    return {name: view.numpy() for name, view in carve(words, fields).items()}


def to_device(device: Device, values: npt.ArrayLike) -> torch.Tensor:
    """INT32 values on the device, not waited for either, in memory of their own: for what few steps need."""
    source = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
    pinned = device.pinned(*source.shape, dtype=torch.int32).copy_(source)
    # torch keeps the pinned memory from others until the copy is over.
    return pinned.to(device.torch_device, non_blocking=True)
