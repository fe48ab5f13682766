"""The least that decode steps and prompts may take: the time of their bytes, or of their products."""

from __future__ import annotations

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import ModelConfig
from kernels.op import FP8_FLOP_PER_US, HALF_FLOP_PER_US


def decode_bytes(config: ModelConfig, weight_format: WeightFormat, kv_bytes: int, batch: int, context: int) -> int:
    """Bytes that a step of `batch` rows must read: linear layers and head once, keys and values of every row.

    `kv_bytes`: of one element. Activations, logits and the rows of the embedding are left out: 0.1 % at batch 1.
    """
    linear_bytes = 1 if weight_format.has_fp8_linears else 2
    head_bytes = 1 if weight_format.has_fp8_head else 2
    weights = linear_bytes * _linear_weights(config) + head_bytes * config.vocab_size * config.hidden_size
    return weights + batch * context * 2 * config.num_layers * config.kv_size * kv_bytes


def prompt_us(config: ModelConfig, length: int, bytes_per_us: float) -> float:
    """Microseconds that a prompt takes at least: FP8 products in the layers, half precision in causal attention.

    The tensor cores' rates are those of the datasheet. A short prompt takes as long as reading the weights.
    """
    weights_us = _linear_weights(config) / bytes_per_us
    return max(_linears_us(config, length), weights_us) + _attention_us(config, length)


def serving_us(
    config: ModelConfig,
    weight_format: WeightFormat,
    kv_bytes: int,
    *,
    prompt: int,
    output: int,
    batch: float,
    bytes_per_us: float,
) -> float:
    """Microseconds in which `batch` requests, always so many at a time, can be served at best: prompts and answers.

    The larger of the bytes of `output` steps, each at the mean context, and of the products of all tokens: as if both overlapped
    perfectly, which no engine reaches, so it is a bound.
    """
    step_bytes = decode_bytes(config, weight_format, kv_bytes, 1, 0)
    row_bytes = decode_bytes(config, weight_format, kv_bytes, 1, prompt + output // 2) - step_bytes
    bytes_us = output * (step_bytes + batch * row_bytes) / bytes_per_us
    return max(bytes_us, batch * (_linears_us(config, prompt + output) + _attention_us(config, prompt)))


def _linears_us(config: ModelConfig, num_tokens: int) -> float:
    return 2 * _linear_weights(config) * num_tokens / FP8_FLOP_PER_US


def _attention_us(config: ModelConfig, length: int) -> float:
    """Causal attention of a prompt to itself."""
    return 2 * config.num_layers * config.query_size * length * (length + 1) / HALF_FLOP_PER_US


def _linear_weights(config: ModelConfig) -> int:
    hidden, heads = config.hidden_size, config.query_size
    of_layer = (heads + 2 * config.kv_size) * hidden + hidden * heads + 3 * config.ffn_size * hidden
    return config.num_layers * of_layer
