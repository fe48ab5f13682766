"""The last positions of 131,072 in the PyTorch runner: the end of a prompt and what is generated, in any chunks, on any pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from backend.engine.plan import PAGE_TOKENS
from backend.runner.torch_runner import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.unit.runner.driver import Driver, Script, random_prompt

LENGTH, NUM_OUTPUTS, NUM_NEW = 131_072, 3, 69
NUM_CACHED = LENGTH - NUM_OUTPUTS - NUM_NEW
NUM_PAGES = LENGTH // PAGE_TOKENS
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_heads": 1, "num_kv_heads": 1, "head_dim": 128, "ffn_size": 128, "vocab_size": 512, "num_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver[TorchRunner]]:
    """Its pages hold drawn values, in place of what 131,000 tokens would leave there."""
    folder = make_checkpoint(tmp_path_factory.mktemp("far"), **SIZES)
    runner = TorchRunner(
        folder,
        num_pages=NUM_PAGES + 2,
        max_num_seqs=2,
        max_model_len=LENGTH,
        weight_dtype="fp32",
        num_threads=1,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for kept in all_pages(runner):
            kept.copy_(torch.randn(kept.shape, generator=generator))
    yield Driver(runner)
    runner.close()


def all_pages(runner: TorchRunner) -> Iterator[torch.Tensor]:
    for layer in range(SIZES["num_layers"]):
        yield from runner._transformer._kv.layer(layer)


def far_script(driver: Driver[TorchRunner], chunks: tuple[int, ...], last_pages: tuple[int, ...]) -> Script:
    """The last tokens of a prompt and its outputs; those fill two pages, which are `last_pages`."""
    script = Script(
        random_prompt(np.random.default_rng(1), LENGTH - NUM_OUTPUTS),
        NUM_OUTPUTS + 1,
        chunks=chunks,
        pages=(*range(NUM_PAGES - 2), *last_pages),
        num_cached=NUM_CACHED,
    )
    with torch.inference_mode():
        for kept in all_pages(driver.runner):
            kept[last_pages[0]].view(torch.uint8).fill_(0x30)  # what is cached of the last page but one
    driver.run([script])
    return script


def test_chunks_and_pages_do_not_matter_at_the_end_of_131_072(driver: Driver[TorchRunner]) -> None:
    whole = far_script(driver, (NUM_NEW,), (NUM_PAGES - 2, NUM_PAGES - 1))
    assert len(whole.token_ids) == NUM_OUTPUTS + 1
    assert whole.num_computed == LENGTH
    cut = far_script(driver, (1, 33, 35), (NUM_PAGES + 1, NUM_PAGES))
    assert cut.token_ids == whole.token_ids
    for found, expected in zip(cut.logits[-NUM_OUTPUTS - 1 :], whole.logits, strict=True):
        assert torch.equal(found, expected)
