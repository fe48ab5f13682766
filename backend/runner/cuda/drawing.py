"""The end of a step: logits of the rows that are sampled, the draw, and log-probabilities, by kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from backend.engine.plan import TokenLogProbs
from backend.runner.cuda.activations import LinearInput
from backend.runner.cuda.carving import carve, num_words
from backend.runner.cuda.graphs import DrawShape, HeadShape
from backend.runner.cuda.slot_state import SlotState
from backend.runner.cuda.staging import Staging, StepMemory, score_fields, to_device
from backend.runner.cuda.step_tokens import width_for
from backend.runner.cuda.transformer import CudaTransformer
from backend.runner.memory_plan import PIECE_ROWS
from backend.runner.model_runner import Mask
from kernels.gather_rows import gather_rows
from kernels.launch import Device, Mark
from kernels.log_probs import log_probs
from kernels.sample import make_workspace, sample


@dataclass(frozen=True, slots=True)
class StepDraw:
    """What is drawn at the end of a step, for rows in these `slots`.

    Those in `guided_slots`, in the order of their masks' rows, need a mask. `num_tops`: of each row in `scored`, which wants
    log-probabilities, the alternatives it wants. `is_launched`: the graph of the step draws already.
    """

    slots: Sequence[int]
    guided_slots: Sequence[int]
    scored: Sequence[int]
    num_tops: Sequence[int]
    is_launched: bool


class Drawn:
    """What was drawn for the rows of a step, on its way to the host: to be read when `wait` has returned."""

    def __init__(self, draw: StepDraw, memory: StepMemory, scores: TokenScores | None, mark: Mark) -> None:
        self._draw = draw
        self._memory = memory
        self._scores = scores
        self._mark = mark
        self._use = memory.num_uses

    def wait(self) -> None:
        """Until it is on the host. LaunchError when a kernel failed."""
        assert self._memory.num_uses == self._use, (
            "a later step has the memory of this one, whose result was not asked for"
        )
        self._mark.wait()

    def broken_slots(self) -> list[int]:
        """Slots of the rows whose logits are not all finite."""
        return [
            slot for slot, is_finite in zip(self._draw.slots, self._output("is_finite"), strict=True) if not is_finite
        ]

    def token_ids(self) -> tuple[int, ...]:
        """One id per row."""
        return tuple(self._output("token_ids"))

    def log_probs(self) -> tuple[TokenLogProbs | None, ...]:
        """Of the drawn ids, None where none was asked for; empty when nobody asked."""
        if self._scores is None:
            return ()
        found: list[TokenLogProbs | None] = [None] * len(self._draw.slots)
        for place, score in zip(self._draw.scored, self._scores.for_plan(), strict=True):
            found[place] = score
        return tuple(found)

    def _output(self, name: str) -> list[int]:
        values: list[int] = self._memory.outputs[name][: len(self._draw.slots)].tolist()
        return values


class TokenScores:
    """Log-probabilities of n ids, each with its `num_tops` most likely alternatives, on their way to the host as in Drawn."""

    def __init__(
        self,
        device: Device,
        logits: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        num_rows: torch.Tensor,
        num_tops: Sequence[int],
        words: torch.Tensor,
        host_words: torch.Tensor,
    ) -> None:
        """Measure logits [m, V] FP32 at ids [m] INT32, in rows [n] INT32 of both, as many as `num_rows` [1] INT32 counts.

        words, host_words: memory for the results on both sides, as `score_fields` says.
        """
        most = max(num_tops)
        self._num_tops = num_tops
        fields = score_fields(len(rows), most)
        found = carve(words, fields)
        log_probs(
            device,
            logits=logits,
            ids=ids,
            rows=rows,
            chosen_log_probs=found["log_probs"],
            ranks=found["ranks"],
            top_ids=found["top_ids"] if most else None,
            top_log_probs=found["top_log_probs"] if most else None,
            num_rows=num_rows,
        )
        end = num_words(fields)
        host_words[:end].copy_(words[:end], non_blocking=True)
        self._found = carve(host_words, fields)

    def for_plan(self) -> list[TokenLogProbs]:
        """As the engine takes them."""
        found = {name: tensor.tolist() for name, tensor in self._found.items()}
        return [
            TokenLogProbs(log_prob, rank, tuple(ids[:num_top]), tuple(its_log_probs[:num_top]))
            for log_prob, rank, ids, its_log_probs, num_top in zip(*found.values(), self._num_tops, strict=True)
        ]


class Drawer:
    """Owns the logits of a step's sampled rows and the workspace of the draw."""

    def __init__(
        self, device: Device, transformer: CudaTransformer, state: SlotState, staging: Staging, vocab_size: int
    ) -> None:
        """For as many rows as `staging` has room for."""
        self._device = device
        self._transformer = transformer
        self._state = state
        self._staging = staging
        self._vocab_size = vocab_size
        self._max_rows = len(staging.outputs["token_ids"])
        self._kept_rows = transformer.head_rows(max(self._max_rows, PIECE_ROWS))
        self._logits = torch.empty(self._max_rows, vocab_size, device=device.torch_device)
        self._piece_rows = torch.arange(PIECE_ROWS, dtype=torch.int32, device=device.torch_device)
        self._workspace = make_workspace(self._max_rows, vocab_size, device.torch_device)

    def width_for(self, num_rows: int) -> int:
        """The width of a head or a draw of `num_rows` rows."""
        return width_for(num_rows, self._max_rows)

    def run_head(self, shape: HeadShape) -> None:
        """Logits of the rows that are sampled, of the step that ran last."""
        inputs = self._staging.inputs
        if shape.is_gathered:
            rows = self._gathered(
                self._transformer.head_input, inputs["head_rows"][: shape.width], inputs["num_sampled"]
            )
        else:
            rows = self._transformer.head_input.first(shape.width)
        self._transformer.logits(rows, self._logits[: shape.width], inputs["num_sampled"])

    def run_draw(self, shape: DrawShape) -> None:
        """One id for each of these rows."""
        inputs, outputs = self._staging.inputs, self._staging.outputs
        rows = slice(shape.width)
        sample(
            self._device,
            logits=self._logits[rows],
            slots=inputs["draw_slots"][rows],
            positions=inputs["draw_positions"][rows],
            mask_rows=inputs["mask_rows"][rows],
            masks=self._staging.masks,
            **self._state.tensors,
            **{name: tensor[rows] for name, tensor in self._workspace.items()},
            token_ids=outputs["token_ids"][rows],
            is_finite=outputs["is_finite"][rows],
            num_rows=inputs["num_sampled"],
        )

    def upload_masks(self, draw: StepDraw, memory: StepMemory, masks: Mapping[int, Mask]) -> None:
        """Start the copy of the masks of a draw, before it runs; a slot without a mask may draw any id."""
        assert masks.keys() <= set(draw.guided_slots), f"masks of {sorted(masks)}, guided are {draw.guided_slots}"
        if draw.guided_slots:
            self._staging.upload_masks(memory, [masks.get(slot) for slot in draw.guided_slots])

    def collect(self, draw: StepDraw, memory: StepMemory) -> Drawn:
        """Start the copies of what was drawn."""
        scores = None
        if draw.scored:
            inputs = self._staging.inputs
            scores = TokenScores(
                self._device,
                self._logits,
                self._staging.outputs["token_ids"],
                inputs["scored_rows"][: len(draw.scored)],
                inputs["num_scored"],
                draw.num_tops,
                self._staging.score_words,
                memory.score_words,
            )
        if draw.slots:
            self._staging.download(memory)
        return Drawn(draw, memory, scores, self._staging.end(memory))

    def score(self, hidden: LinearInput, places: Sequence[int], ids: Sequence[int], num_top: int) -> list[TokenScores]:
        """Log-probabilities of given ids at `places` of `hidden`, in pieces that bound the logits held at once."""
        pieces = []
        for first in range(0, len(ids), PIECE_ROWS):
            piece = slice(first, first + PIECE_ROWS)
            num_rows = len(ids[piece])
            width = width_for(num_rows, PIECE_ROWS)
            padding = [0] * (width - num_rows)
            its_places, its_ids, count = (
                to_device(self._device, values)
                for values in ([*places[piece], *padding], [*ids[piece], *padding], [num_rows])
            )
            logits = torch.empty(width, self._vocab_size, device=its_ids.device)
            self._transformer.logits(self._gathered(hidden, its_places, count), logits, count)
            size = num_words(score_fields(num_rows, num_top))
            words = torch.empty(size, dtype=torch.int32, device=its_ids.device)
            host_words = self._device.pinned(size, dtype=torch.int32)
            rows, tops = self._piece_rows[:num_rows], [num_top] * num_rows
            pieces.append(TokenScores(self._device, logits, its_ids, rows, count, tops, words, host_words))
        return pieces

    def _gathered(self, hidden: LinearInput, places: torch.Tensor, num_rows: torch.Tensor) -> LinearInput:
        """Copies of the rows at `places` [n], of which `num_rows` count; they stand until the next call."""
        kept = self._kept_rows.first(len(places))
        gather_rows(
            self._device,
            x=hidden.values,
            scale=hidden.written_scale,
            rows=places,
            out=kept.values,
            out_scale=kept.written_scale,
            num_rows=num_rows,
        )
        return kept
