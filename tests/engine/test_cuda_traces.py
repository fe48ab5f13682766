"""A trace on the CUDA runner, its kernels emulated: each request gets, bit for bit, what it gets alone; and what PyTorch gives.

The trace is made so that everything happens at once: steps of more than 128 tokens that mix decodes with prompts, prompts in
chunks, samples that share pages, prefix hits, pages that go to the host and back, grammars with forced ids, scored prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.engine.plan import PAGE_TOKENS
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import SchedulerLimits
from backend.runner.cuda.runner import CudaRunner
from backend.runner.torch_runner import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.emulator.marks import needs_emulator
from tests.engine.grammar import allowed_at, guide_spec
from tests.engine.served import VOCAB_SIZE, Served
from tests.engine.trace import Add, Order
from tests.unit.runner.driver import Script
from tests.unit.runner.rounding import logits_and_bound

pytestmark = needs_emulator
# Two layers: what the first one's attention gives decides what the second one keeps in its pages.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "ffn_size": 128, "num_layers": 2, "vocab_size": 512,
}  # fmt: skip
NUM_PAGES, NUM_HOST_PAGES, NUM_SLOTS = 16, 16, 5
LIMITS: dict[str, Any] = {
    "num_pages": NUM_PAGES,
    "num_host_pages": NUM_HOST_PAGES,
    "max_num_seqs": NUM_SLOTS,
    "max_model_len": 4 * PAGE_TOKENS,
}
DTYPES = {"weight_dtype": "bf16", "kv_dtype": "bf16"}
ROOMY = SchedulerLimits(NUM_PAGES, NUM_SLOTS, 300, 8, steady_from=1)
TIGHT = SchedulerLimits(5, NUM_SLOTS, 150, 8, num_host_pages=NUM_HOST_PAGES, steady_from=1)
BASE = tuple((7 * number + number % 5) % VOCAB_SIZE for number in range(140))

REQUESTS = (
    GenerationRequest(1, "", BASE[:125], 8, ignore_eos=True, num_logprobs=2),
    GenerationRequest(
        2,
        "",
        (*BASE[:130], 11),
        5,
        sampling=SamplingParams(temperature=0.8, top_p=0.9, seed=2, repetition_penalty=1.2),
        num_return_sequences=2,
        ignore_eos=True,
        num_logprobs=1,
    ),
    GenerationRequest(3, "", (*BASE[:64], 12, 13), 7, guide=guide_spec("20,21,22 =23 =24 =25 20,26 20,21,22,27 20,28")),
    GenerationRequest(4, "", BASE[3:126], 6, ignore_eos=True, num_prompt_logprobs=2),
    GenerationRequest(5, "", BASE[:131], 0, num_prompt_logprobs=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def runner(folder: Path) -> Iterator[CudaRunner]:
    made = CudaRunner.load(folder, EmulatedDevice(PLAIN[0]), max_step_tokens=300, **LIMITS | DTYPES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(runner: CudaRunner) -> dict[int, Served]:
    """What each request gets when nothing else runs, with room for everything."""
    return {request.handle: Served(runner, ROOMY).play([[Add(request)]]) for request in REQUESTS}


def test_every_request_gets_what_it_gets_alone(runner: CudaRunner, alone: dict[int, Served]) -> None:
    turns: list[list[Order]] = [[Add(request)] for request in REQUESTS]
    together = Served(runner, TIGHT).play(turns)
    stats = together.scheduler.stats()
    assert stats.num_preempted_sequences > 0
    assert stats.num_prefix_hit_tokens > 0
    kinds = [{row.is_decode for row in plan.rows} for plan in together.plans if plan.num_tokens > 128]
    assert {True, False} in kinds
    assert any(row.num_forced for plan in together.plans for row in plan.rows)
    for request in REQUESTS:
        for index in range(request.num_return_sequences):
            place = request.handle, index
            assert together.spoken[place] == alone[request.handle].spoken[place]
    assert together.spoken[2, 0].ids != together.spoken[2, 1].ids


def test_the_next_turn_of_a_chat_gets_what_it_gets_alone(runner: CudaRunner) -> None:
    """Its history is one page that was a prompt, and one that is filled by an answer, which another kernel attended for."""
    first = GenerationRequest(1, "", BASE[:122], 8, ignore_eos=True)
    served = Served(runner, ROOMY).play([[Add(first)]])
    history = (*BASE[:122], *served.spoken[1, 0].ids)
    assert len(history) == 130
    second = GenerationRequest(2, "", (*history, 9), 2, ignore_eos=True, num_logprobs=2)
    served.play([[Add(second)]])
    assert served.scheduler.stats().num_prefix_hit_tokens == PAGE_TOKENS
    assert served.spoken[2, 0] == Served(runner, ROOMY).play([[Add(second)]]).spoken[2, 0]


def test_pytorch_gives_the_same(folder: Path, alone: dict[int, Served]) -> None:
    """Scores of prompts within a bound from roundings, and greedy ids as far as it decides them, under a grammar too."""

    def in_torch() -> TorchRunner:
        return TorchRunner(folder, device="cpu", num_threads=1, **LIMITS | DTYPES)

    greedy = [request for request in REQUESTS if request.num_return_sequences == 1]
    by_torch = Served(in_torch(), ROOMY).play([[Add(request)] for request in greedy])
    pairs = [
        (alone[request.handle].spoken[request.handle, 0], by_torch.spoken[request.handle, 0]) for request in greedy
    ]

    def make_scripts() -> list[Script]:
        return [
            one_by_one(slot, (*request.prompt_token_ids, *expected.ids))
            for slot, (request, (_, expected)) in enumerate(zip(greedy, pairs, strict=True))
        ]

    logits, bound = logits_and_bound(in_torch, make_scripts)
    assert bound.largest < 0.5 * float(logits[0].std()), "a bound that wide would show nothing"
    num_decided = 0
    for request, (found, expected), its_logits in zip(greedy, pairs, logits, strict=True):
        assert found.reason is expected.reason
        assert len(found.prompt_log_probs) == len(expected.prompt_log_probs)
        for score, its_score in zip(found.prompt_log_probs, expected.prompt_log_probs, strict=True):
            # A log-probability is one logit less the logarithm of a sum of all: each moves by the bound at most.
            assert abs(score.log_prob - its_score.log_prob) <= 2 * bound.largest
        places = () if request.guide is None else tuple(request.guide.text.split())
        for index, its_id in enumerate(expected.ids):
            row = its_logits[len(request.prompt_token_ids) - 1 + index]
            others = sorted(allowed_at(places, index) if places else range(VOCAB_SIZE))
            others.remove(its_id)
            if others and float(row[its_id] - row[others].max()) <= 2 * bound.largest:
                break
            assert found.ids[index] == its_id
            num_decided += 1
    assert num_decided > 0


def one_by_one(slot: int, ids: tuple[int, ...]) -> Script:
    """A sequence of which every token is run by itself and sampled from."""
    pages = tuple(range(4 * slot, 4 * slot + 4))
    return Script(ids, chunks=(1,) * len(ids), slot=slot, pages=pages, is_every_chunk_sampled=True)
