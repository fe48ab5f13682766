"""Random traces on the real PyTorch runner: what a request gets, bit for bit, is what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.engine.events import FinishReason
from backend.engine.plan import PAGE_TOKENS
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import SchedulerLimits
from backend.runner.torch_runner import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.engine.served import VOCAB_SIZE, Served
from tests.engine.trace import Abort, Add, Order
from tests.unit.runner.test_batch_invariance import PARAMS

NUM_PAGES, NUM_HOST_PAGES, NUM_SLOTS = 16, 24, 6
MIN_PAGES, MAX_REQUESTS = 4, 6
ROOMY = SchedulerLimits(NUM_PAGES, NUM_SLOTS, 1000, MAX_REQUESTS, steady_from=1)
BASES = tuple(tuple((7 * number * (1 + base) + base) % VOCAB_SIZE for number in range(200)) for base in range(2))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchRunner]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), num_layers=1, hidden_size=64, ffn_size=96)
    num_threads_before = torch.get_num_threads()
    made = TorchRunner(
        folder,
        num_pages=NUM_PAGES,
        num_host_pages=NUM_HOST_PAGES,
        max_num_seqs=NUM_SLOTS,
        max_model_len=MIN_PAGES * PAGE_TOKENS,
        num_threads=1,
    )
    assert made.describe()["batch_invariant"] == "yes"
    yield made
    made.close()
    torch.set_num_threads(num_threads_before)


@st.composite
def requests(draw: st.DrawFn, handle: int) -> GenerationRequest:
    num_shared = draw(st.sampled_from([0, 1, 30, 64, 65, 130, 150]))
    own = draw(st.lists(st.integers(10, VOCAB_SIZE - 1), min_size=1, max_size=3))
    request = GenerationRequest(
        handle=handle,
        request_id="",
        prompt_token_ids=(*draw(st.sampled_from(BASES))[:num_shared], *own),
        max_tokens=draw(st.sampled_from([1, 4, 12, 66])),
        sampling=draw(st.sampled_from(PARAMS)),
        num_return_sequences=draw(st.sampled_from([1, 1, 1, 3])),
        ignore_eos=draw(st.booleans()),
        echo=draw(st.booleans()),
        priority=draw(st.sampled_from([0, 0, -1, 2])),
        cache_salt=draw(st.sampled_from(["", "", "other"])),
        num_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        num_prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )
    request.validate(VOCAB_SIZE, MIN_PAGES * PAGE_TOKENS)
    return request


@st.composite
def traces(draw: st.DrawFn) -> tuple[SchedulerLimits, list[list[Order]]]:
    max_num_seqs = draw(st.integers(2, NUM_SLOTS))
    limits = SchedulerLimits(
        num_pages=draw(st.integers(MIN_PAGES, 9)),
        num_host_pages=draw(st.sampled_from([0, 6, NUM_HOST_PAGES])),
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 17, 100, 500])),
        max_queued_requests=MAX_REQUESTS,
        has_prefix_cache=draw(st.sampled_from([True, True, False])),
        steady_from=draw(st.sampled_from([1, 3])),
    )
    turns: list[list[Order]] = []
    for handle in range(1, draw(st.integers(2, MAX_REQUESTS)) + 1):
        turns.append([Add(draw(requests(handle)))])
        turns += [[]] * draw(st.sampled_from([0, 0, 1, 7]))
        if draw(st.sampled_from([False, False, True])):
            turns.append([Abort(draw(st.integers(1, handle)))])
    return limits, turns


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(trace=traces())
def test_every_request_gets_what_it_gets_alone(
    runner: TorchRunner, trace: tuple[SchedulerLimits, list[list[Order]]]
) -> None:
    limits, turns = trace
    together = Served(runner, limits).play(turns)
    for request in (order.request for orders in turns for order in orders if isinstance(order, Add)):
        if request.handle in together.failed:
            continue
        alone = Served(runner, ROOMY).play([[Add(request)]])
        for index in range(request.num_return_sequences):
            got, expected = together.spoken[request.handle, index], alone.spoken[request.handle, index]
            if got.reason is FinishReason.CANCELLED:
                assert got.ids == expected.ids[: len(got.ids)]
                assert got.log_probs == expected.log_probs[: len(got.log_probs)]
            else:
                assert got == expected


def test_such_traces_have_preemption_and_prefix_hits(runner: TorchRunner) -> None:
    """Else the property above would say little; the same kind of load, worked out to need both."""
    limits = SchedulerLimits(5, 4, 40, MAX_REQUESTS, num_host_pages=NUM_HOST_PAGES, steady_from=1)
    prompt = BASES[0][:130]
    turns: list[list[Order]] = [
        [Add(GenerationRequest(handle, "", (*prompt, handle), 66, ignore_eos=True, sampling=PARAMS[1]))]
        for handle in range(1, 5)
    ]
    together = Served(runner, limits).play(turns)
    stats = together.scheduler.stats()
    assert stats.num_preempted_sequences > 0
    assert stats.num_swapped_pages > 0
    assert stats.num_prefix_hit_tokens > 0
    for (order,) in turns:
        assert isinstance(order, Add)
        handle = order.request.handle
        assert together.spoken[handle, 0] == Served(runner, ROOMY).play([[order]]).spoken[handle, 0]
