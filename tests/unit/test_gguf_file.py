"""The GGUF file that llama.cpp is given holds the demo checkpoint: read back by the package that llama.cpp's project keeps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file

from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.vocabulary import read_vocabulary
from tests.bench.peers.gguf_file import gguf_name, interleaved, write_gguf
from tests.demo.evaluate import CHECKPOINT


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    write_gguf(CHECKPOINT, path)
    return GGUFReader(path)


def value(read: GGUFReader, name: str) -> Any:
    field = read.get_field(name)
    assert field is not None, name
    return field.contents()


def test_sizes_are_those_of_the_configuration(read: GGUFReader) -> None:
    config = read_model_config(CHECKPOINT)
    assert value(read, "general.architecture") == "llama"
    expected = {
        "block_count": config.num_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
    }
    assert {name: value(read, f"llama.{name}") for name in expected} == expected
    assert value(read, "llama.rope.freq_base") == pytest.approx(config.rope_theta)
    assert value(read, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)


def test_every_weight_is_there_to_the_bit(read: GGUFReader) -> None:
    weights = load_file(CHECKPOINT / "model.safetensors")
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    assert tensors.keys() == {gguf_name(name) for name in weights}
    head_dim = read_model_config(CHECKPOINT).head_dim
    for name, weight in weights.items():
        expected = weight.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            rows = [
                head + i + half
                for head in range(0, len(expected), head_dim)
                for i in range(head_dim // 2)
                for half in (0, head_dim // 2)
            ]
            expected = expected[rows]
        np.testing.assert_array_equal(tensors[gguf_name(name)], expected, err_msg=name)


def test_attention_scores_are_the_same_in_both_orders() -> None:
    """Scores of two positions: RoPE on halves of the rows as they were, and on pairs of neighbours as they are written."""
    head_dim, hidden = 8, 5
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(2, 2 * head_dim, hidden))
    inputs = generator.normal(size=(2, hidden))
    angles = [position / 100.0 ** (np.arange(head_dim // 2) * 2 / head_dim) for position in (3, 11)]

    def turned(x: Any, angle: Any) -> Any:
        """[heads, 2, head_dim / 2]: each pair (first, second) as a complex number, turned."""
        return (x[:, 0] + 1j * x[:, 1]) * np.exp(1j * angle)

    def scores(query: Any, key: Any, is_interleaved: bool) -> Any:
        heads = [(weight @ x).reshape(2, head_dim) for weight, x in zip((query, key), inputs, strict=True)]
        if is_interleaved:
            pairs = [head.reshape(2, head_dim // 2, 2).transpose(0, 2, 1) for head in heads]
        else:
            pairs = [head.reshape(2, 2, head_dim // 2) for head in heads]
        first, second = (turned(x, angle) for x, angle in zip(pairs, angles, strict=True))
        return (first * second.conj()).real.sum(axis=1)

    expected = scores(query, key, is_interleaved=False)
    moved = scores(interleaved(query, head_dim), interleaved(key, head_dim), is_interleaved=True)
    np.testing.assert_allclose(moved, expected, rtol=1e-12)
    assert not np.allclose(scores(query, key, is_interleaved=True), expected)


def test_the_vocabulary_is_that_of_the_checkpoint(read: GGUFReader) -> None:
    vocabulary = read_vocabulary(CHECKPOINT)
    names, kinds = value(read, "tokenizer.ggml.tokens"), value(read, "tokenizer.ggml.token_type")
    assert len(names) == len(kinds) == len(vocabulary.token_bytes)
    alphabet = byte_alphabet()
    for token_id, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind == TokenType.CONTROL:
            assert vocabulary.token_bytes[token_id] == b"", name
        else:
            assert bytes(alphabet[character] for character in name) == vocabulary.token_bytes[token_id]
    assert kinds.count(TokenType.CONTROL) == sum(not each for each in vocabulary.token_bytes)
    merges = value(read, "tokenizer.ggml.merges")
    known = set(names)
    assert merges
    assert all("".join(merge.split(" ")) in known and merge.count(" ") == 1 for merge in merges)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert value(read, "tokenizer.ggml.bos_token_id") == config["bos_token_id"]
    assert value(read, "tokenizer.ggml.eos_token_id") == config["eos_token_id"]
    assert not value(read, "tokenizer.ggml.add_bos_token")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
