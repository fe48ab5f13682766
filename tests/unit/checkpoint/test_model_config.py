from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from backend.checkpoint.model_config import read_model_config
from backend.errors import ConfigError
from tests.checkpoints import TinyConfig, make_checkpoint, write_json

MISSING = object()


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mistral"), layout="consolidated")


def edited(source: Path, tmp_path: Path, **fields: Any) -> Path:
    """A folder with the weights of `source` (linked) and its configuration changed; MISSING removes a field."""
    for path in source.iterdir():
        if path.suffix == ".json":
            values = json.loads(path.read_text()) | fields
            write_json(tmp_path / path.name, {name: value for name, value in values.items() if value is not MISSING})
        else:
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_both_layouts_give_the_same_shape(hf_folder: Path, mistral_folder: Path) -> None:
    sizes = TinyConfig()
    for folder, layout in ((hf_folder, "huggingface"), (mistral_folder, "mistral")):
        config = read_model_config(folder)
        assert config.layout == layout
        for name in (
            "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size",
            "rope_theta", "rms_norm_eps", "tie_word_embeddings",
        ):  # fmt: skip
            assert getattr(config, name) == getattr(sizes, name), name
    assert read_model_config(hf_folder).max_position_embeddings == 4096
    assert read_model_config(hf_folder).source_dtype == "float32"
    assert read_model_config(mistral_folder).max_position_embeddings is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": MISSING, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500_000, "rope_scaling": None},
    ],
)
def test_rope_theta_of_old_and_new_files(hf_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    assert read_model_config(edited(hf_folder, tmp_path, **fields)).rope_theta == 5e5


def test_dtype_of_new_files(hf_folder: Path, tmp_path: Path) -> None:
    assert (
        read_model_config(edited(hf_folder, tmp_path, torch_dtype=MISSING, dtype="bfloat16")).source_dtype == "bfloat16"
    )


def test_a_length_in_params_json(mistral_folder: Path, tmp_path: Path) -> None:
    assert read_model_config(edited(mistral_folder, tmp_path, max_seq_len=131072)).max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": MISSING}, "head_dim is missing; it is required and never guessed"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16, found 24"),
        ({"hidden_size": 100}, "hidden size must be a multiple of 16, found 100"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be a whole number in \[1, 1024\], found 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number .* found True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a whole number .* found 2.0"),
        ({"vocab_size": "512"}, "vocab_size must be a whole number .* found '512'"),
        ({"vocab_size": 10**9}, r"vocab_size must be a whole number in \[2, 262144\], found 1000000000"),
        ({"num_key_value_heads": 3}, "multiple of the number of KV heads, found 4 and 3"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number in .* found 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number in .* found nan"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures must be \['MistralForCausalLM'\], found .*Llama"),
        ({"architectures": MISSING}, "architectures must be .* found None"),
        ({"rope_theta": MISSING}, "rope_theta .* is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling.rope_type must be 'default', found 'linear'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type must be 'default', found 'yarn'"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta must agree with rope_parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, found 0.5"),
        ({"rope_parameters": 7}, "rope_parameters must be an object, found 7"),
        ({"sliding_window": 4096}, "sliding_window must be null or absent, .* found 4096"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be null or absent"),
        ({"mlp_bias": True}, "mlp_bias must be null or absent"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"quant_method is not served \(served are FP8.* found 'awq'",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, found 'yes'"),
        ({"torch_dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, found 'int8'"),
    ],
)
def test_unusable_config_json(hf_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        read_model_config(edited(hf_folder, tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": MISSING}, "head_dim is missing"),
        ({"rope_theta": MISSING}, "rope_theta is missing"),
        ({"moe": {"num_experts": 8}}, "moe must be null or absent"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization must be null or absent"),
        ({"vision_encoder": {}}, "vision_encoder must be null or absent"),
        ({"sliding_window": 4096}, "sliding_window must be null or absent"),
    ],
)
def test_unusable_params_json(mistral_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"params\.json: {message}"):
        read_model_config(edited(mistral_folder, tmp_path, **fields))


def test_both_layouts_in_one_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path)
    make_checkpoint(tmp_path, layout="consolidated")
    with caplog.at_level(logging.INFO):
        assert read_model_config(tmp_path).layout == "huggingface"
    assert "the Hugging Face files are taken" in caplog.text


def test_a_config_json_without_its_weights_beside_mistrals(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, layout="consolidated")
    (tmp_path / "config.json").write_text("{}")
    assert read_model_config(tmp_path).layout == "mistral"


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_model_config(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        read_model_config(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"neither a Hugging Face folder .*config\.json: missing"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: found, model\*\.safetensors: missing"):
        read_model_config(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"pickled weights \(pytorch_model-00001-of-00002\.bin\), which are never read"
    ):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git-LFS pointer.*git lfs pull"),
        (b"{", "not valid JSON"),
        (b'{"a":' * 100_000, r"not valid JSON \(nested too deeply\)"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "must hold a JSON object, found list"),
    ],
)
def test_config_json_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_model_config(tmp_path)
