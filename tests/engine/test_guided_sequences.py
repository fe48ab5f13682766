"""Grammars: masks are obeyed, forced ids come the same way however they are planned, and a broken grammar fails alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backend.engine.events import FailureKind, FinishReason, RequestFailed, TokenEvent
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import SchedulerLimits
from backend.errors import RequestError
from tests.engine.device import EOS_ID
from tests.engine.grammar import PlacesGuide, PlacesMatcher, guide_spec
from tests.engine.trace import Add, Trace

LIMITS = SchedulerLimits(num_pages=16, max_num_seqs=4, max_step_tokens=64, max_queued_requests=8, steady_from=1)
FORCED = "2,3 =4 =5 =6 =7 8,9 =10 =11 2,3"


def ask(handle: int, guide: str = FORCED, **fields: Any) -> GenerationRequest:
    request = GenerationRequest(
        handle, "", (2, 3), 40, sampling=SamplingParams(temperature=1, seed=handle), guide=guide_spec(guide)
    )
    return replace(request, **fields)


def free(handle: int, **fields: Any) -> GenerationRequest:
    return replace(ask(handle), guide=None, ignore_eos=True, **fields)


def num_forced(trace: Trace) -> list[int]:
    return [row.num_forced for plan in trace.plans for row in plan.rows if row.num_forced]


def test_the_ids_follow_the_grammar_to_its_end() -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(handle)) for handle in (1, 2, 3)]])
    for handle in (1, 2, 3):
        ids = trace.ids_of(handle)
        assert (ids[1:5], ids[6:8], ids[9:]) == ((4, 5, 6, 7), (10, 11), (EOS_ID,))
        assert trace.finish_of(handle).reason is FinishReason.STOP


def test_forced_ids_run_in_one_step() -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, "2,3 =4 =5 =6 =7 8,9"))]])
    assert num_forced(trace) == [3], "the first of four is being drawn when the others are put in behind it"
    assert len(trace.plans) < 8, "fewer steps than tokens"


@pytest.mark.parametrize("budget", [2, 3, 4, 64])
@pytest.mark.parametrize("num_steps_ahead", [0, 1])
def test_the_budget_decides_how_many_but_not_which(budget: int, num_steps_ahead: int) -> None:
    roomy = Trace(LIMITS, 1)
    roomy.play([[Add(ask(1))]])
    trace = Trace(replace(LIMITS, max_num_seqs=2, max_step_tokens=budget), num_steps_ahead)
    trace.play([[Add(ask(1)), Add(free(2))]])
    assert trace.ids_of(1) == roomy.ids_of(1)
    assert max(num_forced(trace), default=0) < budget


@pytest.mark.parametrize("max_tokens", range(1, 11))
def test_max_tokens_may_cut_anywhere(max_tokens: int) -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, max_tokens=max_tokens)), Add(ask(2))]])
    finish = trace.finish_of(1)
    assert finish.num_output_tokens == min(max_tokens, 10)
    assert finish.reason is (FinishReason.LENGTH if max_tokens < 10 else FinishReason.STOP)


@pytest.mark.parametrize(("stop", "num_ids"), [(b". ", None), ("é".encode(), 6), (b" .", 5)])
def test_a_stop_string_may_end_in_the_middle_of_forced_ids(stop: bytes, num_ids: int | None) -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, "2,3 =4 =5 =6 =7 =8 =9 =10", stop_strings=(stop,))), Add(ask(2))]])
    assert num_forced(trace)
    assert trace.finish_of(1).num_output_tokens == (9 if num_ids is None else num_ids)


def test_a_stop_id_may_end_in_the_middle_of_forced_ids() -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, stop_token_ids=(6,)))]])
    assert trace.ids_of(1)[1:] == (4, 5, 6)
    assert trace.finish_of(1).stop_reason == "6"


def test_with_log_probabilities_every_id_is_drawn() -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, num_logprobs=1))]])
    assert num_forced(trace) == []
    assert all(event.log_probs for event in trace.events[1] if isinstance(event, TokenEvent))


def test_forced_ids_across_a_page_border_find_their_pages() -> None:
    trace = Trace(LIMITS, 1)
    guide = "2,3 " + "=4 =5 =6 " * 40 + "8,9"
    trace.play([[Add(ask(1, guide, max_tokens=130, prompt_token_ids=(3,) * 60))]])
    assert max(num_forced(trace)) > 60
    assert trace.finish_of(1).reason is FinishReason.STOP


def test_forced_ids_beyond_max_tokens_are_not_put_in_and_take_no_page() -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, "2,3 " + "=4 =5 " * 40, max_tokens=5, prompt_token_ids=(3,) * 60))]])
    assert num_forced(trace) == [2], "the first id, one that is drawn, two behind it, and a last one that is drawn"


def test_every_sample_has_a_matcher_of_its_own() -> None:
    trace = Trace(LIMITS, 1)
    trace.play([[Add(ask(1, "2,3,4,5 2,3,4,5 2,3,4,5 =6 =7", num_return_sequences=4))]])
    assert len({trace.ids_of(1, index) for index in range(4)}) > 1


def test_a_finished_sequence_gets_no_mask() -> None:
    trace = Trace(LIMITS, 1)
    trace.turn([Add(ask(1))])
    trace.scheduler.abort(1)
    (plan, _) = trace._in_flight[-1]
    assert plan.needs_masks
    assert trace.scheduler.masks(plan) == {}


class Complex(PlacesMatcher):
    """Proves too complex at a place, when asked for a mask or when told an id."""

    def __init__(self, fails_in: str, place: int) -> None:
        super().__init__(tuple("2,3,4" for _ in range(20)))
        self._fails_in, self._place = fails_in, place

    def mask(self) -> Any:
        self._fail_in("mask")
        return super().mask()

    def accept(self, token_id: int) -> None:
        self._fail_in("accept")
        super().accept(token_id)

    def _fail_in(self, what: str) -> None:
        if what == self._fails_in and self._index == self._place:
            raise RequestError("guided_decoding_guide", "too complex")


class ComplexGuide(PlacesGuide):
    def __init__(self, fails_in: str, place: int) -> None:
        self._what = fails_in, place

    def start(self) -> PlacesMatcher:
        return Complex(*self._what)


@pytest.mark.parametrize("fails_in", ["mask", "accept"])
@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_a_grammar_that_proves_too_complex_fails_alone(fails_in: str, place: int, num_return_sequences: int) -> None:
    trace = Trace(
        replace(LIMITS, num_host_pages=1), 1
    )  # with host pages Trace lets a sequence rest, as the failed one does
    trace.turn([Add(free(1, max_tokens=12))])
    bad = replace(ask(2), guide=None, num_return_sequences=num_return_sequences)
    trace.scheduler.add(bad, trace.now_ns, ComplexGuide(fails_in, place))
    trace.requests[2], trace.arrivals_ns[2], trace.events[2] = bad, trace.now_ns, []
    while trace.scheduler.has_work:
        trace.turn([])
    failures = [event for event in trace.events[2] if isinstance(event, RequestFailed)]
    assert [(failed.kind, failed.message) for failed in failures] == [
        (FailureKind.INVALID, "guided_decoding_guide: too complex")
    ]
    assert trace.events[2][-1] is failures[0]
    assert len(trace.ids_of(2)) == place
    assert trace.finish_of(1).num_output_tokens == 12
    assert trace.scheduler.stats().num_pages_held == 0
