"""Nothing is allocated once the CUDA runner is warm, and no step takes more than was planned: by the allocator's own counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.launch import Device

pytest.importorskip("safetensors")
pytest.importorskip("msgspec")
pytest.importorskip("llguidance")

from backend.checkpoint.weights import weight_bytes
from backend.plan import NEMO_12B as NEMO
from backend.runner.cuda.runner import cuda_workspace_bytes
from backend.runner.cuda.warm_up import step_sizes
from backend.runner.memory_plan import page_bytes
from backend.runner.warm_up import Limits, StepSize, run_steps
from tests.bench.gpu.models import FP8, random_runner
from tests.unit.runner.mixed_step import mixed_step

pytestmark = pytest.mark.gpu
NUM_SEQS, STEP_TOKENS, MODEL_LEN, NUM_PAGES = 256, 2048, 4096, 1024


def test_nothing_is_allocated_after_the_warm_up(device: Device, is_emulated: bool) -> None:
    if is_emulated:
        pytest.skip("only a GPU's allocator counts; tests/unit/runner/test_cuda_memory.py counts tensors instead")
    config = replace(NEMO, num_layers=2)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    runner = random_runner(
        config,
        device,
        num_pages=NUM_PAGES,
        max_num_seqs=NUM_SEQS,
        max_model_len=MODEL_LEN,
        max_step_tokens=STEP_TOKENS,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    limits = Limits(NUM_SEQS, MODEL_LEN, NUM_PAGES, config.vocab_size)
    run_steps(runner, step_sizes(NUM_SEQS, STEP_TOKENS), limits)
    num_allocations = torch.cuda.memory_stats()["num_device_alloc"]
    sizes = [StepSize(3, 700), StepSize(NUM_SEQS, 0), StepSize(0, 2000), StepSize(17, 20), StepSize(200, 1848)]
    assert run_steps(runner, sizes, limits) == len(sizes)
    step = runner.launch(mixed_step(NUM_SEQS))
    step.draw({})
    assert step.result().log_probs.count(None) == 1
    assert torch.cuda.memory_stats()["num_device_alloc"] == num_allocations
    taken = torch.cuda.max_memory_allocated() - before - weight_bytes(config, FP8) - NUM_PAGES * page_bytes(config, 1)
    planned = cuda_workspace_bytes(config, NUM_SEQS, MODEL_LEN, STEP_TOKENS)
    print(f"workspace: {taken / 2**20:.0f} MiB taken, {planned / 2**20:.0f} MiB planned")
    assert taken <= planned
    runner.close()
