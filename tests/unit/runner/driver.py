"""Drives a TorchRunner through any sequence of steps and keeps the logits that each sampled id came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from backend.engine.plan import PAGE_TOKENS, PlanRow, SlotStart, StepPlan
from backend.engine.request import SamplingParams
from backend.runner.sampler import Draw, Sampler
from backend.runner.torch_runner import TorchRunner

GREEDY = SamplingParams()


@dataclass
class Script:
    """One sequence: its prompt in chunks, then decode steps until `num_outputs` ids are there; and what came out.

    `is_every_token_sampled`: each chunk's last token is sampled, as if the prompt's rest were forced.
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
    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    num_computed: int = 0
    num_chunks_done: int = 0

    @property
    def is_finished(self) -> bool:
        return self.num_computed >= len(self.prompt) + self.num_outputs - 1

    def next_row(self) -> PlanRow:
        start, end = self.num_computed, self.num_computed + 1
        is_prefill = start < len(self.prompt)
        if is_prefill:
            chunks = self.chunks or (len(self.prompt),)
            end = start + chunks[self.num_chunks_done]
            self.num_chunks_done += 1
        self.num_computed = end
        return PlanRow(
            slot=self.slot,
            start=start,
            num_tokens=end - start,
            token_ids=self.prompt[start:end] if is_prefill else (),
            page_ids=self.pages[: -(-end // PAGE_TOKENS)],
            is_sampled=end >= len(self.prompt) or self.is_every_chunk_sampled,
            slot_start=SlotStart(self.params, self.prompt, self.min_tokens, self.ending_ids) if start == 0 else None,
        )

    @property
    def num_pages(self) -> int:
        return -(-(len(self.prompt) + self.num_outputs) // PAGE_TOKENS)


class Driver:
    """Runs Scripts on a runner; `keep` taps the sampler for the logits."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self._kept: list[torch.Tensor] = []
        self._step = 0
        sample = runner._sampler.sample

        def keep(logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray) -> Draw:  # type: ignore[type-arg]
            self._kept = list(logits.clone())
            return sample(logits, slots, positions)

        runner._sampler.sample = keep  # type: ignore[method-assign]
        assert isinstance(runner._sampler, Sampler)

    def run(
        self, scripts: list[Script], choose: Callable[[list[Script]], list[Script]] = lambda active: active
    ) -> None:
        """Step until all are finished; `choose` says which of the unfinished run in the next step, in which order."""
        while active := [script for script in scripts if not script.is_finished]:
            chosen = choose(active)
            rows = tuple(script.next_row() for script in chosen)
            result = self.runner.launch(StepPlan(self._step, rows)).result()
            self._step += 1
            sampled = [script for script, row in zip(chosen, rows, strict=True) if row.is_sampled]
            assert len(sampled) == len(result.token_ids) == len(self._kept)
            for script, token_id, logits in zip(sampled, result.token_ids, self._kept, strict=True):
                script.token_ids.append(token_id)
                script.logits.append(logits)

    def alone(self, script: Script) -> Script:
        """The same sequence by itself: prompt in one chunk, pages from 0."""
        copy = Script(
            script.prompt, script.num_outputs, script.params, min_tokens=script.min_tokens, ending_ids=script.ending_ids
        )
        copy.pages = tuple(range(copy.num_pages))
        self.run([copy])
        return copy


def random_prompt(generator: np.random.Generator, length: int, vocab_size: int = 512) -> tuple[int, ...]:
    return tuple(generator.integers(0, vocab_size, length).tolist())
