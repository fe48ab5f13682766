"""The CUDA runner, its kernels run by the emulator, against itself in other company; and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend.checkpoint import weight_loader
from backend.engine.plan import PAGE_TOKENS, PageCopy, PlanRow, SlotStart, SteadyRows, StepPlan, TokenLogProbs
from backend.engine.request import MAX_BAD_WORD_TOKENS, SamplingParams
from backend.errors import ConfigError, EngineFailure
from backend.runner.cuda.runner import CudaRunner
from backend.runner.cuda.staging import MAX_UPDATES
from backend.runner.cuda.step_tokens import StepTokens, lay_out
from backend.runner.model_runner import ModelRunner
from kernels.prefill_attention import Chunk
from tests.checkpoints import TinyConfig, make_checkpoint, random_tensors, write_shards
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.emulator.marks import needs_emulator

pytestmark = needs_emulator
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "ffn_size": 128, "vocab_size": 512, "num_layers": 1,
}  # fmt: skip
GREEDY = SamplingParams()
NUM_PAGES = 12


def make_runner(folder: Path, **settings: Any) -> CudaRunner:
    limits = {
        "num_pages": NUM_PAGES, "num_host_pages": 4, "max_num_seqs": 4, "max_model_len": 384, "max_step_tokens": 400
    }  # fmt: skip
    return CudaRunner.load(folder, EmulatedDevice(PLAIN[0]), **limits | settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), **SIZES)


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def runner(folder: Path, request: pytest.FixtureRequest) -> Iterator[CudaRunner]:
    made = make_runner(folder, weight_dtype=request.param, kv_dtype=request.param)
    yield made
    made.close()


@dataclass
class Story:
    """One sequence: prompt in chunks, then decode rows; and what came out."""

    prompt: tuple[int, ...]
    slot: int
    pages: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    num_outputs: int = 3
    params: SamplingParams = GREEDY
    num_logprobs: int | None = 5
    num_computed: int = 0
    ids: list[int] = field(default_factory=list)
    log_probs: list[TokenLogProbs | None] = field(default_factory=list)
    scores: list[TokenLogProbs] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.ids) == self.num_outputs

    def row(self) -> PlanRow:
        start, num_prompt = self.num_computed, len(self.prompt)
        if start < num_prompt:
            chunks = self.chunks or (num_prompt,)
            size = chunks[int(np.searchsorted(np.cumsum(chunks), start, side="right"))]
        else:
            size = 1
        self.num_computed += size
        is_prefill = start < num_prompt
        return PlanRow(
            slot=self.slot,
            start=start,
            num_tokens=size,
            token_ids=self.prompt[start : start + size] if is_prefill else (),
            page_ids=self.pages[: -(-(start + size) // PAGE_TOKENS)],
            is_sampled=self.num_computed >= num_prompt,
            slot_start=SlotStart(self.params, self.prompt, num_logprobs=self.num_logprobs) if start == 0 else None,
            num_prompt_logprobs=3 if is_prefill else None,
        )


def run(runner: ModelRunner, *sequences: Story, copies: tuple[PageCopy, ...] = ()) -> None:
    """All unfinished sequences in each step, decode rows first."""
    step = 0
    while active := [sequence for sequence in sequences if not sequence.is_finished]:
        active.sort(key=lambda sequence: sequence.num_computed < len(sequence.prompt))
        rows = tuple(sequence.row() for sequence in active)
        in_flight = runner.launch(StepPlan(step, rows, copies if step == 0 else ()))
        in_flight.draw({})
        result = in_flight.result()
        sampled = [sequence for sequence, row in zip(active, rows, strict=True) if row.is_sampled]
        for sequence, token_id, log_probs in zip(
            sampled, result.token_ids, result.log_probs or [None] * 9, strict=False
        ):
            sequence.ids.append(token_id)
            sequence.log_probs.append(log_probs)
        scored = [sequence for sequence, row in zip(active, rows, strict=True) if row.num_prompt_logprobs is not None]
        for sequence, scores in zip(scored, result.prompt_log_probs, strict=True):
            sequence.scores += scores
        step += 1


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], length).tolist())


def assert_same(actual: Story, expected: Story) -> None:
    """Ids, and the floats of five log-probabilities at each place, bit for bit."""
    assert actual.ids == expected.ids
    assert actual.log_probs == expected.log_probs
    assert actual.scores == expected.scores


def test_any_company_chunks_and_pages_give_the_same_bits(runner: CudaRunner) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, repetition_penalty=1.2)
    alone = Story(prompt(1, 70), 0, (0, 1), params=params)
    run(runner, alone)
    mixed = Story(prompt(1, 70), 2, (9, 4), chunks=(1, 33, 30, 6), params=params)
    others = [Story(prompt(2, 12), 0, (1,)), Story(prompt(3, 90), 3, (11, 7), chunks=(50, 40), num_logprobs=None)]
    run(runner, mixed, *others)
    assert others[1].log_probs == [None] * 3
    assert len(mixed.scores) == 69
    assert_same(mixed, alone)


def test_a_long_prompt_is_the_same_in_any_chunks_and_beside_decodes(runner: CudaRunner) -> None:
    """Steps of 70 to 370 tokens: both kernels of linear layers, one and two slices of attention, every width."""
    whole = Story(prompt(4, 300), 0, (0, 1, 2, 3, 4), num_outputs=2)
    run(runner, whole)
    chunks = Story(prompt(4, 300), 1, (6, 3, 8, 5, 7), chunks=(100, 129, 71), num_outputs=2)
    run(runner, chunks)
    assert_same(chunks, whole)
    decoding = Story(prompt(1, 20), 2, (9,), num_outputs=1)
    run(runner, decoding)
    decoding.num_outputs = 3
    among = Story(prompt(4, 300), 1, (4, 3, 2, 1, 0), num_outputs=2)
    run(runner, decoding, among, Story(prompt(3, 69), 0, (10, 11), num_outputs=1))
    assert_same(among, whole)


def test_pages_that_went_to_the_host_and_back(runner: CudaRunner) -> None:
    expected = Story(prompt(5, 66), 0, (0, 1))
    run(runner, expected)
    moved = Story(prompt(5, 66), 1, (2, 3), num_outputs=1)
    run(runner, moved)
    to_host = (PageCopy(2, 0, True), PageCopy(3, 1, True))
    run(runner, Story(prompt(6, 70), 2, (2, 3), num_outputs=1), copies=to_host)
    moved.pages, moved.num_outputs = (10, 5), 3
    run(runner, moved, copies=(PageCopy(0, 10, False), PageCopy(1, 5, False)))
    assert_same(moved, expected)


def test_ids_that_a_grammar_forces_are_those_that_are_drawn(runner: CudaRunner) -> None:
    drawn = Story(prompt(7, 10), 0, (0,), num_outputs=5)
    run(runner, drawn)
    forced = Story(prompt(7, 10), 1, (1,), num_outputs=2)
    run(runner, forced)
    ids = (drawn.ids[1], drawn.ids[2], drawn.ids[3])
    row = PlanRow(1, 11, 3, ids, (1,), True, num_forced=2)
    step = runner.launch(StepPlan(0, (row,)))
    step.draw({})
    assert step.result().token_ids == (drawn.ids[4],)
    mask = np.zeros(SIZES["vocab_size"] // 32, dtype=np.int32)
    mask[3] = 1 << 5
    step = runner.launch(StepPlan(1, (PlanRow(1, 14, 1, (), (1,), True, is_guided=True),)))
    step.draw({1: mask})
    assert step.result().token_ids == (3 * 32 + 5,)


def test_a_start_of_more_words_than_a_step_copies(runner: CudaRunner) -> None:
    """A bad word among those that go before the step's own copy, or among those that go with it."""
    plain = Story(prompt(8, 5), 0, (0,), num_outputs=1)
    run(runner, plain)
    others = tuple((number, 1) for number in range(200))
    assert MAX_BAD_WORD_TOKENS * len(others) > MAX_UPDATES
    for words in ((tuple(plain.ids), *others), (*others, tuple(plain.ids))):
        changed = Story(prompt(8, 5), 1, (1,), num_outputs=1, params=SamplingParams(bad_words=words))
        run(runner, changed)
        assert changed.ids != plain.ids
        assert changed.scores == plain.scores


