"""Whole prompts, alone on the GPU: time to the first token over length and chunk, its floor, and that chunks change no bit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from backend.engine.plan import PlanRow, SlotStart, StepPlan, StepResult
from backend.engine.request import SamplingParams
from backend.runner.cuda.runner import CudaRunner
from kernels.errors import CheckError
from tests.bench.gpu.floor import prompt_us
from tests.bench.gpu.models import pages_for

_NUM_RUNS = 2


@dataclass(frozen=True)
class Prompt:
    """`length` tokens, of which up to `chunk` go through in one step."""

    length: int
    chunk: int


def run(runner: CudaRunner, prompt: Prompt, *, num_logprobs: int | None = None) -> StepResult:
    """Run all chunks one after the other, each launched as soon as it can be, and wait for the token behind the last."""
    ids = tuple(2 + place * 7 % (runner.config.vocab_size - 2) for place in range(prompt.length))
    result: StepResult | None = None
    for number, start in enumerate(range(0, prompt.length, prompt.chunk)):
        end = min(start + prompt.chunk, prompt.length)
        begin = SlotStart(SamplingParams(), ids, num_logprobs=num_logprobs) if start == 0 else None
        pages = tuple(range(pages_for(end)))
        row = PlanRow(0, start, end - start, ids[start:end], pages, end == prompt.length, begin)
        step = runner.launch(StepPlan(number, (row,)))
        step.draw({})
        result = step.result() if end == prompt.length else None
    assert result is not None
    return result


def check_chunks(runner: CudaRunner, length: int, chunks: tuple[int, ...]) -> None:
    """CheckError unless every size of chunk gives the same first token with the same log-probability, bit for bit."""
    found = {chunk: run(runner, Prompt(length, chunk), num_logprobs=0) for chunk in chunks}
    answers = {(result.token_ids, result.log_probs) for result in found.values()}
    if len(answers) > 1:
        raise CheckError(f"a prompt of {length} tokens: chunks give different first tokens: {found}")


def measure(runner: CudaRunner, prompt: Prompt, bytes_per_us: float) -> dict[str, Any]:
    """One entry of the results: the fastest of two runs after one that captures what there is to capture."""
    run(runner, Prompt(min(prompt.length, 2 * prompt.chunk), prompt.chunk))
    times_ms = []
    for _ in range(_NUM_RUNS):
        started = time.perf_counter()
        run(runner, prompt)
        times_ms.append(1000 * (time.perf_counter() - started))
    floor_ms = prompt_us(runner.config, prompt.length, bytes_per_us) / 1000
    return {
        "length": prompt.length,
        "chunk": prompt.chunk,
        "first_token_ms": min(times_ms),
        "runs_ms": times_ms,
        "floor_ms": floor_ms,
        "share_of_floor": floor_ms / min(times_ms),
        "tokens_per_s": 1000 * prompt.length / min(times_ms),
    }


def line(entry: dict[str, Any]) -> str:
    """For people."""
    head = f"first token  prompt {entry['length']:>6} in chunks of {entry['chunk']:>5}"
    if "skipped" in entry:
        return f"{head}  skipped: {entry['skipped']}"
    return (
        f"{head}  {entry['first_token_ms']:>10.2f} ms  floor {entry['floor_ms']:.2f} ms = {entry['share_of_floor']:.1%}  "
        f"{entry['tokens_per_s']:>9,.0f} tokens/s"
    )
