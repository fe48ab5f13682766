"""Log-probabilities of prompts and outputs through the whole runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.checkpoint import weight_loader
from backend.engine.plan import PlanRow, SlotStart, StepPlan
from backend.errors import EngineFailure
from backend.runner import memory_plan, prompt_scores
from backend.runner.torch_runner import TorchRunner
from backend.runner.work_items import IntArray
from tests.checkpoints import TinyConfig, make_checkpoint, random_tensors, write_shards
from tests.unit.runner.driver import GREEDY, Driver, Script, random_prompt
from tests.unit.runner.test_against_transformers import reference_logits

PROMPT = random_prompt(np.random.default_rng(0), 150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver[TorchRunner]]:
    runner = TorchRunner(folder, num_pages=16, max_num_seqs=4, max_model_len=512, num_threads=1)
    yield Driver(runner)
    runner.close()


def scored(driver: Driver[TorchRunner], prompt: tuple[int, ...] = PROMPT, num_prompt_logprobs: int = 3) -> Script:
    """A prompt that is scored and goes no further."""
    return driver.alone(Script(prompt, num_outputs=0, num_prompt_logprobs=num_prompt_logprobs))


def test_prompt_and_output_against_transformers(folder: Path, driver: Driver[TorchRunner]) -> None:
    script = driver.alone(Script(PROMPT, num_outputs=20, num_logprobs=2, num_prompt_logprobs=3))
    text = (*PROMPT, *script.token_ids)
    expected = torch.log_softmax(reference_logits(folder, text), dim=1)
    places = [*script.prompt_log_probs, *script.log_probs]
    assert len(places) == len(text) - 1
    for position, place in enumerate(places):
        assert place is not None
        row, token_id = expected[position], text[position + 1]
        assert abs(place.log_prob - float(row[token_id])) < 1e-4
        assert abs(place.rank - 1 - int((row > row[token_id]).sum())) <= 1  # two that are equal within rounding
        num_top = 3 if position < len(PROMPT) - 1 else 2
        assert (torch.tensor(place.top_log_probs) - row.topk(num_top).values).abs().max() < 1e-4
        assert (row[list(place.top_ids)] - row.topk(num_top).values).abs().max() < 1e-4
    assert len({place.rank for place in places if place is not None}) > 50


def test_scores_of_outputs_are_bitwise_those_of_a_prompt(driver: Driver[TorchRunner]) -> None:
    script = driver.alone(Script(PROMPT[:40], num_outputs=60, num_logprobs=3))
    again = scored(driver, (*script.prompt, *script.token_ids))
    assert again.prompt_log_probs[39:] == script.log_probs


def test_a_scored_prompt_draws_nothing_and_may_be_one_token(driver: Driver[TorchRunner]) -> None:
    assert scored(driver).token_ids == []
    for prompt in (PROMPT[:1], PROMPT[:2]):
        assert len(scored(driver, prompt).prompt_log_probs) == len(prompt) - 1
    row = PlanRow(0, 0, 1, (5,), (0,), False, SlotStart(GREEDY, (5,)), num_prompt_logprobs=0)
    step = driver.runner.launch(StepPlan(0, (row,)))
    step.draw({})
    assert step.result().prompt_log_probs == ((),)


def test_logits_of_few_positions_are_held_at_once(driver: Driver[TorchRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(driver).prompt_log_probs
    assert len(expected) == 149 > memory_plan.PIECE_ROWS
    monkeypatch.setattr(prompt_scores, "PIECE_ROWS", 7)
    logits_of, counts = driver.runner._transformer.logits, []

    def counting(hidden: torch.Tensor, tokens: IntArray) -> torch.Tensor:
        counts.append(len(tokens))
        return logits_of(hidden, tokens)

    monkeypatch.setattr(driver.runner._transformer, "logits", counting)
    assert scored(driver).prompt_log_probs == expected
    assert counts == [*(7,) * 21, 2, 0]


def test_rows_are_told_apart(driver: Driver[TorchRunner]) -> None:
    scripts = [
        Script(PROMPT[:70], slot=0, pages=(1, 2), num_prompt_logprobs=0, chunks=(65, 5)),
        Script(PROMPT[50:60], slot=1, pages=(3,), num_logprobs=4),
        Script(PROMPT[60:140], slot=3, pages=(4, 5), num_prompt_logprobs=5, num_outputs=0),
        Script(PROMPT[:20], slot=2, pages=(6,), num_prompt_logprobs=1, num_outputs=3),
    ]
    driver.run(scripts)
    for script in scripts:
        expected = driver.alone(script)
        assert script.prompt_log_probs == expected.prompt_log_probs
        assert script.log_probs == expected.log_probs
        assert len(script.prompt_log_probs) == (0 if script.slot == 1 else len(script.prompt) - 1)
    assert [len(script.prompt_log_probs[-1].top_ids) for script in (scripts[0], *scripts[2:])] == [0, 5, 1]


def test_nan_in_a_scored_prompt_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is damaged on its way, behind the checks of the checkpoint.
    monkeypatch.setattr(weight_loader, "_refuse_what_is_not_finite", lambda *_: None)
    make_checkpoint(tmp_path, num_layers=1)
    tensors = random_tensors(TinyConfig(num_layers=1), 0)
    tensors["model.embed_tokens.weight"][7] = torch.nan
    write_shards(tmp_path, "model", tensors)
    runner = TorchRunner(tmp_path, num_pages=2, max_num_seqs=4, max_model_len=64, num_threads=1)
    rows = (
        PlanRow(1, 0, 3, (5, 6, 8), (0,), False, SlotStart(GREEDY, (5, 6, 8)), num_prompt_logprobs=1),
        PlanRow(3, 0, 3, (5, 7, 8), (1,), False, SlotStart(GREEDY, (5, 7, 8)), num_prompt_logprobs=1),
    )
    step = runner.launch(StepPlan(0, rows))
    step.draw({})
    with pytest.raises(EngineFailure, match="got NaN or infinity in the prompt of slot 3;"):
        step.result()
