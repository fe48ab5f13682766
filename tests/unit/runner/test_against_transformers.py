"""The whole model against transformers' MistralForCausalLM, in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from backend.runner.placement import Arithmetic
from backend.runner.torch_runner import TorchRunner
from tests.checkpoints import make_checkpoint
from tests.unit.runner.driver import Driver, Script, random_prompt

SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 64, GQA 4": {},
    "head_dim 128, GQA 4, query size below hidden size": {"hidden_size": 640, "head_dim": 128},
    "head_dim 128, GQA 8, tied": {"head_dim": 128, "num_heads": 8, "tie_word_embeddings": True},
    "head_dim 64, GQA 1, tied": {"num_heads": 3, "num_kv_heads": 3, "tie_word_embeddings": True},
    "GQA 3: tokens straddle tiles": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32},
    "GQA 16: a token fills two tiles": {"num_heads": 16, "num_kv_heads": 1, "head_dim": 16, "num_layers": 1},
    "odd vocabulary, theta 1e4, large epsilon": {"vocab_size": 517, "rope_theta": 1e4, "rms_norm_eps": 1e-2},
}


def make_runner(folder: Path, **settings: Any) -> TorchRunner:
    return TorchRunner(
        folder, **({"num_pages": 32, "max_num_seqs": 4, "max_model_len": 512, "num_threads": 1} | settings)
    )


def reference_logits(folder: Path, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Logits [T, V] at every position."""
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def logits_at_ends_of_chunks(runner: TorchRunner, prompt: tuple[int, ...], chunks: tuple[int, ...]) -> torch.Tensor:
    script = Script(prompt, chunks=chunks, pages=(7, 3, 30), is_every_chunk_sampled=True)
    Driver(runner).run([script])
    return torch.stack(script.logits)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_of_prefill_and_of_single_tokens(tmp_path: Path, sizes: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, **sizes)
    prompt = random_prompt(np.random.default_rng(0), 150)
    expected = reference_logits(tmp_path, prompt)
    chunks = (1, 16, 46, 1, 1, 1, 60, *(1,) * 24)
    ends = np.cumsum(chunks) - 1
    assert ends[-1] == 149
    actual = logits_at_ends_of_chunks(make_runner(tmp_path), prompt, chunks)
    assert expected.std() > 1.0  # else 1e-4 says nothing
    assert (actual - expected[ends]).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
def test_bf16_shards_of_either_layout(tmp_path: Path, layout: Any) -> None:
    make_checkpoint(tmp_path / "single", dtype=torch.bfloat16)
    make_checkpoint(tmp_path / "shards", dtype=torch.bfloat16, layout=layout, num_shards=3)
    prompt = random_prompt(np.random.default_rng(1), 70)
    expected = reference_logits(tmp_path / "single", prompt)
    actual = logits_at_ends_of_chunks(make_runner(tmp_path / "shards"), prompt, (70,))
    assert (actual[0] - expected[-1]).abs().max() < 1e-4


def test_the_products_and_attention_of_a_gpu(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    prompt = random_prompt(np.random.default_rng(2), 130)
    expected = reference_logits(tmp_path, prompt)
    arithmetic = Arithmetic(is_tiled=False)
    runner = make_runner(tmp_path, arithmetic=arithmetic, weight_dtype="fp32", kv_dtype="fp32")
    actual = logits_at_ends_of_chunks(runner, prompt, (40, 60, *(1,) * 30))
    ends = [39, *range(99, 130)]
    assert (actual - expected[ends]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("weight_dtype", "kv_dtype", "bound"), [("fp32", "bf16", 0.1), ("bf16", "fp32", 0.3), ("bf16", "auto", 0.3)]
)
def test_bf16_products_and_pages(tmp_path: Path, weight_dtype: str, kv_dtype: str, bound: float) -> None:
    make_checkpoint(tmp_path)
    prompt = random_prompt(np.random.default_rng(3), 130)
    expected = reference_logits(tmp_path, prompt)
    runner = make_runner(tmp_path, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    difference = (logits_at_ends_of_chunks(runner, prompt, (129, 1)) - expected[128:]).abs()
    assert (
        1e-4 < difference.max() < bound
    )  # BF16 was really used, and its error is what 8 bits give at logits of sigma 3


def test_greedy_ids_are_those_of_generate(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    prompt = random_prompt(np.random.default_rng(4), 20)
    script = Script(prompt, num_outputs=60, pages=(5, 9))
    Driver(make_runner(tmp_path)).run([script])
    logits = reference_logits(tmp_path, (*prompt, *script.token_ids))
    assert script.token_ids == logits[19:-1].argmax(dim=1).tolist()
    assert len(set(script.token_ids)) > 20  # not a loop, which would compare the same few ids
