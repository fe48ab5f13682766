"""Drives a runner through any sequence of steps and keeps the logits that each sampled id came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from backend.engine.plan import PAGE_TOKENS, PageCopy, PlanRow, SlotStart, StepPlan, TokenLogProbs
from backend.engine.request import SamplingParams
from backend.runner.cuda.drawing import Drawn, StepDraw
from backend.runner.cuda.runner import CudaRunner
from backend.runner.cuda.staging import StepMemory
from backend.runner.model_runner import Mask
from backend.runner.sampler import Draw, Sampler
from backend.runner.torch_runner import TorchRunner
from backend.runner.work_items import IntArray

GREEDY = SamplingParams()
Runner = TypeVar("Runner", TorchRunner, CudaRunner)


@dataclass(eq=False)
class Script:
    """One sequence: its prompt in chunks, then decode steps until `num_outputs` ids are there; and what came out.

    `num_prompt_tokens`: only so many of `prompt` are the sequence's prompt, the others are outputs that were forced; 0: all.
    `is_every_chunk_sampled`: each chunk's last token is sampled, as if the prompt's rest were forced. `num_cached`: the
    first tokens of the prompt whose KV is in `pages` already. `num_outputs` 0: the prompt is only scored.
    """

    prompt: tuple[int, ...]
    num_outputs: int = 1
    params: SamplingParams = GREEDY
    chunks: tuple[int, ...] = ()
    slot: int = 0
    pages: tuple[int, ...] = ()
    min_tokens: int = 0
    ending_ids: tuple[int, ...] = ()
    is_every_chunk_sampled: bool = False
    num_cached: int = 0
    num_prompt_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    log_probs: list[TokenLogProbs | None] = field(default_factory=list)
    prompt_log_probs: list[TokenLogProbs] = field(default_factory=list)
    num_computed: int = 0
    num_chunks_done: int = 0

    def __post_init__(self) -> None:
        self.num_computed = self.num_cached

    @property
    def is_finished(self) -> bool:
        return self.num_computed >= len(self.prompt) + max(self.num_outputs - 1, 0)

    def next_row(self) -> PlanRow:
        start, end = self.num_computed, self.num_computed + 1
        is_prefill = start < len(self.prompt)
        if is_prefill:
            chunks = self.chunks or (len(self.prompt) - self.num_cached,)
            end = start + chunks[self.num_chunks_done]
            self.num_chunks_done += 1
        self.num_computed = end
        return PlanRow(
            slot=self.slot,
            start=start,
            num_tokens=end - start,
            token_ids=self.prompt[start:end] if is_prefill else (),
            page_ids=self.pages[: -(-end // PAGE_TOKENS)],
            is_sampled=(end >= len(self.prompt) and self.num_outputs > 0) or self.is_every_chunk_sampled,
            slot_start=self._slot_start() if start == self.num_cached else None,
            num_prompt_logprobs=self.num_prompt_logprobs if is_prefill else None,
        )

    def _slot_start(self) -> SlotStart:
        prompt = self.prompt[: self.num_prompt_tokens or None]
        return SlotStart(self.params, prompt, self.min_tokens, self.ending_ids, self.num_logprobs)

    @property
    def num_pages(self) -> int:
        return -(-(len(self.prompt) + self.num_outputs) // PAGE_TOKENS)


class Driver(Generic[Runner]):
    """Runs Scripts on a runner, whose draw is tapped for the logits."""

    def __init__(self, runner: Runner) -> None:
        self.runner: Runner = runner
        self._kept: list[torch.Tensor] = []
        self._step = 0
        if isinstance(runner, TorchRunner):
            self._tap_sampler(runner)
        else:
            self._tap_drawer(runner)

    def _tap_sampler(self, runner: TorchRunner) -> None:
        sample = runner._sampler.sample

        def keep(
            logits: torch.Tensor,
            slots: IntArray,
            positions: IntArray,
            masks: Mapping[int, Mask],
        ) -> Draw:
            self._kept = list(logits.clone())
            return sample(logits, slots, positions, masks)

        runner._sampler.sample = keep  # type: ignore[method-assign]
        assert isinstance(runner._sampler, Sampler)

    def _tap_drawer(self, runner: CudaRunner) -> None:
        collect = runner._drawer.collect

        def keep(draw: StepDraw, memory: StepMemory) -> Drawn:
            self._kept = list(runner._drawer._logits[: len(draw.slots)].clone())
            return collect(draw, memory)

        runner._drawer.collect = keep  # type: ignore[method-assign]

    def run(
        self,
        scripts: list[Script],
        choose: Callable[[list[Script]], list[Script]] = lambda active: active,
        move: Callable[[list[Script], list[Script]], tuple[PageCopy, ...]] = lambda chosen, resting: (),
    ) -> None:
        """Step until all are finished; `choose` says which of the unfinished run in the next step, in which order.

        `move` says what is copied before that, and changes the pages of the scripts.
        """
        while active := [script for script in scripts if not script.is_finished]:
            chosen = choose(active)
            copies = move(chosen, [script for script in active if script not in chosen])
            rows = tuple(script.next_row() for script in chosen)
            step = self.runner.launch(StepPlan(self._step, rows, copies))
            step.draw({})
            result = step.result()
            self._step += 1
            sampled = [script for script, row in zip(chosen, rows, strict=True) if row.is_sampled]
            assert len(sampled) == len(result.token_ids) == len(self._kept)
            log_probs = result.log_probs or (None,) * len(sampled)
            for script, token_id, log_prob, logits in zip(
                sampled, result.token_ids, log_probs, self._kept, strict=True
            ):
                script.token_ids.append(token_id)
                script.log_probs.append(log_prob)
                script.logits.append(logits)
            scored = [script for script, row in zip(chosen, rows, strict=True) if row.num_prompt_logprobs is not None]
            for script, scores in zip(scored, result.prompt_log_probs, strict=True):
                script.prompt_log_probs += scores

    def alone(self, script: Script) -> Script:
        """The same sequence by itself: prompt in one chunk, pages from 0."""
        copy = Script(
            script.prompt,
            script.num_outputs,
            script.params,
            min_tokens=script.min_tokens,
            ending_ids=script.ending_ids,
            num_logprobs=script.num_logprobs,
            num_prompt_logprobs=script.num_prompt_logprobs,
        )
        copy.pages = tuple(range(copy.num_pages))
        self.run([copy])
        return copy


def random_prompt(generator: np.random.Generator, length: int, vocab_size: int = 512) -> tuple[int, ...]:
    return tuple(generator.integers(0, vocab_size, length).tolist())
