"""The ModelRunner in PyTorch: any checkpoint, any device, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch

from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.weight_loader import Progress, load_weights
from backend.checkpoint.weights import Weights
from backend.engine.plan import PAGE_TOKENS, StepPlan, StepResult, TokenLogProbs
from backend.errors import ConfigError, EngineFailure
from backend.phases import Phases
from backend.runner.batch import Batch, build_batch
from backend.runner.gathered_attention import GatherSize
from backend.runner.host_pages import HostPages
from backend.runner.invariance import find_dependence
from backend.runner.kv_pages import KvPages
from backend.runner.model_runner import Mask
from backend.runner.placement import Arithmetic, choose_placement, default_num_threads, describe_dtypes
from backend.runner.prompt_scores import PromptScores, score_prompts
from backend.runner.rope import RopeTable
from backend.runner.sampler import Draw, Sampler
from backend.runner.transformer import Transformer
from backend.runner.work_items import CPU_SIZES, ItemSizes

_NOT_INVARIANT = "no: cuBLAS and scaled_dot_product_attention pick their kernels by shape"


class TorchStep:
    """A launched step; on a GPU it may still run until `result` reads what came out."""

    def __init__(self, sampler: Sampler, batch: Batch, logits: torch.Tensor, scores: PromptScores | None) -> None:
        self._sampler = sampler
        self._batch = batch
        self._logits: torch.Tensor | None = logits
        self._scores = scores
        self._draw: Draw | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether the ids are drawn, so that the next step may be launched."""
        return self._draw is not None

    def draw(self, masks: Mapping[int, Mask]) -> None:
        """Take the forced ids into the outputs, then draw once for each row with `is_sampled`."""
        assert self._logits is not None, "a step is drawn once"
        batch = self._batch
        with torch.inference_mode():
            for slot, ids in batch.forced:
                self._sampler.force(slot, ids)
            self._draw = self._sampler.sample(self._logits, batch.sampled_slots, batch.sampled_positions, masks)
        self._logits = None

    def result(self) -> StepResult:
        """Ids and log-probabilities. EngineFailure names the slots whose logits were NaN or infinite."""
        assert self._draw is not None, "a step is drawn before its result is asked for"
        is_finite = self._draw.is_finite.cpu().numpy()
        if not is_finite.all():
            slots = ", ".join(str(slot) for slot in self._batch.sampled_slots[~is_finite])
            raise EngineFailure(
                f"logits: must be finite, got NaN or infinity in slot {slots}; are the weights damaged?"
            )
        scores = () if self._scores is None else self._scores.for_plan()
        return StepResult(tuple(self._draw.token_ids.tolist()), self._log_probs(self._draw), scores)

    @staticmethod
    def _log_probs(draw: Draw) -> tuple[TokenLogProbs | None, ...]:
        if draw.log_probs is None:
            return ()
        wanted = iter(draw.log_probs.for_plan(draw.num_tops[draw.num_tops >= 0].tolist()))
        return tuple(next(wanted) if num_top >= 0 else None for num_top in draw.num_tops)


