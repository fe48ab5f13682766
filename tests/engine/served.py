"""What sequences say that a Scheduler runs on a real runner, one step ahead as the engine does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from backend.engine.events import Event, FinishReason, RequestFailed, one_by_one
from backend.engine.plan import StepPlan, TokenLogProbs
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.runner.model_runner import InFlightStep, Mask, ModelRunner
from tests.engine.device import EOS_ID
from tests.engine.grammar import compile_places
from tests.engine.trace import Abort, Add, Order

VOCAB_SIZE = 512
TOKEN_BYTES = tuple(bytes([number % 256]) if number > 9 else b"" for number in range(VOCAB_SIZE))


@dataclass
class Spoken:
    """All that one sequence said."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    prompt_log_probs: tuple[TokenLogProbs, ...] = ()
    reason: FinishReason | None = None


class Served:
    """What came of a run of a Scheduler over a runner; guides are those of `tests.engine.grammar`."""

    def __init__(self, runner: ModelRunner, limits: SchedulerLimits) -> None:
        self.spoken: defaultdict[tuple[int, int], Spoken] = defaultdict(Spoken)
        self.failed: set[int] = set()
        self.plans: list[StepPlan] = []
        limits = replace(limits, caches_outputs=runner.caches_outputs)
        self.scheduler = Scheduler(limits, TOKEN_BYTES, EOS_ID)
        self._runner = runner
        self._in_flight: tuple[StepPlan, InFlightStep] | None = None
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
                guide = order.request.guide
                self.scheduler.add(order.request, self._now_ns, None if guide is None else compile_places(guide))
            elif isinstance(order, Abort):
                self._record(self.scheduler.abort(order.handle))
        plan = self.scheduler.plan(self._now_ns)
        launched = None if plan is None else (plan, self._runner.launch(plan))
        if launched is not None:
            self.plans.append(launched[0])
            if not launched[0].needs_masks:
                launched[1].draw({})
        if self._in_flight is not None:
            self._record(self.scheduler.commit(self._in_flight[0], self._in_flight[1].result(), self._now_ns))
        if launched is not None and launched[0].needs_masks:
            launched[1].draw(_widened(self.scheduler.masks(launched[0])))
        self._in_flight = launched
        self.scheduler.check_integrity()

    def _record(self, events: list[Event]) -> None:
        for event in one_by_one(events):
            if isinstance(event, RequestFailed):
                self.failed.add(event.handle)
                continue
            spoken = self.spoken[event.handle, event.sequence_index]
            spoken.ids += event.token_ids
            spoken.log_probs += event.log_probs
            if event.finish is not None:
                spoken.reason, spoken.prompt_log_probs = event.finish.reason, event.finish.prompt_log_probs


def _widened(masks: Mapping[int, Mask]) -> dict[int, Mask]:
    """Masks of the first ids as masks of the whole vocabulary."""
    return {slot: np.pad(mask, (0, VOCAB_SIZE // 32 - len(mask))) for slot, mask in masks.items()}
