"""What is sent of a slot's state, and that it arrives where the kernels look for it."""

from __future__ import annotations

import numpy as np
import torch

from backend.engine.plan import PlanRow, SlotStart, SteadyRows, StepPlan
from backend.engine.request import SamplingParams
from backend.runner.cuda.slot_state import SlotState
from kernels.sample import COUNTS, IN_PROMPT, INTEGERS, REALS
from kernels.scatter import scatter_reference

V = 512


def make_state() -> SlotState:
    return SlotState(num_slots=3, vocab_size=V, max_pages=4, device=torch.device("cpu"))


def send(state: SlotState) -> list[list[int]]:
    """Bring the updates to the device's memory; what they were."""
    updates = torch.from_numpy(state.take_updates())
    count = torch.tensor([len(updates)], dtype=torch.int32)
    state.memory.copy_(scatter_reference(updates=updates, memory=state.memory, num_updates=count)["memory"])
    places = updates[:, 0].tolist()
    assert len(set(places)) == len(places)
    return updates.tolist()


def row(slot: int, *page_ids: int) -> PlanRow:
    return PlanRow(slot, 0, 1, (), page_ids, True)


def test_only_pages_that_have_changed_are_sent() -> None:
    state = make_state()
    state.set_pages(StepPlan(0, (row(1, 7, 5), row(2, 9))))
    assert [value for _, value in send(state)] == [7, 5, 9]
    state.set_pages(StepPlan(0, (row(1, 7, 5, 3), row(2, 9))))
    assert [value for _, value in send(state)] == [3]
    state.set_pages(StepPlan(0, (row(1, 7, 5, 3), row(2, 9))))
    assert send(state) == []
    state.set_pages(StepPlan(0, (row(1, 7, 6), row(2, 8))))
    assert [value for _, value in send(state)] == [7, 6, 8]
    assert state.page_tables.tolist() == [[0, 0, 0, 0], [7, 6, 3, 0], [8, 0, 0, 0]]


def test_pages_of_steady_rows_are_looked_at_when_their_columns_are_others() -> None:
    state = make_state()
    slots, starts = np.array([1, 2], dtype=np.int32), np.array([63, 5], dtype=np.int32)
    steady = SteadyRows(slots, starts, ((7,), (9,)))
    state.set_pages(StepPlan(0, (row(0, 4),), steady=steady))
    assert [value for _, value in send(state)] == [7, 9, 4]
    state.set_pages(StepPlan(1, (row(0, 4, 3),), steady=SteadyRows(slots, starts + 1, steady.page_ids)))
    assert [value for _, value in send(state)] == [3]
    state.set_pages(StepPlan(2, (), steady=SteadyRows(slots, starts + 2, ((7, 8), steady.page_ids[1]))))
    assert [value for _, value in send(state)] == [8]
    assert state.page_tables.tolist() == [[4, 3, 0, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


def test_a_start_brings_parameters_lists_and_the_prompt() -> None:
    state = make_state()
    params = SamplingParams(
        temperature=0.75, top_k=9, top_p=0.5, min_p=0.25, seed=2**64 - 3, repetition_penalty=1.5, presence_penalty=2.0,
        frequency_penalty=-1.0, logit_bias=((4, 1.5), (6, -2.0), (4, 0.25)), bad_words=((1, 2, 3), (8,), (8,)),
    )  # fmt: skip
    state.tensors["histories"].fill_(99)
    state.start(2, SlotStart(params, (5, 6, 5), min_tokens=3, ending_ids=(10, 11), num_logprobs=4))
    assert (state.tensors["counts"] == 0).all(), "nothing arrives before it is sent"
    send(state)
    found = {name: tensor[2] for name, tensor in state.tensors.items()}
    assert dict(zip(REALS, found["reals"].tolist(), strict=True)) == {
        "temperature": 0.75, "top_p": 0.5, "min_p": 0.25,
        "repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": -1.0,
    }  # fmt: skip
    integers = dict(zip(INTEGERS, found["integers"].tolist(), strict=True))
    assert integers == {"seed": -3, "top_k": 9, "min_tokens": 3, "num_tops": 4}
    assert dict(zip(COUNTS, found["counts"].tolist(), strict=True)) == {
        "num_biases": 2, "num_bad_words": 2, "num_endings": 2
    }  # fmt: skip
    assert found["bias_ids"][:2].tolist() == [4, 6]
    assert found["bias_values"][:2].tolist() == [1.75, -2.0]
    assert found["bad_words"][0].tolist() == [-1] * 61 + [1, 2, 3]
    assert found["bad_words"][1].tolist() == [-1] * 63 + [8]
    assert found["ending_ids"][:2].tolist() == [10, 11]
    assert found["recent_ids"].tolist() == [-1] * 63
    assert found["histories"].nonzero().flatten().tolist() == [5, 6]
    assert found["histories"][[5, 6]].tolist() == [IN_PROMPT, IN_PROMPT]
    assert not state.tensors["integers"][:2].any(), "another slot was changed"


def test_forced_ids_count_as_outputs() -> None:
    state = make_state()
    state.start(0, SlotStart(SamplingParams(frequency_penalty=1.0), (7,)))
    send(state)
    state.force(0, torch.tensor([5, 7, 5], dtype=torch.int32))
    assert state.tensors["num_outputs"].tolist() == [3, 0, 0]
    assert state.tensors["recent_ids"][0, -4:].tolist() == [-1, 5, 7, 5]
    assert state.tensors["histories"][0, [5, 7]].tolist() == [2, IN_PROMPT + 1]
