"""Everything that reads a file of a checkpoint, as functions of that file's bytes, each with right files to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backend.checkpoint.layouts import tensor_specs
from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.vocabulary import read_vocabulary
from backend.checkpoint.weight_loader import load_weights
from backend.checkpoint.weights import LayerWeights, weight_bytes
from backend.text.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint, write_tekken
from tests.fuzz.parser import Kind, Parser
from tests.fuzz.tokenizer_file import tokenizer_json_of
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "head_dim": 16,
    "ffn_size": 48,
    "vocab_size": 40,
}
NUM_RANKS = 300


def checkpoint_parsers(folder: Path) -> dict[str, Parser]:
    """By the name of the file; they write into `folder`, which each of them leaves as it was but for its own file."""
    plain = make_checkpoint(folder / "plain", **SIZES)
    sharded = make_checkpoint(folder / "sharded", num_shards=2, **SIZES)
    original = make_checkpoint(folder / "original", layout="consolidated", **SIZES)
    static, block, modelopt = folder / "static", folder / "block", folder / "modelopt"
    quantise_checkpoint(plain, static, SCHEMES["fp8 static, k_scale"])
    quantise_checkpoint(plain, block, SCHEMES["fp8 block"])
    quantise_checkpoint(plain, modelopt, SCHEMES["modelopt, KV"])
    compressed = folder / "compressed"
    quantise_checkpoint(plain, compressed, SCHEMES["compressed-tensors, KV"])
    tekken, hugging_face = folder / "tekken", folder / "tokenizer"
    for made in (tekken, hugging_face):
        made.mkdir()
    write_tekken(tekken / "tekken.json", NUM_RANKS + 1000)
    (hugging_face / "tokenizer.json").write_text(tokenizer_json_of(read_vocabulary(tekken)))
    return {
        "config.json": _config_parser(plain / "config.json"),
        "config.json, fp8": _config_parser(static / "config.json"),
        "config.json, compressed-tensors": _config_parser(compressed / "config.json"),
        "params.json": _config_parser(original / "params.json"),
        "hf_quant_config.json": _config_parser(modelopt / "hf_quant_config.json"),
        "model.safetensors": _weights_parser(plain / "model.safetensors"),
        "model.safetensors, fp8": _weights_parser(static / "model.safetensors"),
        "model.safetensors, fp8 block": _weights_parser(block / "model.safetensors"),
        "consolidated.safetensors": _weights_parser(original / "consolidated.safetensors"),
        "model.safetensors.index.json": _weights_parser(sharded / "model.safetensors.index.json", "json"),
        "tekken.json": _tokenizer_parser(tekken / "tekken.json"),
        "tokenizer.json": _tokenizer_parser(hugging_face / "tokenizer.json"),
    }


def load(folder: Path, weight_format: WeightFormat | None = None) -> None:
    """Load a checkpoint; what is loaded is whole numbers of bytes that were announced, all of them finite."""
    config = read_model_config(folder)
    made = weight_format or WeightFormat(torch.float32)
    weights = load_weights(folder, config, device=CPU, weight_format=made)
    assert weight_bytes(config, made) > 0
    tensors = [weights.embedding, weights.norm, *_tensors_of(weights.head)]
    tensors += [tensor for layer in weights.layers for tensor in _tensors_of(layer)]
    assert all(tensor.float().isfinite().all() for tensor in tensors), "loaded what is not finite"


def _tensors_of(holder: Matrix | LayerWeights) -> list[torch.Tensor]:
    values = [getattr(holder, name) for name in holder.__slots__]
    found = [value for value in values if isinstance(value, torch.Tensor)]
    return found + [tensor for value in values if isinstance(value, Matrix) for tensor in _tensors_of(value)]


def _config_parser(path: Path) -> Parser:
    """The configuration alone, and which tensors follow from it: that must not depend on how large it says they are."""

    def parse(content: bytes) -> object:
        path.write_bytes(content)
        config = read_model_config(path.parent)
        specs = tensor_specs(config, ())
        assert len(specs) <= 30 * config.num_layers + 10
        return specs

    return _restored(path, parse)


def _weights_parser(path: Path, kind: Kind = "safetensors") -> Parser:
    def parse(content: bytes) -> object:
        path.write_bytes(content)
        load(path.parent)
        return None

    return _restored(path, parse, kind)


def _tokenizer_parser(path: Path) -> Parser:
    """A vocabulary that is taken is one with which text survives."""

    def parse(content: bytes) -> object:
        path.write_bytes(content)
        tokenizer = Tokenizer(read_vocabulary(path.parent))
        text = "Grüße, 世界 123\n\n  end"
        assert tokenizer.decode(tokenizer.encode(text, add_bos=True)) == text
        return tokenizer

    return _restored(path, parse)


def _restored(path: Path, parse: Callable[[bytes], object], kind: Kind = "json") -> Parser:
    content = path.read_bytes()
    sample = json.dumps(json.loads(content)).encode() if kind == "json" else content

    def restoring(damaged: bytes) -> object:
        try:
            return parse(damaged)
        finally:
            path.write_bytes(content)

    return Parser((sample,), restoring, kind)
