"""Pages that go to the host and come back elsewhere, prefixes that others wrote, ids put in by a grammar."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.checkpoint.model_config import read_model_config
from backend.engine.plan import PageCopy, PlanRow, SlotStart, StepPlan, StepResult
from backend.engine.request import SamplingParams
from backend.runner.host_pages import HostPages
from backend.runner.kv_pages import KvPages
from backend.runner.model_runner import Mask
from backend.runner.torch_runner import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.unit.runner.driver import Driver, Script, random_prompt
from tests.unit.runner.test_batch_invariance import PARAMS, assert_equal
from tests.unit.runner.test_logit_rules import mask_of

NUM_PAGES, NUM_HOST_PAGES, NUM_SLOTS = 14, 14, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), num_heads=8, num_kv_heads=2)


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver[TorchRunner]]:
    runner = TorchRunner(
        folder,
        num_pages=NUM_PAGES,
        num_host_pages=NUM_HOST_PAGES,
        max_num_seqs=NUM_SLOTS,
        max_model_len=512,
        num_threads=1,
    )
    yield Driver(runner)
    runner.close()


class Swapper:
    """Moves resting scripts out at random and brings chosen ones back, into the pages that were freed last."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._free = generator.permutation(NUM_PAGES).tolist()
        self._free_host = generator.permutation(NUM_HOST_PAGES).tolist()
        self._on_host: dict[int, list[int]] = {}
        self.num_moved = 0

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(num_pages))

    def move(self, chosen: list[Script], resting: list[Script]) -> tuple[PageCopy, ...]:
        copies = []
        for script in resting:
            if script.slot not in self._on_host and self._generator.random() < 0.7:
                hosts = [self._free_host.pop() for _ in script.pages]
                copies += [PageCopy(*pair, True) for pair in zip(script.pages, hosts, strict=True)]
                self._free += script.pages
                self._on_host[script.slot] = hosts
        for script in chosen:
            hosts = self._on_host.pop(script.slot, [])
            if hosts:
                script.pages = self.allocate(len(hosts))
                copies += [PageCopy(*pair, False) for pair in zip(hosts, script.pages, strict=True)]
                self._free_host += hosts
        self.num_moved += len(copies)
        return tuple(copies)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_sequences_that_are_moved_give_the_same_bits(driver: Driver[TorchRunner], seed: int) -> None:
    generator = np.random.default_rng(seed)
    swapper = Swapper(generator)
    scripts = [
        Script(
            random_prompt(generator, int(generator.integers(1, 90))),
            num_outputs=6,
            params=PARAMS[generator.integers(len(PARAMS))],
            slot=slot,
            num_logprobs=2,
        )
        for slot in range(NUM_SLOTS)
    ]
    for script in scripts:
        script.pages = swapper.allocate(script.num_pages)

    def choose(active: list[Script]) -> list[Script]:
        return [active[i] for i in generator.permutation(len(active))[: generator.integers(1, 3)]]

    driver.run(scripts, choose, swapper.move)
    assert swapper.num_moved > 10
    for script in scripts:
        assert_equal(script, driver.alone(script))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_made_in_order(folder: Path, dtype: torch.dtype) -> None:
    config = read_model_config(folder)
    kv = KvPages(config, 3, device=torch.device("cpu"), dtype=dtype)
    host = HostPages(config, 2, kv)
    for page in range(3):
        for sign, part in zip((1, -1), kv.page(page), strict=True):
            part.copy_(torch.arange(part.numel()).view(part.shape) % 97 * sign + 100 * page)
    before = [[part.clone() for part in kv.page(page)] for page in range(3)]
    host.run((PageCopy(0, 1, True), PageCopy(1, 0, True), PageCopy(1, 1, False), PageCopy(2, 1, True)))
    host.run((PageCopy(0, 2, False), PageCopy(1, 0, False)))
    for page, source in enumerate((2, 0, 1)):
        for part, expected in zip(kv.page(page), before[source], strict=True):
            assert torch.equal(part, expected)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_host_pages_that_are_not_used_take_no_memory(folder: Path) -> None:
    config = read_model_config(folder)
    kv = KvPages(config, 1, device=torch.device("cpu"), dtype=torch.float32)
    before = resident_bytes()
    host = HostPages(config, 8192, kv)
    host.run((PageCopy(0, 8191, True),))
    assert sum(part.nbytes for part in (host._keys, host._values)) == 2**30
    assert resident_bytes() - before < 2**25


