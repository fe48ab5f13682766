"""The ModelRunner on the project's kernels: Hopper GPUs, and the emulator of the tests."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.weight_loader import Progress, load_weights
from backend.checkpoint.weights import Weights
from backend.engine.plan import PAGE_TOKENS, PlanRow, StepPlan, StepResult, TokenLogProbs
from backend.errors import ConfigError, EngineFailure
from backend.phases import Phases
from backend.runner.cuda.activations import LinearInput
from backend.runner.cuda.attention import StepShape, attention_bytes, most_tiles, shape_of, tiles_of
from backend.runner.cuda.drawing import Drawer, Drawn, StepDraw, TokenScores
from backend.runner.cuda.graphs import DrawShape, HeadShape, Part, StepGraphs
from backend.runner.cuda.slot_state import SLOT_BYTES, SlotState
from backend.runner.cuda.staging import MAX_UPDATES, Staging, StepMemory, staging_bytes, to_device
from backend.runner.cuda.step_tokens import StepTokens, lay_out, step_widths
from backend.runner.cuda.transformer import CudaTransformer
from backend.runner.host_pages import HostPages
from backend.runner.kv_pages import KvPages
from backend.runner.memory_plan import PIECE_ROWS
from backend.runner.model_runner import Mask
from backend.runner.placement import choose_dtypes, describe_dtypes
from kernels.launch import Device
from kernels.scatter import scatter

_HEAD_DIM = 128
_SIZE_MULTIPLE = 128


def cuda_workspace_bytes(config: ModelConfig, max_num_seqs: int, max_model_len: int, max_step_tokens: int) -> int:
    """Bytes beside weights and KV pages, at most: logits and sampler state of every slot, a step's activations and attention."""
    max_pages = -(-max_model_len // PAGE_TOKENS)
    num_tiles = most_tiles(max_step_tokens, max_num_seqs, config.num_heads, config.num_kv_heads)
    # Logits, adjusted ones and histories.
    of_slots = max_num_seqs * (3 * 4 * config.vocab_size + 4 * max_pages + SLOT_BYTES)
    of_scores = 2 * 4 * PIECE_ROWS * config.vocab_size  # of a piece, and of the one before until it is there
    of_head = max(max_num_seqs, PIECE_ROWS) * (2 * config.hidden_size + 4 + 4)
    widest = max(config.hidden_size, config.query_size, config.ffn_size)
    row = 2 * (2 * config.hidden_size + 2 * config.query_size + 2 * config.kv_size + 2 * config.ffn_size) + 3 * widest
    angles = 4 * max_model_len * config.head_dim
    return (
        of_slots
        + of_scores
        + of_head
        + max_step_tokens * row
        + staging_bytes(max_step_tokens, max_num_seqs, num_tiles, -(-config.vocab_size // 32))
        + attention_bytes(config, max_step_tokens, max_pages)
        + angles
    )


class CudaStep:
    """A launched step, drawn by `draw`; the device may still run when both have returned."""

    def __init__(
        self,
        runner: CudaRunner,
        rows: tuple[PlanRow, ...],
        draw: StepDraw,
        memory: StepMemory,
        scores: tuple[list[TokenScores], ...],
    ) -> None:
        self._runner = runner
        self._rows = rows
        self._draw = draw
        self._memory = memory
        self._scores = scores
        self._drawn: Drawn | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether the ids are drawn, so that the next step may be launched."""
        return self._drawn is not None

    def draw(self, masks: Mapping[int, Mask]) -> None:
        """Draw once for each row with `is_sampled`, unless that is under way already."""
        assert self._drawn is None, "a step is drawn once"
        with torch.inference_mode():
            self._drawn = self._runner.draw(self._draw, self._memory, masks)

    def result(self) -> StepResult:
        """Wait for this step, not for one launched since; ids and log-probabilities.

        EngineFailure names the slots whose logits were NaN or infinite. LaunchError when a kernel failed.
        """
        assert self._drawn is not None, "a step is drawn before its result is asked for"
        self._drawn.wait()
        if broken := self._drawn.broken_slots():
            _refuse(broken, "in slot")
        return StepResult(self._drawn.token_ids(), self._drawn.log_probs(), self._prompt_log_probs())

    def _prompt_log_probs(self) -> tuple[tuple[TokenLogProbs, ...], ...]:
        if not self._scores:
            return ()
        found = tuple(tuple(score for piece in pieces for score in piece.for_plan()) for pieces in self._scores)
        asking = [row for row in self._rows if row.num_prompt_logprobs is not None]
        broken = [
            row.slot
            for row, scores in zip(asking, found, strict=True)
            if not all(score.log_prob == score.log_prob for score in scores)
        ]
        if broken:
            _refuse(broken, "in the prompt of slot")
        return found


class CudaRunner:
    """Owns weights, KV pages and sampler state of one model on one device.

    Every kernel's result for a row depends, bit for bit, on the row's own sequence alone, so ids and log-probabilities do too:
    they do not depend on what else runs, how a prompt is chunked, or where pages lie.

    All tokens of a step pass through the layers at once, prompts beside decodes.
    """

    caches_outputs = False  # generated tokens go through another kernel of attention than prompts

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        device: Device,
        *,
        weight_format: WeightFormat,
        kv_dtype: torch.dtype,
        num_pages: int,
        num_host_pages: int = 0,
        max_num_seqs: int,
        max_model_len: int,
        max_step_tokens: int,
    ) -> None:
        """Allocate everything that will ever be needed beside `weights`, which are in `weight_format` on the device."""
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.config = config
        self._device = device
        self._format = weight_format
        self._kv_dtype = kv_dtype
        place = device.torch_device
        with torch.inference_mode():
            scales = [(layer.kv_scales[0].item(), layer.kv_scales[1].item()) for layer in weights.layers]
            self.kv = KvPages(config, num_pages, device=place, dtype=kv_dtype, scales=scales)
            self._host_pages = HostPages(config, num_host_pages, self.kv)
            self._state = SlotState(max_num_seqs, config.vocab_size, -(-max_model_len // PAGE_TOKENS), place)
            self._staging = Staging(
                device,
                num_tiles={
                    width: most_tiles(width, max_num_seqs, config.num_heads, config.num_kv_heads)
                    for width in step_widths(max_step_tokens)
                },
                max_sampled=max_num_seqs,
                mask_words=-(-config.vocab_size // 32),
            )
            self._transformer = CudaTransformer(
                device, config, weights, self.kv, self._state, self._staging, max_model_len=max_model_len
            )
            self._drawer = Drawer(device, self._transformer, self._state, self._staging, config.vocab_size)
        self._graphs = StepGraphs(device, self._run)
        self._prompts: list[tuple[int, ...]] = [()] * max_num_seqs
        self._last_step: CudaStep | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        device: Device,
        *,
        weight_dtype: str = "auto",
        kv_dtype: str = "auto",
        head_dtype: str = "auto",
        progress: Progress | None = None,
        phases: Phases | None = None,
        **limits: int,
    ) -> CudaRunner:
        """Of a checkpoint; ConfigError when it cannot be read, or the kernels do not serve its sizes or a dtype.

        `limits`: num_pages, num_host_pages, max_num_seqs, max_model_len, max_step_tokens. `phases` is told when the weights are
        there.
        """
        config = read_model_config(folder)
        _check_sizes(config)
        kept, kv = choose_dtypes(
            torch.bfloat16, torch.float8_e4m3fn, weight_dtype, kv_dtype, head_dtype, config.quantization
        )
        if kept.dense != torch.bfloat16 or kv == torch.float32:
            raise ConfigError(
                f"runner cuda: weight_dtype and kv_dtype must be bf16 or fp8, got {weight_dtype}, {kv_dtype}"
            )
        with torch.inference_mode():
            weights = load_weights(folder, config, device=device.torch_device, weight_format=kept, progress=progress)
        if phases is not None:
            phases.end("weights")
        return cls(config, weights, device, weight_format=kept, kv_dtype=kv, **limits)

    def launch(self, plan: StepPlan) -> CudaStep:
        """Copy pages and run the forward pass of all tokens; the step before must have been drawn.

        A step of generated tokens alone, each of them sampled and none guided, is one graph, its draw included.
        """
        assert 0 < plan.num_tokens <= self.max_step_tokens, f"{plan.num_tokens} tokens in a step"
        assert self._last_step is None or self._last_step.is_drawn, "the step before was not drawn"
        with torch.inference_mode():
            self._host_pages.run(plan.copies)
            for row in plan.single_rows:
                if row.slot_start is not None:
                    self._state.start(row.slot, row.slot_start)
                    self._prompts[row.slot] = row.slot_start.prompt_token_ids
                if row.num_forced:
                    self._state.force(row.slot, to_device(self._device, row.forced_ids))
            self._state.set_pages(plan)
            tokens = lay_out(plan, self._prompts)
            shape = shape_of(tokens, self.max_step_tokens)
            guided = [row.slot for row in plan.single_rows if row.is_guided and row.is_sampled]
            is_one_graph = tokens.are_all_sampled and not tokens.chunks and not guided
            draw = self._draw_of(tokens, guided, is_launched=is_one_graph)
            memory = self._staging.begin()
            self._upload(memory, tokens, shape, draw)
            width = self._drawer.width_for(len(draw.slots)) if draw.slots else 0
            head = HeadShape(width, is_gathered=not is_one_graph)
            if is_one_graph:
                self._graphs.replay(shape, head, DrawShape(width))
            else:
                self._graphs.replay(shape)
                if draw.slots:
                    self._graphs.replay(head)
            scores = self._score(plan, tokens, self._transformer.hidden(shape))
        self._last_step = CudaStep(self, plan.single_rows, draw, memory, scores)
        return self._last_step

    def draw(self, draw: StepDraw, memory: StepMemory, masks: Mapping[int, Mask]) -> Drawn:
        """Draw for the step that was launched last, and start the copies of what comes out."""
        self._drawer.upload_masks(draw, memory, masks)
        if draw.slots and not draw.is_launched:
            self._graphs.replay(DrawShape(self._drawer.width_for(len(draw.slots))))
        return self._drawer.collect(draw, memory)

    def describe(self) -> dict[str, str]:
        """What runs here: runner, device, dtypes, and that results are batch-invariant."""
        return {
            "runner": "cuda",
            "device": str(self._device.torch_device),
            **describe_dtypes(self._format, self._kv_dtype, self.config.quantization),
            "batch_invariant": "yes, in the emulator; not yet run on hardware",
        }

    def close(self) -> None:
        """Free weights, pages and sampler state; the runner cannot be used afterwards. So too when it raises LaunchError."""
        try:
            with closing(self._host_pages):
                self._device.synchronize()
        finally:
            del (
                self._graphs,
                self._transformer,
                self._drawer,
                self._staging,
                self._host_pages,
                self._state,
                self._last_step,
                self.kv,
            )

    def _run(self, part: Part) -> None:
        match part:
            case StepShape():
                self._transformer.run(part)
            case HeadShape():
                self._drawer.run_head(part)
            case DrawShape():
                self._drawer.run_draw(part)

    def _draw_of(self, tokens: StepTokens, guided: list[int], *, is_launched: bool) -> StepDraw:
        num_tops = self._state.num_tops[tokens.sampled_slots]
        scored = np.flatnonzero(num_tops >= 0)
        return StepDraw(tokens.sampled_slots.tolist(), guided, scored.tolist(), num_tops[scored].tolist(), is_launched)

    def _upload(self, memory: StepMemory, tokens: StepTokens, shape: StepShape, draw: StepDraw) -> None:
        """Write what the device must know of the step, and start its copy."""
        inputs, of_tokens = memory.inputs, memory.tokens[shape.width]
        num_tokens, num_sampled = len(tokens.token_ids), len(tokens.sampled)
        inputs["num_tokens"][0] = num_tokens
        inputs["num_sampled"][0] = num_sampled
        of_tokens["token_ids"][:num_tokens] = tokens.token_ids
        of_tokens["slots"][:num_tokens] = tokens.slots
        of_tokens["positions"][:num_tokens] = tokens.positions
        of_tokens["lengths"][: tokens.num_generated] = tokens.positions[: tokens.num_generated] + 1
        of_tokens["lengths"][tokens.num_generated :] = 0
        inputs["head_rows"][:num_sampled] = tokens.sampled
        inputs["draw_slots"][:num_sampled] = tokens.sampled_slots
        inputs["draw_positions"][:num_sampled] = tokens.positions[tokens.sampled] + 1
        inputs["mask_rows"][:num_sampled] = -1
        for row, slot in enumerate(draw.guided_slots):
            inputs["mask_rows"][draw.slots.index(slot)] = row
        inputs["num_scored"][0] = len(draw.scored)
        inputs["scored_rows"][: len(draw.scored)] = draw.scored
        if tokens.chunks:
            tiles = tiles_of(tokens, self.config.num_heads, self.config.num_kv_heads)
            inputs["num_tiles"][0] = len(tiles)
            of_tokens["tiles"][: len(tiles)] = tiles
        updates = self._state.take_updates()
        if len(updates) > MAX_UPDATES:
            early, updates = updates[:-MAX_UPDATES], updates[-MAX_UPDATES:]
            scatter(
                self._device,
                updates=to_device(self._device, early),
                memory=self._state.memory,
                num_updates=to_device(self._device, [len(early)]),
            )
        of_tokens["updates"][: len(updates)] = updates
        self._staging.upload(memory, shape.width, len(updates))

    def _score(self, plan: StepPlan, tokens: StepTokens, hidden: LinearInput) -> tuple[list[TokenScores], ...]:
        if not tokens.scored:
            return ()
        asking = [row for row in plan.single_rows if row.num_prompt_logprobs is not None]
        return tuple(
            self._drawer.score(
                hidden,
                places,
                self._prompts[row.slot][row.start + 1 : row.start + 1 + len(places)],
                row.num_prompt_logprobs or 0,
            )
            for row, places in zip(asking, tokens.scored, strict=True)
        )


def _check_sizes(config: ModelConfig) -> None:
    if config.head_dim != _HEAD_DIM:
        raise ConfigError(
            f"runner cuda: head_dim must be {_HEAD_DIM}, found {config.head_dim}; runner torch serves any"
        )
    for name, value in (
        ("hidden size", config.hidden_size),
        ("FFN size", config.ffn_size),
        ("vocabulary", config.vocab_size),
    ):
        if value % _SIZE_MULTIPLE:
            raise ConfigError(
                f"runner cuda: the {name} must be a multiple of {_SIZE_MULTIPLE}, found {value}; runner torch serves any"
            )


def _refuse(slots: list[int], where: str) -> None:
    names = ", ".join(map(str, slots))
    raise EngineFailure(f"logits: must be finite, got NaN or infinity {where} {names}; are the weights damaged?")
