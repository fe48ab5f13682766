"""What a step of the CUDA runner moves between host and device, and that the host waits for none of it.

The device is one without memory: what would read a tensor of it on the host fails, and every copy is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from backend.checkpoint.weights import allocate_weights
from backend.engine.plan import PAGE_TOKENS, PlanRow, SlotStart, SteadyRows, StepPlan
from backend.engine.request import SamplingParams
from backend.runner.cuda.runner import CudaRunner
from backend.runner.cuda.slot_state import SlotState
from tests.bench.gpu.host_only_device import HostOnlyDevice
from tests.bench.gpu.models import FP8, TOY, pages_for, runner_of
from tests.unit.runner.crossings import Crossing, Crossings, is_noticed

NUM_ROWS = 5
FIRST_POSITION = 40
GREEDY = SamplingParams()


@pytest.fixture
def device() -> HostOnlyDevice:
    return HostOnlyDevice("meta")


def make_runner(device: HostOnlyDevice, max_step_tokens: int) -> CudaRunner:
    weights = allocate_weights(TOY, device.torch_device, FP8)
    return runner_of(
        TOY, weights, device, num_pages=64, max_num_seqs=8, max_model_len=1024, max_step_tokens=max_step_tokens
    )


@pytest.fixture
def runner(device: HostOnlyDevice) -> CudaRunner:
    return make_runner(device, 512)


@pytest.fixture
def crossings(device: HostOnlyDevice) -> Crossings:
    return Crossings(device)


def row(slot: int, start: int, **others: Any) -> PlanRow:
    """A decode row whose sequence has pages of its own."""
    pages = tuple(range(8 * slot, 8 * slot + pages_for(start + 1)))
    return PlanRow(slot, start, 1, (), pages, True, **others)


def begin(slot: int, start: int, params: SamplingParams = GREEDY, **others: Any) -> PlanRow:
    return row(slot, start, slot_start=SlotStart(params, (1,) * start, **others))


def run(runner: CudaRunner, *rows: PlanRow, masks: dict[int, Any] | None = None) -> None:
    step = runner.launch(StepPlan(0, rows))
    step.draw(masks or {})
    step.result()


def decode_steps(runner: CudaRunner, crossings: Crossings, num_steps: int) -> list[list[Crossing]]:
    """What each step moves, when the next one is launched before the last one's result is asked for."""
    slots, page_ids = np.arange(NUM_ROWS, dtype=np.int32), tuple[tuple[int, ...], ...]()
    with crossings:
        run(runner, *(begin(slot, FIRST_POSITION) for slot in slots.tolist()))
        found, pending = [], None
        for index in range(num_steps):
            crossings.seen.clear()
            start = FIRST_POSITION + 1 + index
            new_ids = tuple(row(slot, start).page_ids for slot in slots.tolist())
            page_ids = page_ids if new_ids == page_ids else new_ids
            columns = SteadyRows(slots, np.full(NUM_ROWS, start, dtype=np.int32), page_ids)
            step = runner.launch(StepPlan(index, (), steady=columns))
            step.draw({})
            if pending is not None:
                pending.result()
            pending = step
            found.append(list(crossings.seen))
    return found


def test_a_decode_step_is_a_copy_there_a_graph_and_a_copy_back(
    runner: CudaRunner, device: HostOnlyDevice, crossings: Crossings
) -> None:
    num_pinned = len(device.pinned_memory)
    num_steps = 2 * PAGE_TOKENS
    steps = decode_steps(runner, crossings, num_steps)
    assert len(device.pinned_memory) == num_pinned, "pinned memory is allocated while decoding"
    assert device.launches == [], "something is launched beside the graph"
    assert device.replays == [0] * (1 + num_steps)
    for there, back in steps:
        assert (there.op, there.is_to_device, there.is_asynchronous) == ("copy_", True, True)
        assert (back.op, back.is_to_device, back.is_asynchronous) == ("copy_", False, True)
    # New pages in some steps, and none in the others, are all that differs.
    sizes = {there.num_bytes for there, _ in steps}
    assert max(sizes) - min(sizes) == NUM_ROWS * 8
    assert {back.num_bytes for _, back in steps} == {2 * 8 * 4}


def test_what_a_step_moves_grows_with_its_own_width_alone(device: HostOnlyDevice, crossings: Crossings) -> None:
    narrow, wide = (decode_steps(make_runner(device, max_step_tokens), crossings, 3) for max_step_tokens in (16, 65536))
    assert [[crossing.num_bytes for crossing in step] for step in narrow] == [
        [crossing.num_bytes for crossing in step] for step in wide
    ]
    assert narrow[1][0].num_bytes < 1024


