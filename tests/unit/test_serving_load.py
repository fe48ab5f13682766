"""The load of `make bench-serving` on a server made of arithmetic: what counts as steady, when requests arrive, the numbers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from tests.bench.serving.load import NO_TIME, Load, measure
from tests.bench.serving.scale import SMALL
from tests.bench.serving.scenarios import SCENARIOS, Scenario, make_prompt, poisson_arrivals
from tests.bench.serving.steady import RequestRecord, Window, plateau, summarise
from tests.bench.serving.way import Progress, ProgressQueue, ServingError


class SteppingWay:
    """A server whose clock is its steps: each gives every request that has its prompt a token, and reads one prompt."""

    step_s = 0.01

    def __init__(self, *, wrong_length: bool = False, prompts_a_step: int = 1) -> None:
        self.now_s = 0.0
        self.submitted: list[tuple[int, int]] = []
        self.in_flight: list[int] = []
        self.closed_prompts: dict[int, int] = {}
        self._wrong_length = wrong_length
        self._prompts_a_step = prompts_a_step
        self._waiting: list[int] = []
        self._left: dict[int, int] = {}

    def submit(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.submitted.append((len(prompt), max_tokens))
        self._waiting.append(handle)
        self._left[handle] = max_tokens + self._wrong_length

    def take_back(self, handle: int) -> None:
        self._left.pop(handle)
        self._waiting = [each for each in self._waiting if each != handle]

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        if not self._left:
            self.now_s += timeout_s
            return ()
        self.now_s += self.step_s
        started, self._waiting = self._waiting[: self._prompts_a_step], self._waiting[self._prompts_a_step :]
        news = []
        for handle in [each for each in self._left if each not in self._waiting or each in started]:
            self._left[handle] -= 1
            is_end = not self._left[handle]
            news.append(Progress(handle, 1, self.now_s, is_end))
            if is_end:
                del self._left[handle]
        self.in_flight.append(len(self._left))
        return news

    def wait_until_idle(self) -> None:
        assert not self._left

    def close(self) -> None: ...


SCENARIO = Scenario("100/50", 100, 50, 10)


def make_load(way: SteppingWay, scenario: Scenario = SCENARIO, patience_s: float = 10.0) -> Load:
    return Load(way, scenario, itertools.count(1), patience_s=patience_s, now_s=lambda: way.now_s)


def test_capacity_is_that_of_the_steady_state() -> None:
    way = SteppingWay()
    numbers = make_load(way).capacity(2.0)
    # Ten requests get a token each in a step of 10 ms, and every fifth step one ends and its successor has its first.
    assert numbers["tokens_per_s"] == pytest.approx(1000, rel=0.02)
    assert numbers["requests_per_s"] == pytest.approx(20, rel=0.02)
    assert numbers["requests_ended"] == pytest.approx(40, abs=2)
    assert numbers["in_flight"] == pytest.approx(10, rel=0.001)
    assert numbers["seconds"] == 2.0
    assert numbers["inter_token_p50_ms"] == numbers["gap_p99_ms"] == pytest.approx(10.0)
    assert numbers["first_token_p50_ms"] == pytest.approx(10.0)
    assert numbers["first_tokens"] == numbers["requests_ended"]
    assert numbers["without_first_token"] == 0


def test_the_ramp_up_spreads_requests_over_the_length_of_an_answer() -> None:
    way = SteppingWay()
    load = make_load(way)
    load.capacity(1.0)
    # Of the first ten, whose ages differ, in the order of their ends.
    ends = sorted(record.ended_s for record in load.records[:14])
    gaps = [b - a for a, b in itertools.pairwise(ends)][4:]
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.25)
    assert max(gaps) < 0.15
    assert all(prompt + output == 150 for prompt, output in way.submitted)
    assert (100, 50) in way.submitted
    assert max(prompt for prompt, _ in way.submitted) > 130


def test_when_prompts_are_the_bottleneck_they_queue() -> None:
    """Two tokens an answer: a prompt a step is not enough for ten requests, and the ramp-up ends all the same."""
    way = SteppingWay()
    numbers = make_load(way, Scenario("100/2", 100, 2, 10)).capacity(1.0)
    assert numbers["tokens_per_s"] == pytest.approx(200, rel=0.05)
    assert numbers["first_token_p50_ms"] == pytest.approx(90, abs=11)


@pytest.mark.parametrize("num_output", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("level", [2, 4, 9])
def test_short_answers_come_to_a_steady_state(num_output: int, level: int) -> None:
    """Requests of the ramp-up end while others are begun."""
    numbers = make_load(SteppingWay(prompts_a_step=2), Scenario("", 10, num_output, level)).capacity(1.0)
    assert numbers["in_flight"] == pytest.approx(level, rel=0.001)
    assert numbers["tokens_per_s"] == pytest.approx(100 * min(level, 2 * num_output), rel=0.05)


def test_arrivals_by_themselves_follow_at_the_share_that_is_asked_for() -> None:
    way = SteppingWay()
    load = make_load(way)
    capacity = load.capacity(1.0)
    rate = 0.5 * capacity["requests_per_s"]
    numbers = load.poisson(rate, 5, settle_s=1.0, window_s=20.0, seed=3)
    assert numbers["rate_per_s"] == pytest.approx(10, rel=0.03)
    assert numbers["arrived"] == pytest.approx(200, rel=0.15)
    # Little's law: 10 a second that take half a second each.
    assert numbers["in_flight"] == pytest.approx(numbers["arrived"] / 20 * 0.5, rel=0.1)
    assert numbers["tokens_per_s"] == pytest.approx(numbers["arrived"] / 20 * 50, rel=0.1)
    assert numbers["first_tokens"] == numbers["arrived"]
    load.end()
    again = make_load(SteppingWay())
    again.capacity(1.0)
    assert again.poisson(rate, 5, settle_s=1.0, window_s=20.0, seed=3) == numbers


class BlockingWay(SteppingWay):
    """Its progress takes 0.3 s: whatever is due meanwhile is submitted late."""

    step_s = 0.3

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        if not self._left:
            self.now_s += self.step_s
            return ()
        return super().progress(timeout_s)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_due_while_progress_blocks_is_waited_for(seed: int) -> None:
    """The window ends within a step: arrivals of that step are counted, each with its first token."""
    load = make_load(way := BlockingWay())
    numbers = load.poisson(8.0, 0, settle_s=0.0, window_s=2.0, seed=seed)
    assert way.now_s > 2.0
    assert numbers["arrived"] == len(list(itertools.takewhile(lambda at_s: at_s <= 2.0, poisson_arrivals(8.0, seed))))
    assert numbers["first_tokens"] == numbers["arrived"]
    assert numbers["without_first_token"] == 0


def test_a_cell_has_capacity_and_loads_and_stops_when_the_time_is_over() -> None:
    way, cells = SteppingWay(), list[dict[str, Any]]()
    times = iter((True, False))
    loads = Load.__init__.__kwdefaults__
    assert loads is not None
    scale = SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loads, "now_s", lambda: way.now_s)
        measure(
            way,
            SCENARIO,
            itertools.count(1),
            scale,
            shares=(0.5, 0.8),
            time_is_left=lambda: next(times),
            keep=cells.append,
        )
    assert [len(cell["poisson"]) for cell in cells] == [2, 2, 2]  # one list, which grew
    first, second = cells[-1]["poisson"]
    assert first["load"] == 0.8
    assert first["rate_per_s"] == pytest.approx(0.8 * cells[0]["capacity"]["requests_per_s"], rel=1e-3)
    assert second == {"load": 0.5, "skipped": NO_TIME}


def test_an_answer_of_another_length_ends_the_run() -> None:
    with pytest.raises(ServingError, match=r"a request gave \d+ tokens instead of"):
        make_load(SteppingWay(wrong_length=True)).capacity(1.0)


def test_without_steady_state_it_says_why() -> None:
    with pytest.raises(
        ServingError, match=r"no steady state of 10 requests after 0.5 s: \d+ run, 1 of \d+ had no token"
    ):
        make_load(SteppingWay(prompts_a_step=0), patience_s=0.5).capacity(1.0)


def record(due_s: float, first_s: float, ended_s: float, gap_s: float = 1.0) -> RequestRecord:
    """A token at `first_s`, and one every `gap_s` until `ended_s`."""
    made = RequestRecord(due_s, 0)
    at_s = first_s
    while at_s <= ended_s:
        made.add(at_s, 1)
        at_s += gap_s
    made.ended_s = ended_s
    made.num_tokens = len(made.times_s)
    return made


def test_ramp_up_and_ramp_down_are_cut_off() -> None:
    """Two at a time from 1 to 13; the second prompt of the ramp-up takes until 4, and nobody follows the one that ends at 13."""
    records = [record(0, 2, 9), record(1, 4, 13), record(9, 10, 20)]
    assert plateau(records, 2) == Window(4, 13)
    assert plateau(records[:1], 2) is None
    assert plateau([records[0], RequestRecord(1, 5)], 2) is None
    # The request that is due in the moment of an end takes its place; one that is due later does not, and begins another.
    assert plateau([records[0], records[1], record(14, 15, 20)], 2) == Window(4, 9)
    assert plateau([records[0], records[1], record(9.5, 10, 20)], 2) == Window(10, 13)
    # One that ends before another has its first token leaves no steady state.
    assert plateau([record(0, 2, 3), record(1, 4, 13)], 2) is None


def test_the_numbers_of_a_window_by_hand() -> None:
    late = RequestRecord(11, 9)
    records = [record(0, 2, 9), record(1, 4, 13, gap_s=3.0), record(9, 11, 20), late]
    numbers = summarise(records, Window(4, 12), now_s=15)
    # Tokens behind 4 up to 12: 5..9, then 7 and 10, then 11 and 12.
    assert numbers["output_tokens"] == 5 + 2 + 2
    assert numbers["tokens_per_s"] == pytest.approx(9 / 8, abs=0.06)
    assert numbers["requests_ended"] == 1
    assert numbers["in_flight"] == pytest.approx((5 + 8 + 3 + 1) / 8, abs=0.01)
    # Due in the window: at 9 with its first token after 2 s, and at 11 without any after 4.
    assert (numbers["first_tokens"], numbers["without_first_token"]) == (2, 1)
    assert (numbers["first_token_p50_ms"], numbers["first_token_p99_ms"]) == (2000, 4000)
    assert (numbers["inter_token_p50_ms"], numbers["inter_token_p99_ms"]) == (1000, 3000)
    assert numbers["gap_p99_ms"] == 3000


def test_several_tokens_in_a_response_are_that_many() -> None:
    made = RequestRecord(0, 13)
    for at_s, num_tokens in ((1, 1), (2, 4), (4, 8)):
        made.add(at_s, num_tokens)
    numbers = summarise([made], Window(0, 10), now_s=10)
    assert numbers["output_tokens"] == 13
    assert numbers["inter_token_p50_ms"] == 250
    assert (numbers["gap_p50_ms"], numbers["gap_p99_ms"]) == (1000, 2000)


def test_poisson_arrivals_have_their_rate_their_spread_and_their_seed() -> None:
    times = list(itertools.islice(poisson_arrivals(4.0, 7), 20_000))
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.02)
    # Exponential: as much spread as mean, and a share of 1 / e is longer than the mean.
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)
    assert list(itertools.islice(poisson_arrivals(4.0, 7), 10)) == times[:10]
    assert list(itertools.islice(poisson_arrivals(4.0, 8), 10)) != times[:10]


def test_prompts_are_distinct_from_their_first_page() -> None:
    prompts = [make_prompt(number, 70) for number in range(200)]
    assert {len(prompt) for prompt in prompts} == {70}
    assert len({prompt[:64] for prompt in prompts}) == 200
    assert make_prompt(5, 70) == prompts[5]


def test_smaller_scenarios_keep_their_names_and_proportions() -> None:
    small = SCENARIOS[3].smaller(40, 4)
    assert small == Scenario("20000/2000", 500, 50, 4)
    assert [scenario.name for scenario in SMALL.scenarios] == [scenario.name for scenario in SCENARIOS]


def test_a_failure_reaches_the_load() -> None:
    news = ProgressQueue()
    news.put((Progress(1, 1, 0.0, False),))
    news.put((Progress(2, 1, 0.0, False), Progress(3, 1, 0.0, True)))
    assert [each.handle for each in news.take(0.0)] == [1, 2, 3]
    assert news.take(0.0) == []
    news.put(ServingError("gone"))
    with pytest.raises(ServingError, match="gone"):
        news.take(1.0)
