"""The peer `transformers`: its continuous batching, asked in its own process without any network; a closed loop of streams.

    python -m tests.bench.peers.continuous_batching JOB

JOB is JSON: {"checkpoint", "prompts": [ids, ...], "streams": [1, 4, ...], "seconds", "num_prompt_tokens", "max_tokens",
"num_threads", "end_id"}. Prints a JSON line with the greedy answers (ids) to `prompts`, then one with the report of each number
of streams, then waits for SIGTERM.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from client.load_report import LoadReport
from tests.bench.peers.closed_loop import closed_loop

PAGE_TOKENS = 64
_MAX_BATCH_TOKENS = 512
NO_END = -1


async def ask(
    manager: Any, request_id: str, ids: list[int], max_tokens: int, end_id: int, report: LoadReport
) -> list[int]:
    """One request: every result is noted in `report`; its ids."""
    loop, results = asyncio.get_running_loop(), asyncio.Queue[Any]()
    manager.register_result_handler(request_id, results.put_nowait)
    last_s, num_tokens = loop.time(), 0
    manager.add_request(ids, request_id, max_tokens, streaming=True, eos_token_id=end_id)
    while True:
        result = await results.get()
        if result.error is not None:
            raise RuntimeError(result.error)
        if (num_new := len(result.generated_tokens) - num_tokens) > 0:
            report.add_response(num_new, loop.time() - last_s, is_first=not num_tokens)
            last_s, num_tokens = loop.time(), num_tokens + num_new
        if result.is_finished():
            return list(result.generated_tokens)


async def measure(manager: Any, job: dict[str, Any], num_streams: int) -> LoadReport:
    """`num_streams` requests at a time for the job's seconds; what is left then is cancelled."""
    names, running = (f"{num_streams}-{number}" for number in itertools.count()), set[str]()

    async def ask_next(prompt: list[int], report: LoadReport) -> None:
        running.add(name := next(names))
        await ask(manager, name, prompt, job["max_tokens"], NO_END, report)
        running.discard(name)

    report = await closed_loop(ask_next, num_streams, job["seconds"], job["num_prompt_tokens"])
    for name in running:
        manager.cancel_request(name)
    await asyncio.sleep(0.5)
    return report


async def serve(manager: Any, job: dict[str, Any]) -> None:
    """Answers, then each number of streams."""
    scratch = LoadReport(num_streams=1, num_prompt_tokens=0)
    answers = [await ask(manager, f"a-{i}", ids, 160, job["end_id"], scratch) for i, ids in enumerate(job["prompts"])]
    print(json.dumps(answers), flush=True)
    for num_streams in job["streams"]:
        print((await measure(manager, job, num_streams)).as_json(), flush=True)


def start_manager(
    model: Any, *, max_tokens: int, num_blocks: int, max_batch_tokens: int = _MAX_BATCH_TOKENS, is_sampled: bool = False
) -> Any:
    """Its manager with its thread running; ids are drawn at temperature 1 when `is_sampled`, else greedy."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=max_tokens, do_sample=is_sampled),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens
        ),
    )
    manager.start()
    return manager


def main(job: dict[str, Any]) -> None:
    """Load the model and serve."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    torch.set_num_threads(job["num_threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32).eval()
    tokens_per_stream = job["num_prompt_tokens"] + job["max_tokens"] + PAGE_TOKENS
    num_blocks = max(job["streams"]) * tokens_per_stream // PAGE_TOKENS + 16
    manager = start_manager(model, max_tokens=job["max_tokens"], num_blocks=num_blocks)
    asyncio.run(serve(manager, job))
    signal.sigwait({signal.SIGTERM})
    os._exit(0)  # the manager's thread would be waited for


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
