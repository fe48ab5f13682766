"""The model's weights in the engine's own arrangement, and their bytes, known before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backend.checkpoint.layouts import HEAD_LAYER, Target, has_fp8_source
from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norms are FP32.

    `qkv` [(H + 2K) * D, E]: q, then k, then v, with RoPE pairs (i, i + D / 2). `gate_up` [2F, E]: gate, then up.
    `kv_scales` [2] FP32 on the CPU: of K and of V in FP8 pages, 1 where the checkpoint has none.
    """

    attention_norm: torch.Tensor
    qkv: Matrix
    output: Matrix
    ffn_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix
    kv_scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """The whole model, `embedding` [V, E]; a tied head that is not FP8 has the very tensor of the embedding."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Matrix


def is_fp8(config: ModelConfig, weight_format: WeightFormat, target: Target, layer: int = HEAD_LAYER) -> bool:
    """Whether a matrix is held in FP8: all are but those that a quantised checkpoint itself leaves out."""
    if target == "head":
        return weight_format.has_fp8_head
    return weight_format.has_fp8_linears and (config.quantization is None or has_fp8_source(config, target, layer))


def has_input_scale(config: ModelConfig, target: Target, layer: int = HEAD_LAYER) -> bool:
    """Whether the checkpoint brings the scale of a matrix's inputs."""
    quantization = config.quantization
    return quantization is not None and quantization.has_static_activations and has_fp8_source(config, target, layer)


def weight_bytes(config: ModelConfig, weight_format: WeightFormat) -> int:
    """Bytes of the weights on the device."""

    def matrix(target: Target, rows: int, columns: int, layer: int = HEAD_LAYER) -> int:
        return weight_format.matrix_bytes(
            rows,
            columns,
            is_fp8=is_fp8(config, weight_format, target, layer),
            has_input_scale=has_input_scale(config, target, layer),
        )

    linears = sum(
        matrix(target, rows, columns, layer)
        for layer in range(config.num_layers)
        for target, rows, columns in linear_sizes(config)
    )
    embedding = config.vocab_size * config.hidden_size * weight_format.dense.itemsize
    is_shared = config.tie_word_embeddings and not is_fp8(config, weight_format, "head")
    head = 0 if is_shared else matrix("head", config.vocab_size, config.hidden_size)
    norms = (2 * config.num_layers + 1) * config.hidden_size * torch.float32.itemsize
    return linears + embedding + head + norms


def allocate_weights(config: ModelConfig, device: torch.device, weight_format: WeightFormat) -> Weights:
    """Everything that `weight_bytes` counts, with contents still to come."""

    def matrix(target: Target, rows: int, columns: int, layer: int = HEAD_LAYER) -> Matrix:
        return weight_format.allocate(
            rows,
            columns,
            device,
            is_fp8=is_fp8(config, weight_format, target, layer),
            has_input_scale=has_input_scale(config, target, layer),
        )

    def norm() -> torch.Tensor:
        return torch.empty(config.hidden_size, device=device, dtype=torch.float32)

    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            ffn_norm=norm(),
            kv_scales=torch.ones(2),
            **{target: matrix(target, rows, columns, layer) for target, rows, columns in linear_sizes(config)},
        )
        for layer in range(config.num_layers)
    )
    embedding = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=weight_format.dense)
    is_shared = config.tie_word_embeddings and not is_fp8(config, weight_format, "head")
    head = Matrix(embedding) if is_shared else matrix("head", config.vocab_size, config.hidden_size)
    return Weights(embedding=embedding, layers=layers, norm=norm(), head=head)


def linear_sizes(config: ModelConfig) -> tuple[tuple[Target, int, int], ...]:
    """The linear layers of a layer: target, outputs, inputs."""
    return (
        ("qkv", config.query_size + 2 * config.kv_size, config.hidden_size),
        ("output", config.hidden_size, config.query_size),
        ("gate_up", 2 * config.ffn_size, config.hidden_size),
        ("down", config.hidden_size, config.ffn_size),
    )
