"""The CUDA runner, emulated, against the PyTorch runner on the same weights: every step's logits, and the ids that follow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend.engine.engine import Engine
from backend.engine.events import EngineStats, Event, TokenEvent, one_by_one
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.runner.cuda.runner import CudaRunner
from backend.runner.torch_runner import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.demo.conversation import EOS_ID, ChatTokens
from tests.demo.evaluate import CHECKPOINT as DEMO
from tests.demo.questions import Question, read_data
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.emulator.marks import needs_emulator
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint
from tests.unit.runner.driver import Driver, Script, random_prompt
from tests.unit.runner.rounding import Bound, logits_and_bound

pytestmark = needs_emulator
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "ffn_size": 128, "vocab_size": 512, "num_layers": 2,
}  # fmt: skip
LIMITS: dict[str, Any] = {"num_pages": 32, "max_num_seqs": 8, "max_model_len": 256}
ALL_QUESTIONS = os.environ.get("DEMO_QUESTIONS") == "all"
MAX_TOKENS = 120


def cuda_runner(folder: Path, **settings: Any) -> CudaRunner:
    return CudaRunner.load(folder, EmulatedDevice(PLAIN[0]), max_step_tokens=512, **LIMITS | settings)


def torch_runner(folder: Path, **settings: Any) -> TorchRunner:
    return TorchRunner(folder, device="cpu", num_threads=1, **LIMITS | settings)


def forced(prompts: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]) -> list[Script]:
    """Each prompt in one chunk, then its outputs one by one, whatever is drawn."""
    return [
        Script(
            prompt=(*prompt, *output),
            chunks=(len(prompt), *(1,) * len(output)),
            num_prompt_tokens=len(prompt),
            slot=slot,
            pages=tuple(range(4 * slot, 4 * slot + 4)),
            is_every_chunk_sampled=True,
        )
        for slot, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def logits(scripts: Sequence[Script]) -> list[torch.Tensor]:
    return [torch.stack(script.logits) for script in scripts]


@pytest.mark.parametrize("name", [*SCHEMES, "bf16", "while loading"])
def test_logits_of_every_kind_of_weights(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **SIZES)
    settings: dict[str, Any] = {}
    if name in SCHEMES:
        quantise_checkpoint(folder, tmp_path / "fp8", SCHEMES[name])
        folder = tmp_path / "fp8"
    elif name == "bf16":
        settings = {"weight_dtype": "bf16", "kv_dtype": "bf16"}
    else:
        settings = {"weight_dtype": "fp8", "head_dtype": "fp8", "kv_dtype": "fp8"}
    generator = np.random.default_rng(8)
    lengths = [(60, 10), (3, 10)]
    prompts, outputs = zip(*[[random_prompt(generator, n) for n in pair] for pair in lengths], strict=True)
    cuda = cuda_runner(folder, **settings)
    in_torch = torch_runner(folder, **settings)
    same = ("weight_dtype", "quantization") if name != "bf16" else ("weight_dtype", "kv_dtype")
    assert [cuda.describe()[key] for key in same] == [in_torch.describe()[key] for key in same]
    if name in SCHEMES and SCHEMES[name].kv_scale_names:
        assert cuda.describe()["kv_dtype"] == in_torch.describe()["kv_dtype"] == "fp8"
    expected, bound = logits_and_bound(lambda: torch_runner(folder, **settings), lambda: forced(prompts, outputs))
    spread = float(torch.cat(expected).std())
    assert bound.rms < 0.5 * spread, "a bound that wide would show nothing"
    scripts = forced(prompts, outputs)
    Driver(cuda).run(scripts)
    seen = Bound.seen(logits(scripts), expected)
    print(f"{name}: spread {spread:.3f}, {bound}, {seen}")
    assert bound.holds(seen)


def demo_questions() -> list[Question]:
    """One of each language; with DEMO_QUESTIONS=all every documented one."""
    languages = [list(language.topics()) for language in read_data().languages]
    if ALL_QUESTIONS:
        return [question for questions in languages for question in questions]
    return [next(question for question in questions if len(question.answer) < 90) for questions in languages]


def answers(runner: CudaRunner | TorchRunner, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """What the real engine makes of `prompts`, greedy, all at once."""
    vocabulary = [b"x"] * runner.config.vocab_size
    limits = SchedulerLimits(runner.num_pages, runner.max_num_seqs, 128, len(prompts))
    ids: dict[int, list[int]] = {handle: [] for handle in range(len(prompts))}
    num_running = len(prompts)

    def take(events: list[Event], stats: EngineStats) -> None:
        nonlocal num_running
        for event in one_by_one(events):
            assert isinstance(event, TokenEvent), event
            ids[event.handle] += event.token_ids
            if event.is_request_end:
                num_running -= 1
        if num_running == 0:
            engine.stop()

    engine = Engine(Scheduler(limits, vocabulary, eos_id=EOS_ID), runner, take)
    for handle, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(handle, "", prompt, MAX_TOKENS))
    engine.run()
    return list(ids.values())


@pytest.mark.timeout(3600 if ALL_QUESTIONS else 400)
def test_the_demo_checkpoint_answers_in_fp8_as_in_pytorch() -> None:
    """Through the engine: equal ids up to the first step at which a rounding may decide; then the same ids step by step.

    A step is decided when the best logit leads by more than two logits may move together, twice the bound.
    """
    tokens = ChatTokens(DEMO / "tekken.json")
    questions = demo_questions()
    prompts = [tuple(tokens.prompt([], question.ask[0])) for question in questions]
    settings = {"weight_dtype": "fp8", "kv_dtype": "fp8", "num_pages": 36}
    found = answers(cuda_runner(DEMO, **settings), prompts)
    by_torch = answers(torch_runner(DEMO, **settings), prompts)
    num_decided = 0
    for first in range(0, len(prompts), LIMITS["max_num_seqs"]):
        group = slice(first, first + LIMITS["max_num_seqs"])
        outputs = [tuple(ids[:-1]) for ids in by_torch[group]]
        expected, bound = logits_and_bound(
            lambda: torch_runner(DEMO, **settings),
            lambda: forced(prompts[group], outputs),  # noqa: B023
        )
        scripts = forced(prompts[group], outputs)
        Driver(cuda_runner(DEMO, **settings)).run(scripts)
        seen = Bound.seen(logits(scripts), expected)
        assert bound.holds(seen), (questions[first].id, bound, seen)
        for ids, its_ids, its_logits in zip(found[group], by_torch[group], expected, strict=True):
            best = its_logits.topk(2, dim=1).values
            margins = best[:, 0] - best[:, 1]
            undecided = (margins <= 2 * bound.largest).nonzero()
            length = int(undecided[0]) if len(undecided) else len(margins)
            assert ids[:length] == its_ids[:length]
            num_decided += length
        print(f"{first + len(outputs)} of {len(prompts)} questions: {bound}, {seen}", flush=True)
    num_right = sum(tokens.decode(ids) == question.answer for ids, question in zip(found, questions, strict=True))
    num_equal = sum(ids == its_ids for ids, its_ids in zip(found, by_torch, strict=True))
    num_tokens = sum(map(len, by_torch))
    print(f"{num_decided} of {num_tokens} tokens decided; {num_equal} answers equal, {num_right} right")
    assert num_decided > 0.5 * num_tokens, "bounds that decide little show little"
    assert num_right == num_equal == len(questions)
