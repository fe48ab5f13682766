"""The least a decode step may take: the time its bytes take at the measured read ceiling."""

from __future__ import annotations

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import ModelConfig


def decode_bytes(config: ModelConfig, weight_format: WeightFormat, kv_bytes: int, batch: int, context: int) -> int:
    """Bytes that a step of `batch` rows must read: linear layers and head once, keys and values of every row.

    `kv_bytes`: of one element. Activations, logits and the rows of the embedding are left out: 0.1 % at batch 1.
    """
    linear_bytes = 1 if weight_format.has_fp8_linears else 2
    head_bytes = 1 if weight_format.has_fp8_head else 2
    hidden, heads = config.hidden_size, config.query_size
    of_layer = (heads + 2 * config.kv_size) * hidden + hidden * heads + 3 * config.ffn_size * hidden
    weights = linear_bytes * config.num_layers * of_layer + head_bytes * config.vocab_size * hidden
    return weights + batch * context * 2 * config.num_layers * config.kv_size * kv_bytes
