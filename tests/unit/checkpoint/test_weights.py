from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.weight_loader import load_weights
from backend.checkpoint.weights import Weights, weight_bytes
from backend.errors import ConfigError, shown
from tests.checkpoints import TinyConfig, make_checkpoint, random_tensors, write_json, write_shards

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(folder, read_model_config(folder), device=CPU, weight_format=WeightFormat(dtype))


def all_tensors(weights: Weights) -> list[torch.Tensor]:
    layers = [
        tensor
        for layer in weights.layers
        for tensor in (
            layer.attention_norm,
            layer.qkv.values,
            layer.output.values,
            layer.ffn_norm,
            layer.gate_up.values,
            layer.down.values,
        )
    ]
    return [weights.embedding, weights.norm, weights.head.values, *layers]


def test_where_every_tensor_goes(tmp_path: Path) -> None:
    weights, source = load(make_checkpoint(tmp_path)), random_tensors(TinyConfig(), 0)
    assert torch.equal(weights.embedding, source["model.embed_tokens.weight"])
    assert torch.equal(weights.norm, source["model.norm.weight"])
    assert torch.equal(weights.head.values, source["lm_head.weight"])
    for index, layer in enumerate(weights.layers):
        its = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in source.items()}
        q, k, v = (its[f"self_attn.{name}_proj.weight"] for name in "qkv")
        assert torch.equal(layer.qkv.values, torch.cat((q, k, v)))
        assert torch.equal(layer.output.values, its["self_attn.o_proj.weight"])
        assert torch.equal(layer.gate_up.values, torch.cat((its["mlp.gate_proj.weight"], its["mlp.up_proj.weight"])))
        assert torch.equal(layer.down.values, its["mlp.down_proj.weight"])
        assert torch.equal(layer.attention_norm, its["input_layernorm.weight"])
        assert torch.equal(layer.ffn_norm, its["post_attention_layernorm.weight"])


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_both_layouts_give_the_same_weights(tmp_path: Path, num_shards: int, tie_word_embeddings: bool) -> None:
    sizes: dict[str, Any] = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": tie_word_embeddings,
    }
    hf = load(make_checkpoint(tmp_path / "hf", **sizes))
    mistral = load(make_checkpoint(tmp_path / "mistral", layout="consolidated", num_shards=num_shards, **sizes))
    sharded = load(make_checkpoint(tmp_path / "sharded", num_shards=num_shards, **sizes))
    for a, b, c in zip(all_tensors(hf), all_tensors(mistral), all_tensors(sharded), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
def test_numbered_shards_without_an_index(tmp_path: Path, layout: Any) -> None:
    make_checkpoint(tmp_path, layout=layout, num_shards=3)
    index = next(tmp_path.glob("*.index.json"))
    expected = load(tmp_path)
    index.unlink()
    for a, b in zip(all_tensors(load(tmp_path)), all_tensors(expected), strict=True):
        assert torch.equal(a, b)
    next(tmp_path.glob("*-00002-of-00003.safetensors")).unlink()
    with pytest.raises(ConfigError, match="shards must be numbered 00001 to the total"):
        load(tmp_path)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_dtypes_and_bytes(tmp_path: Path, source: torch.dtype, dtype: torch.dtype, tie_word_embeddings: bool) -> None:
    make_checkpoint(tmp_path, dtype=source, tie_word_embeddings=tie_word_embeddings)
    weights = load(tmp_path, dtype)
    expected = random_tensors(TinyConfig(tie_word_embeddings=tie_word_embeddings), 0)["model.embed_tokens.weight"]
    assert torch.equal(weights.embedding, expected.to(source).to(dtype))
    assert weights.norm.dtype == torch.float32
    storages = {tensor.data_ptr(): tensor.numel() * tensor.itemsize for tensor in all_tensors(weights)}
    assert sum(storages.values()) == weight_bytes(read_model_config(tmp_path), WeightFormat(dtype))
    assert (weights.head.values is weights.embedding) == tie_word_embeddings


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_shards=2, dtype=torch.bfloat16)
    seen: list[tuple[int, int]] = []
    config = read_model_config(tmp_path)
    load_weights(
        tmp_path,
        config,
        device=CPU,
        weight_format=WeightFormat(torch.float32),
        progress=lambda done, total: seen.append((done, total)),
    )
    tensors = random_tensors(TinyConfig(), 0)
    total = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert len(seen) == len(tensors)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {its_total for _, its_total in seen} == {total}
    assert seen[-1] == (total, total)


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, path)
    with pytest.raises(
        ConfigError, match=r"1 tensors are missing, the first is model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(4)}, path)
    with pytest.raises(
        ConfigError, match=r"1 tensors are not part of this model, .*'model\.layers\.0\.self_attn\.q_proj\.bias'"
    ):
        load(tmp_path)


def test_wrong_shape_and_dtype(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.zeros(95)}, path)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight must have shape \[96\] .* found \[95\]"):
        load(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.zeros(96, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight must be one of BF16, F16, F32, found F8_E4M3"):
        load(tmp_path)


def test_a_model_of_other_sizes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(ConfigError, match=r"9 tensors are missing, the first is model\.layers\.2\."):
        load(tmp_path)
    write_json(tmp_path / "config.json", config | {"head_dim": 128})
    with pytest.raises(ConfigError, match=r"must have shape \[\d+, \d+\] by the folder's configuration, found"):
        load(tmp_path)


def test_an_index_that_disagrees_with_its_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_shards=2)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    weight_map = index["weight_map"]
    first = "model-00001-of-00002.safetensors"

    def refused(message: str, **changed: object) -> None:
        write_json(index_path, {"weight_map": weight_map | changed})
        with pytest.raises(ConfigError, match=message):
            load(tmp_path)

    refused("tensor 'extra' is missing, though .* says it is there", extra=first)
    refused("'model-00003.safetensors'|model-00003.safetensors is missing", extra="model-00003.safetensors")
    for name in (
        "../model.safetensors",
        "/tmp/model.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "\ud800.safetensors",
        7,
    ):
        refused(
            f"must be the name of a .safetensors file in the same folder, found {re.escape(shown(name))}", extra=name
        )
    refused("must be the name of a .safetensors file", extra="x" * 201 + ".safetensors")
    write_json(
        index_path, {"weight_map": {name: file for name, file in weight_map.items() if name != "model.norm.weight"}}
    )
    with pytest.raises(
        ConfigError, match=r"tensor 'model\.norm\.weight' is not listed in model\.safetensors\.index\.json"
    ):
        load(tmp_path)
    write_json(index_path, {"metadata": {}})
    with pytest.raises(ConfigError, match="weight_map is missing or empty"):
        load(tmp_path)
    write_json(index_path, index)
    (tmp_path / first).unlink()
    with pytest.raises(ConfigError, match=rf"{first} is missing, though the checkpoint refers to it"):
        load(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    second = tmp_path / "model-00002-of-00002.safetensors"
    both = load_file(second) | {"model.embed_tokens.weight": torch.zeros(512, 96)}
    save_file(both, second)
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens\.weight' lies in both"):
        load(tmp_path)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a Git-LFS pointer.*git lfs pull"):
        load(tmp_path)
    for content in (whole[: len(whole) // 2], whole[:100], b"PK\x03\x04 a pickle", b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"model\.safetensors is not a complete safetensors file"):
            load(tmp_path)


def test_shards_are_written_as_the_tools_do(tmp_path: Path) -> None:
    tensors = random_tensors(TinyConfig(num_layers=1), 0)
    write_shards(tmp_path, "model", tensors, 2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, float("nan")), (torch.bfloat16, float("inf")), (torch.float16, float("-inf"))],
)
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize(
    "weight_format", [WeightFormat(torch.bfloat16), WeightFormat(torch.float32, has_fp8_linears=True)]
)
def test_weights_that_are_not_finite(
    tmp_path: Path, dtype: torch.dtype, value: float, name: str, weight_format: WeightFormat
) -> None:
    make_checkpoint(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_model_config(tmp_path)
    with pytest.raises(ConfigError, match=rf"tensor {re.escape(name)} must hold finite numbers.*so 1 of 21 tensors"):
        load_weights(tmp_path, config, device=CPU, weight_format=weight_format)


def test_a_weight_that_the_served_dtype_cannot_hold(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = torch.finfo(torch.float32).max  # rounds to infinity in BF16
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    with pytest.raises(
        ConfigError, match=r"lm_head\.weight must hold finite numbers, found .* a number beyond bfloat16"
    ):
        load(tmp_path, torch.bfloat16)
