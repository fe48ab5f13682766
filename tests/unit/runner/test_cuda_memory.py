"""The CUDA runner stays within the memory that was planned for it: counted by tensors, with kernels that compute nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.weights import allocate_weights, weight_bytes
from backend.runner.cuda.runner import CudaRunner, cuda_workspace_bytes
from backend.runner.cuda.warm_up import step_sizes
from backend.runner.memory_plan import page_bytes
from backend.runner.warm_up import Limits, StepSize, run_steps
from kernels.launch import Graph, Launch
from tests.checkpoints import make_checkpoint
from tests.unit.runner.mixed_step import mixed_step
from tests.unit.runner.test_warm_up import IdleDevice

NUM_SEQS, STEP_TOKENS, MODEL_LEN, NUM_PAGES = 40, 160, 512, 60
FORMAT = WeightFormat(torch.bfloat16)
LIMITS = {"max_num_seqs": NUM_SEQS, "max_model_len": MODEL_LEN, "max_step_tokens": STEP_TOKENS}


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are still there; `most`: so many at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result

    def _add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._seen:
            self._seen[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, address)
        return tensor

    def _remove(self, address: int) -> None:
        self.now -= self._seen.pop(address)


class ForgetfulDevice(IdleDevice):
    """Keeps nothing of a launch, whose tensors would stay with it."""

    is_capturing = False

    def launch(self, launch: Launch) -> None:
        super().launch(launch)
        if not self.is_capturing:
            self.launches.clear()

    def capture(self, record: Callable[[], None]) -> Graph:
        self.is_capturing = True
        try:
            return super().capture(record)
        finally:
            self.is_capturing = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few and small layers before a large vocabulary, so that logits are most of it, as they are in Mistral NeMo's plan."""
    return make_checkpoint(
        tmp_path_factory.mktemp("memory"),
        hidden_size=128,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        ffn_size=128,
        num_layers=1,
        vocab_size=16384,
    )


def test_no_step_takes_more_than_was_planned(folder: Path) -> None:
    config = read_model_config(folder)
    with LiveBytes() as live, torch.inference_mode():
        weights = allocate_weights(config, torch.device("cpu"), FORMAT)
        for tensor in (weights.layers[0].attention_norm, weights.layers[0].ffn_norm, weights.norm):
            tensor.zero_()
        runner = CudaRunner(
            config,
            weights,
            ForgetfulDevice(),
            weight_format=FORMAT,
            kv_dtype=torch.bfloat16,
            num_pages=NUM_PAGES,
            **LIMITS,
        )
        at_rest = live.now
        limits = Limits(NUM_SEQS, MODEL_LEN, NUM_PAGES, config.vocab_size)
        run_steps(runner, step_sizes(NUM_SEQS, STEP_TOKENS), limits)
        warm = live.most
        live.most = live.now
        # Whatever comes: no step needs more than one of those, so that an allocator has all that it will ever need.
        sizes = [StepSize(3, 70), StepSize(NUM_SEQS, 0), StepSize(0, STEP_TOKENS), StepSize(17, 20), StepSize(1, 0)]
        assert run_steps(runner, sizes, limits) == len(sizes)
        assert live.most <= warm
        before = live.most = live.now
        step = runner.launch(mixed_step(NUM_SEQS))
        step.draw({})
        assert step.result().log_probs.count(None) == 1
    assert live.most - before < 4 * config.vocab_size, "a row of logits was copied"
    planned = cuda_workspace_bytes(config, NUM_SEQS, MODEL_LEN, STEP_TOKENS)
    fixed = weight_bytes(config, FORMAT) + NUM_PAGES * page_bytes(config, 2)
    print(f"at rest {at_rest - fixed}, most {warm - fixed}, planned {planned}")
    assert warm - fixed <= planned
    assert at_rest - fixed > 0.4 * planned, "a plan that is far too large proves nothing"
