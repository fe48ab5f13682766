"""The same sequence gives the same bits whatever runs beside it, however its prompt is cut, wherever its pages lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.checkpoint import weight_loader
from backend.engine.plan import PlanRow, SlotStart, StepPlan, StepResult
from backend.engine.request import SamplingParams
from backend.errors import EngineFailure
from backend.runner.torch_runner import TorchRunner, TorchStep
from backend.runner.work_items import ItemSizes
from tests.checkpoints import TinyConfig, make_checkpoint, random_tensors, write_shards
from tests.unit.runner.driver import GREEDY, Driver, Script, random_prompt

NUM_PAGES, NUM_SLOTS = 64, 12
PARAMS = (
    GREEDY,
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2),
    SamplingParams(temperature=1.5, top_k=20, min_p=0.05, seed=3),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=0.7, presence_penalty=0.7, seed=4),
    SamplingParams(temperature=0.7, seed=5, logit_bias=((3, 2.0), (8, -5.0)), bad_words=((4,), (5, 6))),
)


@pytest.fixture(scope="module", params=[("fp32", 2), ("bf16", 1), ("fp8", 1)], ids=str)
def driver(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Driver[TorchRunner]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), num_heads=8, num_kv_heads=2)
    weight_dtype, num_threads = request.param
    num_threads_before = torch.get_num_threads()
    runner = TorchRunner(
        folder,
        num_pages=NUM_PAGES,
        max_num_seqs=NUM_SLOTS,
        max_model_len=512,
        weight_dtype=weight_dtype,
        kv_dtype="fp8" if weight_dtype == "fp8" else "auto",
        num_threads=num_threads,  # two, because the splits that threads make are part of what is promised
    )
    assert runner.describe()["batch_invariant"] == "yes"
    yield Driver(runner)
    runner.close()
    torch.set_num_threads(num_threads_before)


def cut(generator: np.random.Generator, length: int) -> tuple[int, ...]:
    """Random chunks that add up to `length`."""
    ends = sorted({*generator.integers(1, length + 1, generator.integers(0, 6)).tolist(), length})
    return tuple(np.diff([0, *ends]).tolist())


def random_mix(generator: np.random.Generator) -> tuple[list[Script], Callable[[list[Script]], list[Script]]]:
    """Sequences that share no page, and a choice of who runs in each step: any of them, in any order."""
    scripts = [
        Script(
            prompt=random_prompt(generator, int(generator.integers(1, 150))),
            num_outputs=int(generator.integers(1, 6)),
            params=PARAMS[generator.integers(len(PARAMS))],
            slot=int(slot),
            num_logprobs=(None, 0, 3)[generator.integers(3)],
            num_prompt_logprobs=(None, None, 0, 4)[generator.integers(4)],
        )
        for slot in generator.permutation(NUM_SLOTS)[: generator.integers(1, NUM_SLOTS + 1)]
    ]
    pages = generator.permutation(NUM_PAGES).tolist()
    for script in scripts:
        script.pages = tuple(pages.pop() for _ in range(script.num_pages))
        script.chunks = cut(generator, len(script.prompt))

    def choose(active: list[Script]) -> list[Script]:
        order = generator.permutation(len(active))
        return [active[index] for index in order[: generator.integers(1, len(active) + 1)]]

    return scripts, choose


def assert_equal(actual: Script, expected: Script) -> None:
    assert actual.token_ids == expected.token_ids
    assert actual.log_probs == expected.log_probs
    assert actual.prompt_log_probs == expected.prompt_log_probs
    for step, (a, b) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert torch.equal(a, b), f"logits of output {step} differ by up to {(a - b).abs().max():g}"


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_mix_gives_the_same_bits_as_alone(driver: Driver[TorchRunner], seed: int) -> None:
    scripts, choose = random_mix(np.random.default_rng(seed))
    driver.run(scripts, choose)
    for script in scripts:
        assert_equal(script, driver.alone(script))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(2, 200))
def test_any_chunking_gives_the_same_bits(driver: Driver[TorchRunner], seed: int, length: int) -> None:
    generator = np.random.default_rng(seed)
    prompt = random_prompt(generator, length)
    pages = tuple(generator.permutation(NUM_PAGES)[:4].tolist())
    whole = driver.alone(Script(prompt, num_outputs=2, num_prompt_logprobs=2))
    assert len(whole.prompt_log_probs) == length - 1
    one_by_one = (length - min(20, length - 1), *(1,) * min(20, length - 1))
    for chunks in (cut(generator, length), (length - 1, 1), (1, length - 1), one_by_one):
        script = Script(prompt, num_outputs=2, chunks=chunks, pages=pages, num_prompt_logprobs=2)
        driver.run([script])
        assert_equal(script, whole)


def test_how_much_attention_is_held_at_once_does_not_matter(
    driver: Driver[TorchRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts, choose = random_mix(np.random.default_rng(5))
    driver.run(scripts, choose)
    monkeypatch.setattr(driver.runner, "_attention_sizes", ItemSizes(per_call=16, per_group=3))
    for script in scripts:
        assert_equal(script, driver.alone(script))


def test_a_step_may_be_launched_before_the_result_of_the_one_before(driver: Driver[TorchRunner]) -> None:
    prompt = random_prompt(np.random.default_rng(6), 10)
    expected = driver.alone(Script(prompt, num_outputs=3)).token_ids
    runner = driver.runner
    steps: list[TorchStep] = []
    for row in (
        PlanRow(0, 0, 10, prompt, (0,), True, SlotStart(GREEDY, prompt)),
        PlanRow(0, 10, 1, (), (0,), True),
        PlanRow(0, 11, 1, (), (0,), True),
    ):
        steps.append(runner.launch(StepPlan(len(steps), (row,))))
        steps[-1].draw({})
    assert [token_id for step in steps for token_id in step.result().token_ids] == expected


def test_a_step_that_samples_nothing(driver: Driver[TorchRunner]) -> None:
    prompt = random_prompt(np.random.default_rng(7), 10)
    row = PlanRow(0, 0, 5, prompt[:5], (0,), False, SlotStart(GREEDY, prompt))
    step = driver.runner.launch(StepPlan(0, (row,)))
    step.draw({})
    assert step.result() == StepResult(())


def test_nan_is_reported_by_slot_and_reaches_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is damaged on its way, behind the checks of the checkpoint.
    monkeypatch.setattr(weight_loader, "_refuse_what_is_not_finite", lambda *_: None)
    sizes = TinyConfig(num_layers=1)
    make_checkpoint(tmp_path, num_layers=1)
    tensors = random_tensors(sizes, 0)
    tensors["model.embed_tokens.weight"][7] = torch.nan
    write_shards(tmp_path, "model", tensors)
    runner = TorchRunner(tmp_path, num_pages=4, max_num_seqs=4, max_model_len=256, num_threads=1)
    driver = Driver(runner)
    prompt = tuple(range(20, 60))
    expected = driver.alone(Script(prompt, num_outputs=4))

    poisoned = (*range(100, 163), 7, 8)
    rows = (
        PlanRow(2, 0, 65, poisoned, (3, 1), True, SlotStart(GREEDY, poisoned)),
        PlanRow(0, 0, 40, prompt, (0,), True, SlotStart(GREEDY, prompt)),
    )
    step = runner.launch(StepPlan(0, rows))
    step.draw({})
    with pytest.raises(EngineFailure, match=r"logits: must be finite, got NaN or infinity in slot 2;"):
        step.result()
    for page in (1, 3):  # where the poisoned sequence left NaN
        after = Script(prompt, num_outputs=4, pages=(page,))
        driver.run([after])
        assert_equal(after, expected)
