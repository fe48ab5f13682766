"""Which tensors a checkpoint must hold, under the names of either layout, and where each goes in the engine's weights.

The engine keeps q, k and v of a layer in one matrix, and gate and up in another, so several source tensors share one
target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.quantization import BLOCK_SIZE
from backend.errors import ConfigError

Target = Literal[
    "embedding", "norm", "head", "attention_norm", "qkv", "output", "ffn_norm", "gate_up", "down", "kv_scales"
]
Kind = Literal["values", "weight_scale", "input_scale", "kv_scale"]
Shape = tuple[int, ...]

HEAD_LAYER = -1
"""Stands for a layer outside the layers."""
_HUGGINGFACE = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{layer}.",
    "attention": "self_attn.",
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_MISTRAL = {
    "embedding": "tok_embeddings",
    "norm": "norm",
    "head": "output",
    "layer": "layers.{layer}.",
    "attention": "attention.",
    "attention_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "o": "attention.wo",
    "ffn_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
_KV_SCALE_NAMES = (
    ("kv_scale",),
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
)
"""Names under self_attn that tools have given the scales of the KV cache; `kv_scale` is both."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One source tensor: its name and shape, and the rows `first_row` and following of `target` in `layer` it fills.

    `layer` is -1 outside the layers. `num_interleaved_heads` > 0: the rows of each head stand in RoPE pairs
    (2i, 2i + 1), as in Mistral's files, and are to be reordered to (i, i + head_dim / 2), as everywhere else.

    `scale_name` is the tensor with the scales of FP8 `values`, empty for plain ones. Scales are of a `kind` other than
    `values` and may have one of `other_shapes` too. They belong to `num_rows` rows of their target, one for each row or
    one for all; with `is_block_scale` there is one for each block of values.
    """

    name: str
    shape: Shape
    target: Target
    layer: int = HEAD_LAYER
    first_row: int = 0
    num_interleaved_heads: int = 0
    kind: Kind = "values"
    scale_name: str = ""
    num_rows: int = 0
    is_block_scale: bool = False
    other_shapes: tuple[Shape, ...] = ()


def tensor_specs(config: ModelConfig, names: Collection[str] = ()) -> dict[str, TensorSpec]:
    """Every tensor the checkpoint must hold and no other, by its name in the file.

    `names`, those that there are, decide only which of their several names the KV scales have.
    """
    return {spec.name: spec for spec in _walk(config, names)}


def has_fp8_source(config: ModelConfig, target: Target, layer: int = HEAD_LAYER) -> bool:
    """Whether the checkpoint's own values of a matrix are FP8; ConfigError when only some of its parts are."""
    if config.quantization is None:
        return False
    prefix = _HUGGINGFACE["layer"].format(layer=layer) if layer >= 0 else ""
    parts = {"qkv": ("q", "k", "v"), "output": ("o",), "gate_up": ("gate", "up"), "down": ("down",), "head": ("head",)}
    modules = [prefix + _HUGGINGFACE[part] for part in parts.get(target, ())]
    quantised = [config.quantization.quantises(module) for module in modules]
    if any(quantised) and not all(quantised):
        raise ConfigError(
            f"quantization: {' and '.join(modules)} must be quantised all or not at all, because they are computed as "
            f"one matrix, found {quantised.count(False)} of them among the ignored modules"
        )
    return any(quantised)


def _walk(config: ModelConfig, present: Collection[str]) -> Iterator[TensorSpec]:
    names = _HUGGINGFACE if config.layout == "huggingface" else _MISTRAL
    hidden, ffn, query, kv = config.hidden_size, config.ffn_size, config.query_size, config.kv_size
    q_pairs, k_pairs = (0, 0) if config.layout == "huggingface" else (config.num_heads, config.num_kv_heads)
    yield TensorSpec(names["embedding"] + ".weight", (config.vocab_size, hidden), "embedding")
    for layer in range(config.num_layers):
        prefix = names["layer"].format(layer=layer)
        yield TensorSpec(prefix + names["attention_norm"] + ".weight", (hidden,), "attention_norm", layer)
        yield from _linear(config, prefix + names["q"], query, hidden, "qkv", layer, 0, q_pairs)
        yield from _linear(config, prefix + names["k"], kv, hidden, "qkv", layer, query, k_pairs)
        yield from _linear(config, prefix + names["v"], kv, hidden, "qkv", layer, query + kv)
        yield from _linear(config, prefix + names["o"], hidden, query, "output", layer)
        yield TensorSpec(prefix + names["ffn_norm"] + ".weight", (hidden,), "ffn_norm", layer)
        yield from _linear(config, prefix + names["gate"], ffn, hidden, "gate_up", layer)
        yield from _linear(config, prefix + names["up"], ffn, hidden, "gate_up", layer, ffn)
        yield from _linear(config, prefix + names["down"], hidden, ffn, "down", layer)
        if config.quantization is not None and config.quantization.has_kv_scales:
            yield from _kv_scales(prefix + names["attention"], layer, present)
    yield TensorSpec(names["norm"] + ".weight", (hidden,), "norm")
    if not config.tie_word_embeddings:
        yield from _linear(config, names["head"], config.vocab_size, hidden, "head")


def _linear(
    config: ModelConfig,
    module: str,
    rows: int,
    columns: int,
    target: Target,
    layer: int = HEAD_LAYER,
    first_row: int = 0,
    num_interleaved_heads: int = 0,
) -> Iterator[TensorSpec]:
    weight = TensorSpec(f"{module}.weight", (rows, columns), target, layer, first_row, num_interleaved_heads)
    if config.quantization is None or not has_fp8_source(config, target, layer):
        yield weight
        return
    scale_name = f"{module}.{config.quantization.weight_scale_name}"
    shapes: dict[str, tuple[Shape, ...]] = {
        "tensor": ((), (1,)),
        "channel": ((rows, 1), (rows,)),
        "block": ((-(-rows // BLOCK_SIZE), -(-columns // BLOCK_SIZE)),),
    }
    shape, *other_shapes = shapes[config.quantization.weight_scales]
    yield TensorSpec(weight.name, weight.shape, target, layer, first_row, scale_name=scale_name)
    yield TensorSpec(
        scale_name, shape, target, layer, first_row, kind="weight_scale", num_rows=rows,
        is_block_scale=config.quantization.weight_scales == "block", other_shapes=tuple(other_shapes),
    )  # fmt: skip
    if config.quantization.has_static_activations:
        yield TensorSpec(f"{module}.input_scale", (), target, layer, kind="input_scale", other_shapes=((1,),))


def _kv_scales(prefix: str, layer: int, present: Collection[str]) -> Iterator[TensorSpec]:
    for names in _KV_SCALE_NAMES:
        if prefix + names[0] in present:
            break
    else:
        names = _KV_SCALE_NAMES[1]  # the most usual, to be named as missing
    for index, name in enumerate(names):
        yield TensorSpec(
            prefix + name,
            (),
            "kv_scales",
            layer,
            index,
            kind="kv_scale",
            num_rows=2 // len(names),
            other_shapes=((1,),),
        )
