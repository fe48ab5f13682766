"""The peer vLLM: its engine, asked in its own process without any network, with dummy weights of the same shape in FP8.

Facts of its interface are from vLLM 0.26's documentation and source (LLM, SamplingParams, LLMEngine.add_request, step,
abort_request). **Not yet run**: neither on hardware nor on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.bench.serving.checkpoint import write_config
from tests.bench.serving.scale import Scale
from tests.bench.serving.way import Progress, ServingError

# Taken where it is installed; nothing here needs it, so it is pinned nowhere.
VLLM = "vllm"
_IDLE_TIMEOUT_S = 60.0


class VllmWay:
    """Steps the engine whenever the load asks how its requests get on."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._vllm = import_module(VLLM)
        self._kind = import_module(f"{VLLM}.sampling_params").RequestOutputKind.DELTA

    def submit(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Begin one."""
        params = self._vllm.SamplingParams(
            temperature=1.0,
            seed=handle,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._kind,
        )
        self._engine.add_request(str(handle), {"prompt_token_ids": list(prompt)}, params)

    def take_back(self, handle: int) -> None:
        """Abort it."""
        self._engine.abort_request([str(handle)])

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        """One step of the engine; a sleep when it has nothing to do."""
        if not self._engine.has_unfinished_requests():
            time.sleep(timeout_s)
            return ()
        outputs = self._engine.step()
        now_s = time.perf_counter()
        return [
            Progress(int(each.request_id), len(each.outputs[0].token_ids), now_s, each.finished) for each in outputs
        ]

    def wait_until_idle(self) -> None:
        """Steps until nothing is left; ServingError when something is after a minute."""
        end_s = time.monotonic() + _IDLE_TIMEOUT_S
        while self._engine.has_unfinished_requests():
            if time.monotonic() > end_s:
                raise ServingError(f"vLLM is not idle after {_IDLE_TIMEOUT_S:g} s")
            self._engine.step()

    def close(self) -> None:
        """Its process ends with this one."""


def vllm_way(checkpoint: Path, scale: Scale, device: torch.device) -> VllmWay:
    """With the sizes that our engine has, and its own defaults otherwise: CUDA graphs, compilation, chunked prefill."""
    if device.type != "cuda":
        raise RuntimeError("is compared on GPUs alone")
    folder = checkpoint.with_name("vllm")
    write_config(folder, scale.config, is_fp8=False)
    llm = import_module(VLLM).LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        quantization="fp8",
        kv_cache_dtype="fp8",
        max_model_len=int(scale.settings["max_model_len"]),
        max_num_seqs=int(scale.settings["max_num_seqs"]),
        max_num_batched_tokens=int(scale.settings["max_step_tokens"]),
        gpu_memory_utilization=0.9,
        disable_log_stats=True,
    )
    return VllmWay(llm)
