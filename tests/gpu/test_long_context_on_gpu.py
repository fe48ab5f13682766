"""131,072 tokens for real: keys at far positions, pools beyond 4 GB, and a prompt in chunks against the whole, bit for bit.

With --emulated the same at toy lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels.guarded import as_bytes
from kernels.launch import Device

pytest.importorskip("safetensors")
pytest.importorskip("msgspec")
pytest.importorskip("llguidance")

from backend.engine.plan import PlanRow, SlotStart, StepPlan, StepResult
from backend.engine.request import SamplingParams
from backend.plan import NEMO_12B as NEMO
from backend.runner.cuda.runner import CudaRunner
from kernels.decode_attention import OP as DECODE
from kernels.prefill_attention import OP as PREFILL
from tests.bench.gpu.models import TOY, pages_for, random_runner
from tests.kernels.far_probes import Probes, check_decode, check_prefill, launched

pytestmark = pytest.mark.gpu
KV_DTYPES = pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
NUM_DECODES = 3


@pytest.fixture(scope="module")
def length(is_emulated: bool) -> int:
    """On the emulator two chunks of decode attention and three tiles of prefill attention, none of them full."""
    return 300 if is_emulated else 131_072


@KV_DTYPES
def test_keys_at_far_positions_are_found(device: Device, length: int, is_fp8: bool) -> None:
    probes = Probes.make(length, 8, 2, is_fp8=is_fp8)
    rows = [(probe, length) for probe in range(len(probes.positions))]
    # The last key that a row sees, and the first that it does not.
    rows += [(probe, probes.positions[probe] + sees) for probe in (2, 5) for sees in (0, 1)]
    check_decode(device, probes, rows)
    check_prefill(device, probes, length - 20, 20)


@KV_DTYPES
def test_pools_beyond_4_gb(device: Device, is_fp8: bool) -> None:
    """Pages on both sides of 2^31 and 2^32 bytes and of 2^31 elements give the bits that they give at the beginning of a pool.

    Memory that nobody writes costs the emulator's machine nothing.
    """
    page_elements = 8 * 64 * 128
    num_pages = 2**32 // page_elements + 4
    edges = [0, 2**30 // page_elements, 2**31 // page_elements, num_pages - 1]
    page_ids = torch.tensor(sorted({page for edge in edges for page in (edge, max(0, edge - 1))}))
    probes = Probes.make(len(page_ids) * 64 - 5, 32, 8, is_fp8=is_fp8)
    far = probes.moved(num_pages, page_ids.flip(0), device.torch_device)
    assert far.k_pages.numel() > 2**32
    rows = [(probe, probes.length) for probe in range(len(probes.positions))]
    chunk = probes.length - 20, 20
    for op, near_inputs, far_inputs in (
        (DECODE, probes.decode_inputs(rows), far.decode_inputs(rows)),
        (PREFILL, probes.prefill_inputs(*chunk), far.prefill_inputs(*chunk)),
    ):
        near_out, far_out = launched(op, near_inputs, device), launched(op, far_inputs, device)
        assert torch.equal(as_bytes(near_out), as_bytes(far_out)), op.name


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def runner(device: Device, is_emulated: bool, length: int, request: pytest.FixtureRequest) -> Iterator[CudaRunner]:
    """Two layers, because what the first one's attention gives decides what the second one keeps in its pages."""
    made = random_runner(
        TOY if is_emulated else replace(NEMO, num_layers=2, vocab_size=4096),
        device,
        num_pages=pages_for(length + NUM_DECODES),
        max_num_seqs=2,
        max_model_len=length + NUM_DECODES,
        max_step_tokens=length,
        kv_dtype=request.param,
    )
    yield made
    made.close()


def test_chunks_leave_the_bits_of_the_whole(runner: CudaRunner, length: int) -> None:
    """K and V of every layer, the log-probability of every token of the prompt, and what is generated behind it."""
    whole = run(runner, length, length)
    # Aligned with nothing; with pages; with tiles of K and V, and so of queries.
    for chunk in (length // 3 + 1, length // 4 // 64 * 64, length // 2 // 128 * 128):
        found = run(runner, length, chunk)
        for name, expected in whole.items():
            assert torch.equal(as_bytes(found[name]), as_bytes(expected)), f"chunks of {chunk}: {name} differs"


def run(runner: CudaRunner, length: int, chunk: int) -> dict[str, torch.Tensor]:
    """What a prompt in chunks, each a step, and some decodes behind it leave, by name; pages hold other things before."""
    with torch.inference_mode():
        for layer in range(runner.config.num_layers):
            for pages in runner.kv.layer(layer):
                pages.view(torch.uint8).fill_(0x3A)
    ids = tuple(2 + place * 7919 % (runner.config.vocab_size - 2) for place in range(length))
    scores: list[float] = []
    drawn: list[int] = []
    starts = [*range(0, length, chunk), *range(length, length + NUM_DECODES)]
    for number, start in enumerate(starts):
        is_prompt = start < length
        end = min(start + chunk, length) if is_prompt else start + 1
        row = PlanRow(
            slot=1,
            start=start,
            num_tokens=end - start,
            token_ids=ids[start:end] if is_prompt else (),
            page_ids=tuple(reversed(range(runner.num_pages)))[: pages_for(end)],
            is_sampled=end >= length,
            slot_start=SlotStart(SamplingParams(temperature=0.7, seed=1), ids, num_logprobs=0) if start == 0 else None,
            num_prompt_logprobs=0 if is_prompt else None,
        )
        step = runner.launch(StepPlan(number, (row,)))
        step.draw({})
        result: StepResult = step.result()
        drawn += result.token_ids
        scores += [score.log_prob for scored in result.prompt_log_probs for score in scored]
        scores += [score.log_prob for score in result.log_probs if score is not None]
    assert len(scores) == length - 1 + NUM_DECODES + 1
    kept = {
        f"{name} of layer {layer}": pages.cpu()
        for layer in range(runner.config.num_layers)
        for name, pages in zip(("K", "V"), runner.kv.layer(layer), strict=True)
    }
    return kept | {"drawn ids": torch.tensor(drawn), "log-probabilities": torch.tensor(scores, dtype=torch.float64)}
