"""FP8 checkpoints of every kind, and FP8 made while loading: the real values of the weights, to the bit or to one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.checkpoint import fp8, piece_reader
from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.weight_loader import load_weights
from backend.checkpoint.weights import Weights, weight_bytes
from backend.errors import ConfigError
from tests.checkpoints import TinyConfig, make_checkpoint, random_tensors
from tests.quantised_checkpoints import SCHEMES, Tensors, quantise_checkpoint

CPU = torch.device("cpu")
FP8 = WeightFormat(torch.bfloat16, has_fp8_linears=True)
FP32 = WeightFormat(torch.float32)
SIZES: dict[str, Any] = {"hidden_size": 160, "ffn_size": 288, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32}


def load(folder: Path, weight_format: WeightFormat = FP8) -> Weights:
    return load_weights(folder, read_model_config(folder), device=CPU, weight_format=weight_format)


def real(matrix: Matrix) -> torch.Tensor:
    values = matrix.values.float()
    return values if matrix.scales is None else values * matrix.scales.unsqueeze(1)


def matrices(weights: Weights, source: Tensors) -> Iterator[tuple[Matrix, torch.Tensor]]:
    """Every linear layer of the layers, beside the source tensors that make it up."""
    for index, layer in enumerate(weights.layers):
        its = {name.removeprefix(f"model.layers.{index}."): tensor.float() for name, tensor in source.items()}
        yield layer.qkv, torch.cat([its[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        yield layer.output, its["self_attn.o_proj.weight"]
        yield layer.gate_up, torch.cat([its[f"mlp.{name}_proj.weight"] for name in ("gate", "up")])
        yield layer.down, its["mlp.down_proj.weight"]


def assert_within_one_rounding(matrix: Matrix, expected: torch.Tensor) -> None:
    """e4m3 with a scale a row: relative error at most 2^-4, or half of the smallest step, 2^-10 of the scale."""
    assert matrix.scales is not None
    assert torch.equal(matrix.scales, expected.abs().amax(dim=1) / 448.0)
    error = (real(matrix) - expected).abs()
    # The scale itself is rounded, hence a little more.
    assert (error <= 1.0001 * torch.maximum(expected.abs() / 16, matrix.scales[:, None] * 2.0**-10)).all()
    assert matrix.values.float().abs().amax(dim=1).eq(448.0).all(), "each row uses the whole range"


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_checkpoint_that_is_fp8_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_shards: int
) -> None:
    if num_shards > 1:
        monkeypatch.setattr(piece_reader, "PIECE_BYTES", 1)
    scheme = SCHEMES[name]
    make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **SIZES)
    source = quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", scheme, num_shards=num_shards)
    weights = load(tmp_path / "fp8")
    for matrix, expected in matrices(weights, source):
        assert matrix.values.dtype == fp8.DTYPE
        if scheme.weight_scales == "block":
            assert_within_one_rounding(matrix, expected)
        else:
            assert torch.equal(real(matrix), expected)
        if scheme.has_input_scales:
            assert matrix.input_scale is not None
            # The largest of the parts' scales.
            assert matrix.input_scale.tolist() == [pytest.approx(16 / 448)]
        else:
            assert matrix.input_scale is None
    for index, layer in enumerate(weights.layers):
        scales = [0.02 + 0.01 * part + 0.001 * index for part in range(len(scheme.kv_scale_names))] or [1.0]
        assert layer.kv_scales.tolist() == pytest.approx([scales[0], scales[-1]])
    assert weights.head.scales is None
    assert torch.equal(weights.head.values, source["lm_head.weight"])
    assert torch.equal(weights.embedding, source["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", SCHEMES)
def test_an_fp8_checkpoint_with_its_quantisation_undone(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "source", **SIZES)
    source = quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", SCHEMES[name])
    for matrix, expected in matrices(load(tmp_path / "fp8", FP32), source):
        assert matrix.scales is matrix.input_scale is None
        assert torch.equal(matrix.values, expected)


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
@pytest.mark.parametrize("piece_bytes", [2**24, 1], ids=["whole", "pieces"])
def test_quantised_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any, piece_bytes: int
) -> None:
    monkeypatch.setattr(piece_reader, "PIECE_BYTES", piece_bytes)
    make_checkpoint(tmp_path, layout=layout, dtype=torch.bfloat16, **SIZES)
    source = {name: tensor.bfloat16() for name, tensor in random_tensors(TinyConfig(**SIZES), 0).items()}
    weights = load(tmp_path)
    for matrix, expected in matrices(weights, source):
        assert_within_one_rounding(matrix, expected)
        assert matrix.input_scale is None
    assert torch.equal(weights.head.values, source["lm_head.weight"])


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize(
    "kept", [FP8, WeightFormat(torch.float32, True, True), WeightFormat(torch.float32, False, True)]
)
def test_head_and_bytes(tmp_path: Path, kept: WeightFormat, tie_word_embeddings: bool) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=tie_word_embeddings, **SIZES)
    source = random_tensors(TinyConfig(tie_word_embeddings=tie_word_embeddings, **SIZES), 0)
    weights = load(tmp_path, kept)
    head = source["model.embed_tokens.weight" if tie_word_embeddings else "lm_head.weight"]
    if kept.has_fp8_head:
        assert_within_one_rounding(weights.head, head)
    else:
        assert torch.equal(weights.head.values, head.to(kept.dense))
        assert (weights.head.values is weights.embedding) == tie_word_embeddings
    held = [weights.embedding, weights.norm, weights.head.values]
    for layer in weights.layers:
        held += [layer.attention_norm, layer.ffn_norm]
    for matrix in [weights.head, *(matrix for matrix, _ in matrices(weights, source_like(weights)))]:
        held += [tensor for tensor in (matrix.values, matrix.scales, matrix.input_scale) if tensor is not None]
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in held}
    assert sum(storages.values()) == weight_bytes(read_model_config(tmp_path), kept)


def source_like(weights: Weights) -> Tensors:
    return random_tensors(TinyConfig(**SIZES, num_layers=len(weights.layers)), 0)


def test_fp8_values_may_be_held_as_fp32(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, **SIZES)
    on_cpu = load(tmp_path, WeightFormat(torch.float32, has_fp8_linears=True, fp8_values=torch.float32))
    for (held, _), (small, _) in zip(
        matrices(on_cpu, source_like(on_cpu)), matrices(load(tmp_path), source_like(on_cpu)), strict=True
    ):
        assert held.values.dtype == torch.float32
        assert torch.equal(held.values, small.values.float())
        assert torch.equal(real(held), real(small))


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 16)
    x[1] = 3.0
    scales = fp8.row_scales(x)
    assert torch.equal(fp8.quantise(x, scales).float() * scales.unsqueeze(1), x)


def test_what_does_not_fit_is_cut_and_nan_stays() -> None:
    x = torch.tensor([[1e9, -1e9, float("nan"), 0.4]])
    kept = fp8.quantise(x, torch.ones(1)).float()
    assert kept[0, :2].tolist() == [448.0, -448.0]
    assert kept[0, 2].isnan()
    assert kept[0, 3] == 0.40625


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    changed = load_file(path) | tensors
    save_file({name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}, path)


@pytest.fixture
def static(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "source", **SIZES)
    quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", SCHEMES["fp8 static, k_scale"])
    return tmp_path / "fp8"


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.weight_scale", None, rf"1 tensors are missing, the first is {Q}\.weight_scale"),
        (f"{Q}.input_scale", None, rf"1 tensors are missing, the first is {Q}\.input_scale"),
        ("model.layers.0.self_attn.v_scale", None, r"the first is model\.layers\.0\.self_attn\.v_scale"),
        ("model.layers.0.self_attn.k_scale", None, r"the first is model\.layers\.0\.self_attn\.k_scale"),
        (f"{Q}.weight_scale", torch.ones(256, 1), r"must have shape \[\] or \[1\] by .* found \[256, 1\]"),
        (f"{Q}.weight_scale", torch.tensor(0.0), rf"scale {Q}\.weight_scale must be positive and finite, found 0\.0"),
        (f"{Q}.input_scale", torch.tensor(float("nan")), r"must be positive and finite, found nan"),
        (f"{Q}.weight", torch.zeros(256, 160), r"must be one of F8_E4M3, found F32; the configuration says"),
        ("lm_head.weight", torch.zeros(512, 160).to(fp8.DTYPE), r"must be one of BF16, F16, F32, found F8_E4M3"),
        ("model.layers.0.mlp.down_proj.weight_zero", torch.zeros(1), r"1 tensors are not part of this model"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(static: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    change(static, **{name: tensor})
    with pytest.raises(ConfigError, match=message):
        load(static)


def test_ignored_layers_stay_as_they_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", dtype=torch.bfloat16, **SIZES)
    plain = load_file(tmp_path / "source" / "model.safetensors")
    scheme = SCHEMES["fp8 dynamic"]
    ignored = ["lm_head", "model.layers.1.mlp", r"re:.*layers\.0\.self_attn\.o_proj"]
    scheme.config["ignored_layers"], before = ignored, scheme.config["ignored_layers"]
    try:
        quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", scheme)
    finally:
        scheme.config["ignored_layers"] = before
    left_out = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj",
                "model.layers.0.self_attn.o_proj")  # fmt: skip
    changes: dict[str, torch.Tensor | None] = {f"{module}.weight": plain[f"{module}.weight"] for module in left_out}
    change(tmp_path / "fp8", **changes, **{f"{module}.weight_scale": None for module in left_out})
    weights = load(tmp_path / "fp8")
    assert weights.layers[1].gate_up.scales is weights.layers[1].down.scales is weights.layers[0].output.scales is None
    assert torch.equal(weights.layers[1].down.values, plain["model.layers.1.mlp.down_proj.weight"])
    assert weights.layers[0].gate_up.scales is not None


def test_half_of_a_matrix_cannot_be_ignored(static: Path) -> None:
    config = read_model_config(static)
    assert config.quantization is not None
    text = (static / "config.json").read_text()
    (static / "config.json").write_text(text.replace('"lm_head"', '"lm_head", "model.layers.0.self_attn.k_proj"'))
    with pytest.raises(ConfigError, match=r"must be quantised all or not at all.*found 1 of them among the ignored"):
        load(static)


@pytest.mark.parametrize("weight_format", [FP8, FP32])
def test_a_nan_among_fp8_values(tmp_path: Path, weight_format: WeightFormat) -> None:
    make_checkpoint(tmp_path / "source", **SIZES)
    quantise_checkpoint(tmp_path / "source", tmp_path / "fp8", SCHEMES["fp8 dynamic"])
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].view(torch.uint8)[5, 6] = 0xFF
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight must hold finite numbers"):
        load(tmp_path / "fp8", weight_format)
