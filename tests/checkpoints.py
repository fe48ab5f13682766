"""Small random checkpoints in the real file formats, for every test that needs a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

NUM_SPECIAL_TOKENS = 1000
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_MISTRAL_NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    "model.layers.": "layers.",
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_proj.": "attention.wq.",
    "self_attn.k_proj.": "attention.wk.",
    "self_attn.v_proj.": "attention.wv.",
    "self_attn.o_proj.": "attention.wo.",
    "mlp.gate_proj.": "feed_forward.w1.",
    "mlp.down_proj.": "feed_forward.w2.",
    "mlp.up_proj.": "feed_forward.w3.",
}


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Sizes of the model to make; query size is deliberately not hidden_size, as in Mistral NeMo."""

    num_layers: int = 2
    hidden_size: int = 96
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    ffn_size: int = 160
    vocab_size: int = 512
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096


def make_checkpoint(
    folder: Path,
    *,
    layout: Literal["hf", "consolidated"] = "hf",
    num_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    has_tekken: bool = False,
    **config: Any,
) -> Path:
    """Write a random checkpoint and return its folder; the same seed and sizes give the same model in both layouts.

    `config` are fields of TinyConfig. `num_shards` > 1 writes an index too. `has_tekken` adds a tekken.json whose
    vocabulary is cut by rank to `vocab_size`, which must then be above 1,256 (special tokens and single bytes).
    """
    sizes = TinyConfig(**config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(sizes, seed)
    if layout == "consolidated":
        tensors = {_mistral_name(name): _interleave(name, tensor, sizes) for name, tensor in tensors.items()}
        settings, settings_name, stem = _params_json(sizes), "params.json", "consolidated"
    else:
        settings, settings_name, stem = config_json(sizes, dtype), "config.json", "model"
    write_json(folder / settings_name, settings)
    write_shards(folder, stem, {name: tensor.to(dtype) for name, tensor in tensors.items()}, num_shards)
    if has_tekken:
        write_tekken(folder / "tekken.json", sizes.vocab_size)
    return folder


def random_tensors(sizes: TinyConfig, seed: int) -> dict[str, torch.Tensor]:
    """FP32 tensors under Hugging Face's names, so wide that logits spread and greedy does not loop at once."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(gain * columns**-0.5)

    def norm() -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(sizes.hidden_size, generator=generator)

    query_size, kv_size = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    embedding_gain = 3.0 if sizes.tie_word_embeddings else sizes.hidden_size**0.5
    tensors = {"model.embed_tokens.weight": matrix(sizes.vocab_size, sizes.hidden_size, embedding_gain)}
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(query_size, sizes.hidden_size, 1.5),
            prefix + "self_attn.k_proj.weight": matrix(kv_size, sizes.hidden_size, 1.5),
            prefix + "self_attn.v_proj.weight": matrix(kv_size, sizes.hidden_size, 2.0),
            prefix + "self_attn.o_proj.weight": matrix(sizes.hidden_size, query_size, 2.0),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": matrix(sizes.ffn_size, sizes.hidden_size, 1.5),
            prefix + "mlp.up_proj.weight": matrix(sizes.ffn_size, sizes.hidden_size, 1.5),
            prefix + "mlp.down_proj.weight": matrix(sizes.hidden_size, sizes.ffn_size, 1.5),
        }
    tensors["model.norm.weight"] = norm()
    if not sizes.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(sizes.vocab_size, sizes.hidden_size, 3.0)
    return tensors


def write_shards(folder: Path, stem: str, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """Write `<stem>.safetensors`, or `num_shards` numbered files with their index."""
    if num_shards == 1:
        save_file(_contiguous(tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(_contiguous(part), folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_tekken(path: Path, vocab_size: int) -> None:
    """Cut mistral-common's own copy of Mistral NeMo's tekken.json to `vocab_size` ids by rank."""
    full = json.loads((resources.files("mistral_common") / "data" / "tekken_240718.json").read_text(encoding="utf-8"))
    num_ranks = vocab_size - NUM_SPECIAL_TOKENS
    assert 256 < num_ranks <= len(full["vocab"])
    full["vocab"] = full["vocab"][:num_ranks]
    full["config"] |= {"num_vocab_tokens": num_ranks, "default_vocab_size": vocab_size}
    write_json(path, full)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as the tools that make checkpoints do."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config_json(sizes: TinyConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` that Hugging Face's tools write for such a model."""
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn_size,
        "max_position_embeddings": sizes.max_position_embeddings,
        "model_type": "mistral",
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": sizes.tie_word_embeddings,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "use_cache": True,
        "vocab_size": sizes.vocab_size,
    }


def _params_json(sizes: TinyConfig) -> dict[str, Any]:
    params: dict[str, Any] = {
        "dim": sizes.hidden_size,
        "n_layers": sizes.num_layers,
        "head_dim": sizes.head_dim,
        "hidden_dim": sizes.ffn_size,
        "n_heads": sizes.num_heads,
        "n_kv_heads": sizes.num_kv_heads,
        "norm_eps": sizes.rms_norm_eps,
        "vocab_size": sizes.vocab_size,
        "rope_theta": sizes.rope_theta,
    }
    return params | {"tied_embeddings": True} if sizes.tie_word_embeddings else params


def _mistral_name(name: str) -> str:
    for theirs, ours in _MISTRAL_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _interleave(name: str, tensor: torch.Tensor, sizes: TinyConfig) -> torch.Tensor:
    """Rows of q and k from half-split to interleaved RoPE pairs: row i to 2i, row i + D / 2 to 2i + 1 of each head."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    half = sizes.head_dim // 2
    order = [row for i in range(half) for row in (i, i + half)]
    return tensor.view(-1, sizes.head_dim, sizes.hidden_size)[:, order].reshape(tensor.shape)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
