"""The closed loop of `client.load` for peers that it cannot ask: the same prompts, so many requests at a time, for so long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from client.load import LoadPlan
from client.load_report import LoadReport
from client.params import GenerationParams

Ask = Callable[[list[int], LoadReport], Awaitable[object]]
"""Sends one prompt and notes every response in the report; whatever it raises is a request that did not come back whole."""


async def closed_loop(ask: Ask, num_streams: int, seconds: float, num_prompt_tokens: int) -> LoadReport:
    """Keep `num_streams` streams busy for `seconds`, then cancel what is left.

    The first failure ends the loop; every failure is counted.
    """
    plan = LoadPlan(
        url=None, model="", num_streams=num_streams, num_requests=1, num_prompt_tokens=num_prompt_tokens,
        max_seconds=seconds, first_id=1000, last_id=3999, seed=num_streams, params=GenerationParams(),
    )  # fmt: skip
    report = LoadReport(num_streams=num_streams, num_prompt_tokens=num_prompt_tokens)

    async def work(stream: int) -> None:
        index = stream
        while True:
            await ask(list(plan.prompt(index)), report)
            report.num_done += 1
            index += num_streams

    report.start()
    workers = [asyncio.create_task(work(stream)) for stream in range(num_streams)]
    await asyncio.wait(workers, timeout=seconds, return_when="FIRST_EXCEPTION")
    report.end()
    for worker in workers:
        worker.cancel()
    for outcome in await asyncio.gather(*workers, return_exceptions=True):
        if isinstance(outcome, asyncio.CancelledError):
            report.num_unfinished += 1
        else:
            report.add_failure(repr(outcome))
    return report