def test_a_guided_row_without_a_mask_may_draw_any_id(runner: CudaRunner) -> None:
    expected = Story(prompt(9, 6), 0, (0,), num_outputs=2)
    run(runner, expected)
    guided = Story(prompt(9, 6), 1, (1,), num_outputs=1)
    run(runner, guided)
    step = runner.launch(StepPlan(0, (PlanRow(1, 6, 1, (), (1,), True, is_guided=True),)))
    step.draw({})
    assert step.result().token_ids == (expected.ids[1],)


def test_what_the_kernels_do_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runner cuda: head_dim must be 128, found 64"):
        make_runner(make_checkpoint(tmp_path / "head", **SIZES | {"head_dim": 64}))
    with pytest.raises(ConfigError, match="runner cuda: the FFN size must be a multiple of 128, found 160"):
        make_runner(make_checkpoint(tmp_path / "ffn", **SIZES | {"ffn_size": 160}))
    with pytest.raises(ConfigError, match="weight_dtype and kv_dtype must be bf16 or fp8, got fp32, auto"):
        make_runner(make_checkpoint(tmp_path / "fp32", **SIZES), weight_dtype="fp32")


def test_nan_is_reported_by_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is damaged on its way, behind the checks of the checkpoint.
    monkeypatch.setattr(weight_loader, "_refuse_what_is_not_finite", lambda *_: None)
    make_checkpoint(tmp_path, **SIZES)
    tensors = random_tensors(TinyConfig(**SIZES), 0)
    tensors["model.embed_tokens.weight"][7] = torch.nan
    write_shards(tmp_path, "model", tensors)
    runner = make_runner(tmp_path)
    bad, good = Story((9, 7), 2, (3,)), Story((9, 8), 0, (1,))
    step = runner.launch(StepPlan(0, tuple(sequence.row() for sequence in (bad, good))))
    step.draw({})
    with pytest.raises(EngineFailure, match="logits: must be finite, got NaN or infinity in slot 2;"):
        step.result()