def test_the_host_waits_for_no_step_but_the_one_whose_result_it_wants(
    runner: CudaRunner, device: HostOnlyDevice, crossings: Crossings
) -> None:
    decode_steps(runner, crossings, 6)
    assert device.num_marks == 7
    # The first step's result, then by turns: memory that is used again, whose step has been waited for; a step's result.
    assert device.waits == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("rows", "num_there", "num_back"),
    [
        ([begin(0, 9, num_logprobs=3), begin(1, 9)], 1, 2),
        ([begin(0, 9, num_logprobs=0), begin(1, 9, num_logprobs=5)], 1, 2),
        ([row(0, 10, is_guided=True), row(1, 10)], 2, 1),
        ([begin(0, 9, SamplingParams(temperature=0.5, bad_words=((1, 2),), logit_bias=((3, 1.0),)))], 1, 1),
        ([begin(0, 9, SamplingParams(repetition_penalty=1.5))], 1, 1),
        ([begin(0, 9, SamplingParams(bad_words=tuple((n,) for n in range(200))))], 3, 1),
        ([PlanRow(0, 10, 3, (5, 6, 7), (0,), True, num_forced=2)], 2, 1),
        ([PlanRow(0, 0, 9, (1,) * 9, (0,), False, SlotStart(GREEDY, (1,) * 20))], 1, 0),
        ([PlanRow(0, 0, 9, (1,) * 9, (0,), True, SlotStart(GREEDY, (1,) * 9), num_prompt_logprobs=2)], 4, 2),
    ],
    ids=["log-probs", "all log-probs", "guided", "lists", "penalties", "more than fits", "forced", "prompt", "scored"],
)
def test_what_other_steps_move_is_not_waited_for_either(
    runner: CudaRunner, crossings: Crossings, rows: list[PlanRow], num_there: int, num_back: int
) -> None:
    with crossings:
        if rows[0].slot_start is None:
            run(runner, begin(0, 9), begin(1, 9))
        crossings.seen.clear()
        words = -(-TOY.vocab_size // 32)
        run(runner, *rows, masks={row.slot: np.ones(words, np.int32) for row in rows if row.is_guided})
    assert all(crossing.is_asynchronous for crossing in crossings.seen), crossings.seen
    assert [sum(crossing.is_to_device is way for crossing in crossings.seen) for way in (True, False)] == [
        num_there,
        num_back,
    ]


def test_a_result_that_is_asked_for_too_late_is_refused(runner: CudaRunner, crossings: Crossings) -> None:
    with crossings:
        steps = []
        for index in range(3):
            steps.append(runner.launch(StepPlan(index, (begin(0, 9) if index == 0 else row(0, 9 + index),))))
            steps[-1].draw({})
        with pytest.raises(AssertionError, match="a later step has the memory of this one"):
            steps[0].result()
        assert steps[1].result().token_ids == steps[2].result().token_ids == (1,)


DEVICE_TENSOR = torch.zeros(4, device="meta")


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.tensor([1, 2, 3], device="meta"),
        lambda: torch.as_tensor([1.0], device="meta"),
        lambda: DEVICE_TENSOR.new_tensor([1, 2, 3]),
        lambda: torch.zeros(3).to("meta"),
        lambda: torch.zeros(3).to("meta", non_blocking=True),
        lambda: DEVICE_TENSOR.copy_(torch.zeros(4), non_blocking=True),
        lambda: DEVICE_TENSOR.__setitem__(slice(0, 2), torch.zeros(2)),
        lambda: DEVICE_TENSOR[torch.tensor([1, 2])],
        lambda: DEVICE_TENSOR.index_put_((torch.tensor([1, 2]),), torch.zeros(2, device="meta")),
        lambda: DEVICE_TENSOR.cpu(),
        lambda: torch.zeros(4).copy_(DEVICE_TENSOR),
        lambda: DEVICE_TENSOR[0].item(),
        lambda: DEVICE_TENSOR.tolist(),
        lambda: DEVICE_TENSOR.numpy(),
        lambda: bool(DEVICE_TENSOR[0]),
        lambda: DEVICE_TENSOR[DEVICE_TENSOR > 0],
        lambda: DEVICE_TENSOR.nonzero(),
    ],
)
def test_whatever_makes_the_host_wait_is_noticed(crossings: Crossings, call: Callable[[], object]) -> None:
    assert is_noticed(crossings, call)


def test_pinned_memory_makes_it_wait_only_if_asked_to(device: HostOnlyDevice, crossings: Crossings) -> None:
    pinned = device.pinned(4, dtype=torch.float32)
    assert not is_noticed(crossings, lambda: DEVICE_TENSOR.copy_(pinned, non_blocking=True))
    assert not is_noticed(crossings, lambda: pinned[:2].copy_(DEVICE_TENSOR[:2], non_blocking=True))
    assert not is_noticed(crossings, lambda: DEVICE_TENSOR.fill_(3.0).add_(1))
    assert is_noticed(crossings, lambda: DEVICE_TENSOR.copy_(pinned))
    assert is_noticed(crossings, lambda: pinned.copy_(DEVICE_TENSOR))


def test_page_ids_through_pageable_memory_are_noticed(
    runner: CudaRunner, crossings: Crossings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake, planted: a copy of its own for each slot that has a new page."""

    def set_pages(state: SlotState, plan: StepPlan) -> None:
        for row in plan.rows:
            if len(row.page_ids) * PAGE_TOKENS > FIRST_POSITION + PAGE_TOKENS:
                page_ids = torch.tensor(row.page_ids, dtype=torch.int32)
                state.page_tables[row.slot, : len(page_ids)] = page_ids

    monkeypatch.setattr(SlotState, "set_pages", set_pages)
    steps = decode_steps(runner, crossings, PAGE_TOKENS)
    assert len(steps[0]) == 2
    assert len(steps[-1]) == 2 + NUM_ROWS
    assert not all(crossing.is_asynchronous for crossing in steps[-1])
