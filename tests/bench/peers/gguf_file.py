"""Writes a Mistral model as a GGUF file for llama.cpp.

Keys and tensor names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a Hugging Face checkpoint."""
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


def interleaved(matrix: Any, head_dim: int) -> Any:
    """Rows of Q or K [heads x head_dim, hidden], reordered from halves (i, i + head_dim / 2) to pairs (2i, 2i + 1).

    RoPE turns the pair (i, i + head_dim / 2) in Hugging Face's layout and (2i, 2i + 1) in llama.cpp's architecture `llama`.
    """
    halves = matrix.reshape(-1, 2, head_dim // 2, matrix.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(matrix.shape)


def write_gguf(checkpoint: Path, output: Path) -> None:
    """Write configuration, vocabulary and weights (FP32) of a Hugging Face checkpoint with one safetensors file into one file."""
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = convert_tekken_tokenizer(str(checkpoint / "tekken.json")).backend_tokenizer
    writer = GGUFWriter(str(output), "llama")
    writer.add_name("demo")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, json.loads(tokenizer.to_str()), config)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        values = weight.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, config["head_dim"])
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    names: list[str | None] = [None] * config["vocab_size"]
    for text, token_id in tokenizer["model"]["vocab"].items():
        names[token_id] = text
    kinds = [TokenType.NORMAL] * len(names)
    for token in tokenizer["added_tokens"]:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL
    missing = [token_id for token_id, name in enumerate(names) if name is None]
    assert not missing, f"ids without a token: {missing[:5]}"
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