class TorchRunner:
    """Owns weights, KV pages and sampler state of one model on one device.

    On the CPU the ids of a sequence do not depend on what else runs, how its prompt is chunked or where its pages
    lie, bit for bit, on one type of machine with one number of threads; that the libraries keep to it is tried at
    start-up, and `describe()` says what was found. On a GPU it is not promised: ids may change with what runs beside, with
    chunks and prefix hits, where two logits are a rounding apart.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_pages: int,
        num_host_pages: int = 0,
        max_num_seqs: int,
        max_model_len: int,
        device: str = "auto",
        weight_dtype: str = "auto",
        kv_dtype: str = "auto",
        head_dtype: str = "auto",
        num_threads: int = 0,
        arithmetic: Arithmetic | None = None,
        progress: Progress | None = None,
        phases: Phases | None = None,
    ) -> None:
        """Read the checkpoint and allocate everything that will ever be needed; `phases` is told when the weights are there.

        `num_threads` 0 is `default_num_threads()`; it is PyTorch's number for the whole process. `arithmetic` None: the
        device's own. ConfigError when checkpoint, device or a dtype is not usable.
        """
        for name, value in (("num_pages", num_pages), ("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len)):
            if value < 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")
        if num_host_pages < 0:
            raise ConfigError(f"num_host_pages: must be at least 0, got {num_host_pages}")
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.max_num_seqs = max_num_seqs
        self.config: ModelConfig = read_model_config(folder)
        self._placement = choose_placement(
            device, weight_dtype, kv_dtype, head_dtype, self.config.quantization, arithmetic
        )
        is_tiled = self._placement.arithmetic.is_tiled
        self.caches_outputs = is_tiled
        self._num_threads = num_threads or default_num_threads()
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            weights = load_weights(
                folder,
                self.config,
                device=self._placement.device,
                weight_format=self._placement.weight_format,
                progress=progress,
            )
            if phases is not None:
                phases.end("weights")
            kv = KvPages(
                self.config,
                num_pages,
                device=self._placement.device,
                dtype=self._placement.kv_dtype,
                scales=[(layer.kv_scales[0].item(), layer.kv_scales[1].item()) for layer in weights.layers],
            )
            self._host_pages = HostPages(self.config, num_host_pages, kv)
            rope = RopeTable(self.config.head_dim, self.config.rope_theta, max_model_len, self._placement.device)
            self._invariance = _describe_invariance(weights, self.config) if is_tiled else _NOT_INVARIANT
            self._transformer = Transformer(self.config, weights, kv, rope, self._placement.arithmetic)
            self._sampler = Sampler(max_num_seqs, self.config.vocab_size, self._placement.device)
        max_pages = -(-max_model_len // PAGE_TOKENS)
        self._attention_sizes: ItemSizes | GatherSize = CPU_SIZES if is_tiled else GatherSize(max_pages)
        self._prompts: list[tuple[int, ...]] = [()] * max_num_seqs
        self._last_step: TorchStep | None = None

    def launch(self, plan: StepPlan) -> TorchStep:
        """Copy pages and run the forward pass of all tokens; the step before must have been drawn.

        Log-probabilities of prompts are taken here, those of drawn ids in `TorchStep.draw`.
        """
        self._check(plan)
        with torch.inference_mode():
            self._host_pages.run(plan.copies)
            for row in plan.single_rows:
                if row.slot_start is not None:
                    self._sampler.start(row.slot, row.slot_start)
                    self._prompts[row.slot] = row.slot_start.prompt_token_ids
            batch = build_batch(plan, self.config, self._sampler.last_ids, self._attention_sizes)
            hidden = self._transformer.hidden(batch)
            scores = score_prompts(plan, batch.first_tokens, self._prompts, hidden, self._transformer)
            logits = self._transformer.logits(hidden, batch.sampled_tokens)
        self._last_step = TorchStep(self._sampler, batch, logits, scores)
        return self._last_step

    def describe(self) -> dict[str, str]:
        """What runs here: runner, device, dtypes, threads, and whether results are batch-invariant, with the reason."""
        device = self._placement.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{self._num_threads} threads"
        return {
            "runner": "torch",
            "device": f"{device} ({name})",
            **describe_dtypes(self._placement.weight_format, self._placement.kv_dtype, self.config.quantization),
            **self._placement.arithmetic.describe(),
            "batch_invariant": self._invariance,
        }

    def close(self) -> None:
        """Free weights, pages and sampler state; the runner cannot be used afterwards. So too if the device has failed."""
        is_cuda = self._placement.device.type == "cuda"
        try:
            with closing(self._host_pages):
                if is_cuda:
                    torch.cuda.synchronize(self._placement.device)
        finally:
            del self._transformer, self._sampler, self._host_pages, self._last_step
        if is_cuda:
            torch.cuda.empty_cache()

    def _check(self, plan: StepPlan) -> None:
        assert plan.rows, "an empty step"
        assert self._last_step is None or self._last_step.is_drawn, "the step before was not drawn"
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot twice in one step"
        for row in plan.rows:
            assert 0 <= row.slot < self.max_num_seqs, row
            assert row.num_tokens == (len(row.token_ids) or 1), row
            assert row.num_forced == 0 or (row.num_forced < row.num_tokens and row.is_sampled), row


def _describe_invariance(weights: Weights, config: ModelConfig) -> str:
    layer = weights.layers[0]
    dependence = find_dependence((layer.qkv, layer.output, layer.gate_up, layer.down, weights.head), config.head_dim)
    return "yes" if dependence is None else f"no: {dependence}"