@pytest.mark.parametrize("num_cached", [64, 128])
def test_a_prefix_that_another_slot_wrote(driver: Driver[TorchRunner], num_cached: int) -> None:
    generator = np.random.default_rng(num_cached)
    prefix = random_prompt(generator, num_cached)
    writer = Script((*prefix, *random_prompt(generator, 9)), slot=4, pages=(3, 8, 5), num_outputs=3)
    readers = [
        Script(
            (*prefix, *random_prompt(generator, length)),
            num_outputs=4,
            params=params,
            slot=slot,
            pages=(*(3, 8)[: num_cached // 64], *pages),
            num_cached=num_cached,
            num_logprobs=1,
        )
        for slot, (length, params, pages) in enumerate(
            [(1, PARAMS[4], (0,)), (40, PARAMS[5], (1,)), (70, PARAMS[6], (6, 7))]
        )
    ]
    driver.run([writer])
    driver.run(readers)
    for script in readers:
        assert_equal(script, driver.alone(script))


FORCED_PARAMS = SamplingParams(
    temperature=0.9,
    seed=8,
    repetition_penalty=1.5,
    frequency_penalty=0.4,
    bad_words=((7, 300), (301, 7, 302)),
    logit_bias=((2, 90.0),),  # an ending, drawn as soon as it may be
)


def run_step(runner: TorchRunner, row: PlanRow, masks: dict[int, Mask], others: tuple[PlanRow, ...] = ()) -> StepResult:
    step = runner.launch(StepPlan(0, (row, *others)))
    step.draw(masks)
    return step.result()


@pytest.mark.parametrize("forced", [(7,), (301, 7), tuple(range(200, 270))])
def test_forced_ids_are_as_if_each_was_drawn_under_a_mask_of_one_id(
    driver: Driver[TorchRunner], forced: tuple[int, ...]
) -> None:
    runner, vocab_size = driver.runner, driver.runner.config.vocab_size
    prompt = random_prompt(np.random.default_rng(1), 30)
    start = SlotStart(FORCED_PARAMS, prompt, len(forced) + 8, (2, 9), 2)
    pages = tuple(range(3))
    neighbour = PlanRow(4, 0, 20, prompt[:20], (9,), True, SlotStart(PARAMS[1], prompt[:20]))

    def generate(is_at_once: bool) -> list[StepResult]:
        results = [run_step(runner, PlanRow(2, 0, 30, prompt, pages, True, start), {2: mask_of({33}, vocab_size)})]
        if is_at_once:
            row = PlanRow(2, 30, 1 + len(forced), (33, *forced), pages, True, num_forced=len(forced))
            result = run_step(runner, row, {}, (neighbour,))
            results.append(StepResult(result.token_ids[:1], result.log_probs[:1]))
        else:
            for position, token_id in enumerate(forced, 30):
                row = PlanRow(2, position, 1, (), pages, True)
                drawn = run_step(runner, row, {2: mask_of({token_id}, vocab_size)})
                assert drawn.token_ids == (token_id,)
            results.append(run_step(runner, PlanRow(2, 30 + len(forced), 1, (), pages, True), {}))
        for position in range(31 + len(forced), 45 + len(forced)):
            results.append(run_step(runner, PlanRow(2, position, 1, (), pages, True), {}))
        return results

    at_once = generate(is_at_once=True)
    assert at_once == generate(is_at_once=False)
    assert [result.token_ids[0] == 2 for result in at_once] == [False] * 8 + [True] * (len(at_once) - 8)
