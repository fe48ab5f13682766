"""The model's weights in the engine's own arrangement, streamed from safetensors one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.checkpoint.layouts import Target, TensorSpec, tensor_specs
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.tensor_files import check_tensors, find_tensors, open_tensors

Progress = Callable[[int, int], None]
"""Called with (bytes_done, bytes_total) of the source files after each tensor."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Linear weights are [outputs, inputs] in the weight dtype, norms FP32.

    `qkv` [(H + 2K) * D, E]: q, then k, then v, with RoPE pairs (i, i + D / 2). `gate_up` [2F, E]: gate, then up.
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole model; with a tied head, `head` is the same tensor as `embedding` [V, E]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that `load_weights` will hold, known before anything is loaded."""
    linears = config.query_size * 2 + config.kv_size * 2 + config.ffn_size * 3
    norms = (2 * config.num_layers + 1) * config.hidden_size
    num_vocab_matrices = 1 if config.tie_word_embeddings else 2
    matrices = (config.num_layers * linears + num_vocab_matrices * config.vocab_size) * config.hidden_size
    return matrices * dtype.itemsize + norms * torch.float32.itemsize


def load_weights(
    folder: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> Weights:
    """Check every file and header first, then copy tensor by tensor to `device`, converting to `dtype`.

    Host memory holds at most one source tensor (mapped from the file) above the final copy. ConfigError names file,
    tensor, what is expected and what was found.
    """
    specs = tensor_specs(config)
    files = find_tensors(folder, config.layout)
    bytes_total = check_tensors(files, specs)
    weights = _allocate(config, device, dtype)
    bytes_done = 0
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            for name in sorted(name for name, its_path in files.items() if its_path == path):
                source = file.get_tensor(name)
                _copy(source, specs[name], _target(weights, specs[name].target, specs[name].layer))
                bytes_done += source.numel() * source.itemsize
                del source  # before the next one is read
                if progress is not None:
                    progress(bytes_done, bytes_total)
    return weights


def _allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    hidden, ffn = config.hidden_size, config.ffn_size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, device=device, dtype=dtype)

    def norm() -> torch.Tensor:
        return torch.empty(hidden, device=device, dtype=torch.float32)

    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            qkv=matrix(config.query_size + 2 * config.kv_size, hidden),
            output=matrix(hidden, config.query_size),
            ffn_norm=norm(),
            gate_up=matrix(2 * ffn, hidden),
            down=matrix(hidden, ffn),
        )
        for _ in range(config.num_layers)
    )
    embedding = matrix(config.vocab_size, hidden)
    head = embedding if config.tie_word_embeddings else matrix(config.vocab_size, hidden)
    return Weights(embedding=embedding, layers=layers, norm=norm(), head=head)


def _target(weights: Weights, target: Target, layer: int) -> torch.Tensor:
    tensor = getattr(weights if layer < 0 else weights.layers[layer], target)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _copy(source: torch.Tensor, spec: TensorSpec, target: torch.Tensor) -> None:
    rows = target[spec.first_row : spec.first_row + spec.shape[0]]
    if spec.num_interleaved_heads == 0:
        rows.copy_(source)
        return
    num_heads, num_columns = spec.num_interleaved_heads, spec.shape[1]
    num_pairs = spec.shape[0] // num_heads // 2
    # Source row 2 * pair + side of a head becomes row side * num_pairs + pair.
    rows.view(num_heads, 2, num_pairs, num_columns).copy_(
        source.view(num_heads, num_pairs, 2, num_columns).transpose(1, 2)
    )
