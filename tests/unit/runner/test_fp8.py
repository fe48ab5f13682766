"""FP8 weights, activations and pages in the PyTorch runner, against transformers with the same roundings put in by hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from backend.checkpoint import fp8
from backend.checkpoint.matrix import Matrix
from backend.checkpoint.model_config import read_model_config
from backend.runner.kv_pages import KvPages
from backend.runner.linear import linear
from backend.runner.placement import choose_placement
from tests.checkpoints import make_checkpoint, write_shards
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint
from tests.unit.runner.driver import random_prompt
from tests.unit.runner.test_against_transformers import logits_at_ends_of_chunks, make_runner, reference_logits

CPU = torch.device("cpu")


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x as e4m3 times scale, by another library's conversion."""
    quotients = (x / scale).clamp(-448, 448).numpy()
    return torch.from_numpy(quotients.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)) * scale


def quantised_logits(
    folder: Path, token_ids: tuple[int, ...], scale_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Logits [T, V] of a plain checkpoint whose linear layers, all but the head, see inputs rounded to e4m3."""
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], scale_of(inputs[0])),))
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def per_token(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(dim=-1, keepdim=True) / 448.0


@pytest.mark.parametrize("name", ["fp8 dynamic", "fp8 static", "compressed-tensors dynamic", "modelopt"])
def test_logits_of_fp8_checkpoints(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "source")
    scheme = SCHEMES[name]
    real = quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", scheme)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text((tmp_path / "source" / "config.json").read_text())
    write_shards(tmp_path / "real", "model", real)
    prompt = random_prompt(np.random.default_rng(0), 100)
    static = torch.tensor(16.0 / 448)
    scale_of = (lambda _: static) if scheme.has_input_scales else per_token
    expected = quantised_logits(tmp_path / "real", prompt, scale_of)
    effect = (expected - reference_logits(tmp_path / "source", prompt)).abs().max()
    runner = make_runner(tmp_path / "fp8")
    description = runner.describe()
    assert (description["weight_dtype"], description["head_dtype"], description["kv_dtype"]) == ("fp8", "fp32", "fp32")
    assert description["quantization"].startswith(f"the checkpoint's ({name.split()[0]}, a weight scale a ")
    chunks = (60, 1, 1, 38)
    actual = logits_at_ends_of_chunks(runner, prompt, chunks)
    # Sums rounded otherwise tip a few of the e4m3 roundings over, and nothing else differs.
    difference = (actual - expected[np.cumsum(chunks) - 1]).abs().max()
    assert difference < 0.15 * effect, f"{difference:g} of an effect of {effect:g}"


def test_weights_quantised_while_loading(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    prompt = random_prompt(np.random.default_rng(1), 80)
    expected = reference_logits(tmp_path, prompt)[-1]
    runner = make_runner(tmp_path, weight_dtype="fp8", head_dtype="fp8", kv_dtype="fp8")
    description = runner.describe()
    assert [description[name] for name in ("weight_dtype", "head_dtype", "kv_dtype")] == ["fp8"] * 3
    assert description["quantization"].startswith("while loading")
    (actual,) = logits_at_ends_of_chunks(runner, prompt, (80,))
    assert 1e-2 < (actual - expected).abs().max() < 3.0
    assert torch.corrcoef(torch.stack((actual, expected)))[0, 1] > 0.97


def test_quantisation_undone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source")
    real = quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", SCHEMES["fp8 static, k_scale"])
    write_shards(tmp_path / "source", "model", real)
    prompt = random_prompt(np.random.default_rng(2), 70)
    runner = make_runner(tmp_path / "fp8", weight_dtype="fp32", kv_dtype="fp32")
    assert runner.describe()["quantization"] == "the checkpoint's (fp8) was undone while loading"
    (actual,) = logits_at_ends_of_chunks(runner, prompt, (70,))
    assert (actual - reference_logits(tmp_path / "source", prompt)[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("scales", [(), ((0.5, 0.25), (0.02, 0.03))])
def test_fp8_pages_keep_what_e4m3_can(tmp_path: Path, scales: tuple[tuple[float, float], ...]) -> None:
    config = read_model_config(make_checkpoint(tmp_path, num_kv_heads=2))
    pages = KvPages(config, 3, device=CPU, dtype=fp8.DTYPE, scales=scales)
    generator = torch.Generator().manual_seed(0)
    new = [torch.randn(5, 2, config.head_dim, generator=generator) * 3 for _ in range(2)]
    places = torch.tensor([2, 2, 0, 0, 2]), torch.tensor([0, 63, 1, 2, 5])
    pages.write(1, *places, *new)
    expected_scales = scales[1] if scales else (1.0, 1.0)
    assert pages.scales(1) == expected_scales
    for tiles, x, scale in zip(pages.tiles(1), new, expected_scales, strict=True):
        kept = tiles.view(3, 2, 64, -1)[places[0], :, places[1]].float() * scale
        assert torch.equal(kept, rounded(x, torch.tensor(scale)))
    pages.clear(torch.tensor([2]))
    for tiles in pages.tiles(1):
        assert tiles.view(3, 2, 64, -1)[2].float().eq(0).all()
        assert tiles.view(3, 2, 64, -1)[0].float().ne(0).any()


def test_scales_of_pages_are_given_to_fp8_alone(tmp_path: Path) -> None:
    config = read_model_config(make_checkpoint(tmp_path))
    pages = KvPages(config, 1, device=CPU, dtype=torch.float32, scales=((0.5, 0.5), (0.5, 0.5)))
    assert pages.scales(0) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["fp8 static, kv_scale", "compressed-tensors, KV", "modelopt, KV"])
def test_a_checkpoint_with_scales_for_its_pages(tmp_path: Path, name: str) -> None:
    """FP8 pages by default; and they change the logits by what their rounding may, so the scales go in and come out."""
    make_checkpoint(tmp_path / "source")
    quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", SCHEMES[name])
    prompt = random_prompt(np.random.default_rng(3), 130)
    fp8_pages = make_runner(tmp_path / "fp8")
    assert fp8_pages.describe()["kv_dtype"] == "fp8"
    assert fp8_pages._transformer._kv.scales(1)[0] == pytest.approx(0.021)
    actual = logits_at_ends_of_chunks(fp8_pages, prompt, (64, 65, 1))
    expected = logits_at_ends_of_chunks(make_runner(tmp_path / "fp8", kv_dtype="fp32"), prompt, (64, 65, 1))
    assert (actual - expected).abs().max() > 1e-3
    assert torch.corrcoef(torch.stack((actual.flatten(), expected.flatten())))[0, 1] > 0.98


@pytest.mark.parametrize("is_tiled", [True, False])
@pytest.mark.parametrize("held", [torch.float32, fp8.DTYPE])
@pytest.mark.parametrize("input_scale", [None, torch.tensor([0.01])])
def test_product(is_tiled: bool, held: torch.dtype, input_scale: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator)
    scales = fp8.row_scales(weight)
    matrix = Matrix(fp8.quantise(weight, scales).to(held), scales, input_scale)
    inputs = rounded(x, per_token(x) if input_scale is None else input_scale)
    expected = inputs.double() @ rounded(weight, scales.unsqueeze(1)).double().T
    actual = linear(x, matrix, is_tiled=is_tiled)
    # e4m3 values themselves, as on a GPU, are multiplied in BF16 and the sum is rounded to it: 2^-8 of the result.
    bound = 1e-5 if held == torch.float32 else 2.0**-8 * expected.abs().max()
    assert (actual - expected).abs().max() <= bound
    assert (actual - x @ weight.T).abs().max() > 1e-2


@pytest.mark.parametrize("name", [None, "fp8 static", "fp8 static, k_scale", "modelopt, KV", "fp8 dynamic"])
@pytest.mark.parametrize("is_cuda", [False, True])
def test_what_auto_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, is_cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    quantization = None
    if name is not None:
        quantise_checkpoint(make_checkpoint(tmp_path / "source"), tmp_path / "fp8", SCHEMES[name])
        quantization = read_model_config(tmp_path / "fp8").quantization
    chosen = choose_placement("cuda:0" if is_cuda else "cpu", quantization=quantization)
    kept = chosen.weight_format
    assert kept.dense == (torch.bfloat16 if is_cuda else torch.float32)
    assert kept.has_fp8_linears == (name is not None)
    assert not kept.has_fp8_head
    assert kept.fp8_values == (fp8.DTYPE if is_cuda else torch.float32)
    assert chosen.kv_dtype == (fp8.DTYPE if name and SCHEMES[name].kv_scale_names else kept.dense)


def test_a_quantised_head_is_held_as_such() -> None:
    from backend.checkpoint.quantization import Quantization

    scheme = Quantization("fp8", "tensor", False, False, ())
    assert choose_placement("cpu", quantization=scheme).weight_format.has_fp8_head
    assert not choose_placement("cpu", weight_dtype="bf16", quantization=scheme).weight_format.has_fp8_head


def test_settings_reach_the_runner(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"weight_dtype": "bf16", "head_dtype": "fp8", "kv_dtype": "fp8"}
    description = make_runner(make_checkpoint(tmp_path), **settings).describe()
    assert {name: description[name] for name in settings} == settings