def test_tokens_of_a_plan() -> None:
    rows = (
        PlanRow(3, 40, 1, (), (0,), True),
        PlanRow(0, 8, 2, (5, 6), (4,), True, num_forced=1),
        PlanRow(1, 100, 30, tuple(range(100, 130)), (1, 2, 3), True, num_prompt_logprobs=0),
        PlanRow(2, 0, 1, (9,), (4,), False, num_prompt_logprobs=2),
    )
    tokens = lay_out(StepPlan(0, rows), [(1, 2), tuple(range(130)), (9, 9), ()])
    assert tokens.token_ids.tolist() == [-4, 5, 6, *range(100, 130), 9]
    assert tokens.slots.tolist() == [3, 0, 0, *[1] * 30, 2]
    assert tokens.positions.tolist() == [40, 8, 9, *range(100, 130), 0]
    assert tokens.num_generated == 3
    assert tokens.chunks == (Chunk(1, 100, 30), Chunk(2, 0, 1))
    assert tokens.sampled.tolist() == [0, 2, 32]
    assert tokens.sampled_slots.tolist() == [3, 0, 1]
    assert not tokens.are_all_sampled
    assert tokens.scored == (range(3, 32), range(33, 34))


@pytest.mark.parametrize("num_others", [0, 4])
def test_steady_rows_are_rows(num_others: int) -> None:
    """Columns give the same tokens as the rows they stand for."""
    steady = SteadyRows(np.array([4, 5], dtype=np.int32), np.array([70, 3], dtype=np.int32), ((1, 2), (0,)))
    others = (
        PlanRow(3, 40, 1, (), (0,), True),
        PlanRow(0, 8, 2, (5, 6), (4,), True, num_forced=1),
        PlanRow(1, 100, 30, tuple(range(100, 130)), (1, 2, 3), True, num_prompt_logprobs=0),
        PlanRow(2, 0, 1, (9,), (4,), False, num_prompt_logprobs=2),
    )[:num_others]
    prompts: list[tuple[int, ...]] = [(1, 2), tuple(range(130)), (9, 9), (), (1,) * 70, (1,) * 3]
    columns, rows = (
        lay_out(StepPlan(0, others, steady=steady), prompts),
        lay_out(StepPlan(0, (*steady.rows(), *others)), prompts),
    )
    for each in dataclasses.fields(StepTokens):
        found, expected = getattr(columns, each.name), getattr(rows, each.name)
        if isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype == np.int32
            assert found.tolist() == expected.tolist(), each.name
        else:
            assert found == expected, each.name
