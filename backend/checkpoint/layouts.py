"""Which tensors a checkpoint must hold, under the names of either layout, and where each goes in the engine's weights.

The engine keeps q, k and v of a layer in one matrix, and gate and up in another, so several source tensors share one
target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from backend.checkpoint.model_config import ModelConfig

Target = Literal["embedding", "norm", "head", "attention_norm", "qkv", "output", "ffn_norm", "gate_up", "down"]

_HUGGINGFACE = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layer": "model.layers.{layer}.",
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_MISTRAL = {
    "embedding": "tok_embeddings.weight",
    "norm": "norm.weight",
    "head": "output.weight",
    "layer": "layers.{layer}.",
    "attention_norm": "attention_norm.weight",
    "q": "attention.wq.weight",
    "k": "attention.wk.weight",
    "v": "attention.wv.weight",
    "o": "attention.wo.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "feed_forward.w1.weight",
    "up": "feed_forward.w3.weight",
    "down": "feed_forward.w2.weight",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One source tensor: its name and shape, and the rows `first_row` and following of `target` in `layer` it fills.

    `layer` is -1 outside the layers. `num_interleaved_heads` > 0: the rows of each head stand in RoPE pairs
    (2i, 2i + 1), as in Mistral's files, and are to be reordered to (i, i + head_dim / 2), as everywhere else.
    """

    name: str
    shape: tuple[int, ...]
    target: Target
    layer: int = -1
    first_row: int = 0
    num_interleaved_heads: int = 0


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor the checkpoint must hold and no other, by its name in the file."""
    return {spec.name: spec for spec in _walk(config)}


def _walk(config: ModelConfig) -> Iterator[TensorSpec]:
    names = _HUGGINGFACE if config.layout == "huggingface" else _MISTRAL
    hidden, ffn, query, kv = config.hidden_size, config.ffn_size, config.query_size, config.kv_size
    q_pairs, k_pairs = (0, 0) if config.layout == "huggingface" else (config.num_heads, config.num_kv_heads)
    yield TensorSpec(names["embedding"], (config.vocab_size, hidden), "embedding")
    for layer in range(config.num_layers):
        prefix = names["layer"].format(layer=layer)
        yield TensorSpec(prefix + names["attention_norm"], (hidden,), "attention_norm", layer)
        yield TensorSpec(prefix + names["q"], (query, hidden), "qkv", layer, 0, q_pairs)
        yield TensorSpec(prefix + names["k"], (kv, hidden), "qkv", layer, query, k_pairs)
        yield TensorSpec(prefix + names["v"], (kv, hidden), "qkv", layer, query + kv)
        yield TensorSpec(prefix + names["o"], (hidden, query), "output", layer)
        yield TensorSpec(prefix + names["ffn_norm"], (hidden,), "ffn_norm", layer)
        yield TensorSpec(prefix + names["gate"], (ffn, hidden), "gate_up", layer)
        yield TensorSpec(prefix + names["up"], (ffn, hidden), "gate_up", layer, ffn)
        yield TensorSpec(prefix + names["down"], (hidden, ffn), "down", layer)
    yield TensorSpec(names["norm"], (hidden,), "norm")
    if not config.tie_word_embeddings:
        yield TensorSpec(names["head"], (config.vocab_size, hidden), "head")
