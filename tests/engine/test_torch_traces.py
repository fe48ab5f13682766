"""Random traces on the real PyTorch runner: what a request gets, bit for bit, is what it gets alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.engine.events import FinishReason, RequestFailed
from backend.engine.plan import PAGE_TOKENS, StepPlan, TokenLogProbs
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Event, Scheduler, SchedulerLimits
from backend.runner.torch_runner import TorchRunner, TorchStep
from tests.checkpoints import make_checkpoint
from tests.engine.trace import Abort, Add, Order
from tests.unit.runner.test_batch_invariance import PARAMS

VOCAB_SIZE, EOS_ID = 512, 2
TOKEN_BYTES = tuple(bytes([number % 256]) if number > 9 else b"" for number in range(VOCAB_SIZE))
NUM_PAGES, NUM_HOST_PAGES, NUM_SLOTS = 16, 24, 6
MIN_PAGES, MAX_REQUESTS = 4, 6
ROOMY = SchedulerLimits(NUM_PAGES, NUM_SLOTS, 1000, MAX_REQUESTS)
BASES = tuple(tuple((7 * number * (1 + base) + base) % VOCAB_SIZE for number in range(200)) for base in range(2))


@dataclass
class Spoken:
    """All that one sequence said."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    prompt_log_probs: tuple[TokenLogProbs, ...] = ()
    reason: FinishReason | None = None


class Served:
    """What came of a run of a Scheduler over the runner, one step ahead as in the engine."""

    def __init__(self, runner: TorchRunner, limits: SchedulerLimits) -> None:
        self.spoken: defaultdict[tuple[int, int], Spoken] = defaultdict(Spoken)
        self.failed: set[int] = set()
        self.scheduler = Scheduler(limits, TOKEN_BYTES, EOS_ID)
        self._runner = runner
        self._in_flight: tuple[StepPlan, TorchStep] | None = None
        self._now_ns = 1

    def play(self, turns: Sequence[Sequence[Order]]) -> Served:
        for orders in turns:
            self._turn(orders)
        while self.scheduler.has_work or self._in_flight:
            self._turn(())
        self.scheduler.check_integrity()
        assert self.scheduler.stats().num_pages_held == 0
        return self

    def _turn(self, orders: Sequence[Order]) -> None:
        self._now_ns += 1_000_000
        for order in orders:
            if isinstance(order, Add):
                self.scheduler.add(order.request, self._now_ns)
            elif isinstance(order, Abort):
                self._record(self.scheduler.abort(order.handle))
        plan = self.scheduler.plan(self._now_ns)
        launched = None if plan is None else (plan, self._runner.launch(plan))
        if launched is not None:
            launched[1].draw({})
        if self._in_flight is not None:
            self._record(self.scheduler.commit(self._in_flight[0], self._in_flight[1].result(), self._now_ns))
        self._in_flight = launched
        self.scheduler.check_integrity()

    def _record(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, RequestFailed):
                self.failed.add(event.handle)
                continue
            spoken = self.spoken[event.handle, event.sequence_index]
            spoken.ids += event.token_ids
            spoken.log_probs += event.log_probs
            if event.finish is not None:
                spoken.reason, spoken.prompt_log_probs = event.finish.reason, event.finish.prompt_log_probs


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
    limits = SchedulerLimits(5, 4, 40, MAX_REQUESTS, num_host_pages=NUM_HOST_PAGES)
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
