"""The shape of a dense Mistral model, from `config.json` (Hugging Face) or `params.json` (Mistral's own folders)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backend.checkpoint.json_object import JsonObject
from backend.checkpoint.quantization import Quantization, read_quantization
from backend.errors import ConfigError

Layout = Literal["huggingface", "mistral"]

SIZE_MULTIPLE = 16
"""hidden_size, head_dim and ffn_size are multiples of this: whole vectors, whole tiles, no scalar tails anywhere."""
MAX_VOCAB_SIZE = 2**18
_ARCHITECTURE = "MistralForCausalLM"
_DTYPES = ("bfloat16", "float16", "float32")
_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt")
_HF_FEATURES_NOT_SERVED = ("attention_bias", "mlp_bias", "sliding_window")
_MISTRAL_FEATURES_NOT_SERVED = (
    "attention_bias", "sliding_window", "moe", "quantization", "quantization_config", "vision_encoder", "multimodal",
    "yarn", "rope_scaling", "llama_4_scaling", "lora", "q_lora_rank",
)  # fmt: skip

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of the model; q and o have `num_heads * head_dim` columns, which need not be `hidden_size`.

    `max_position_embeddings` is what the file says and sizes nothing; None when it says nothing; so is `source_dtype`.
    `quantization` is None for weights in BF16, FP16 or FP32.
    """

    layout: Layout
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int | None
    source_dtype: str | None
    quantization: Quantization | None = None

    @property
    def num_heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Rows of the q projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the k projection, and of the v projection."""
        return self.num_kv_heads * self.head_dim


def read_model_config(folder: Path) -> ModelConfig:
    """Read and check the model's shape.

    When both layouts lie in the folder, Hugging Face's is taken and the log says so. ConfigError names file, field,
    bound and value for whatever is missing, implausible, or needs what this project does not compute.
    """
    layout = detect_layout(folder)
    if layout == "huggingface":
        return _read_config_json(JsonObject.read(folder / "config.json"))
    return _read_params_json(JsonObject.read(folder / "params.json"))


def detect_layout(folder: Path) -> Layout:
    """Whose files lie in the folder; ConfigError says what is missing when neither layout is complete."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"checkpoint {folder} {problem}; give the folder that holds config.json and *.safetensors")
    has_config, has_params = (folder / "config.json").is_file(), (folder / "params.json").is_file()
    has_hf_weights = any(folder.glob("model*.safetensors")) or (folder / "model.safetensors.index.json").is_file()
    has_mistral_weights = any(folder.glob("consolidated*.safetensors"))
    if has_config and has_hf_weights:
        if has_params and has_mistral_weights:
            _log.info(
                "%s holds both config.json and params.json with weights: the Hugging Face files are taken", folder
            )
        return "huggingface"
    if has_params and has_mistral_weights:
        return "mistral"
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled and not has_hf_weights and not has_mistral_weights:
        raise ConfigError(
            f"checkpoint {folder} holds pickled weights ({pickled[0]}), which are never read: use safetensors"
        )
    present = [
        f"{name}: {'found' if is_there else 'missing'}"
        for name, is_there in (
            ("config.json", has_config), ("model*.safetensors", has_hf_weights),
            ("params.json", has_params), ("consolidated*.safetensors", has_mistral_weights),
        )
    ]  # fmt: skip
    raise ConfigError(
        f"checkpoint {folder} is neither a Hugging Face folder (config.json with model*.safetensors) nor one of "
        f"Mistral's own (params.json with consolidated*.safetensors); {', '.join(present)}; download the missing files"
    )


def _read_config_json(file: JsonObject) -> ModelConfig:
    architectures = file.values.get("architectures")
    if architectures != [_ARCHITECTURE]:
        raise file.error("architectures", f"must be ['{_ARCHITECTURE}']", architectures)
    if file.values.get("hidden_act", "silu") != "silu":
        raise file.error("hidden_act", "must be 'silu'", file.values["hidden_act"])
    _refuse_features(file, _HF_FEATURES_NOT_SERVED)
    return _checked(
        file,
        ModelConfig(
            layout="huggingface",
            num_layers=file.integer("num_hidden_layers", 1, 1024),
            hidden_size=file.integer("hidden_size", 16, 65536),
            num_heads=file.integer("num_attention_heads", 1, 1024),
            num_kv_heads=file.integer("num_key_value_heads", 1, 1024),
            head_dim=file.integer("head_dim", 16, 256),
            ffn_size=file.integer("intermediate_size", 16, 2**20),
            vocab_size=file.integer("vocab_size", 2, MAX_VOCAB_SIZE),
            rope_theta=_rope_theta(file),
            rms_norm_eps=file.number("rms_norm_eps", 1e-12, 1e-1),
            tie_word_embeddings=file.boolean("tie_word_embeddings", default=False),
            max_position_embeddings=_optional_positions(file, "max_position_embeddings"),
            source_dtype=_source_dtype(file),
            quantization=read_quantization(file),
        ),
    )


def _read_params_json(file: JsonObject) -> ModelConfig:
    _refuse_features(file, _MISTRAL_FEATURES_NOT_SERVED)
    length_names = [name for name in ("max_position_embeddings", "max_seq_len", "model_max_length") if file.has(name)]
    return _checked(
        file,
        ModelConfig(
            layout="mistral",
            num_layers=file.integer("n_layers", 1, 1024),
            hidden_size=file.integer("dim", 16, 65536),
            num_heads=file.integer("n_heads", 1, 1024),
            num_kv_heads=file.integer("n_kv_heads", 1, 1024),
            head_dim=file.integer("head_dim", 16, 256),
            ffn_size=file.integer("hidden_dim", 16, 2**20),
            vocab_size=file.integer("vocab_size", 2, MAX_VOCAB_SIZE),
            rope_theta=file.number("rope_theta", 1.0, 1e12),
            rms_norm_eps=file.number("norm_eps", 1e-12, 1e-1),
            tie_word_embeddings=file.boolean("tied_embeddings", default=False),
            max_position_embeddings=_optional_positions(file, length_names[0]) if length_names else None,
            source_dtype=None,
        ),
    )


def _checked(file: JsonObject, config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads != 0:
        raise ConfigError(
            f"{file.path}: the number of query heads must be a multiple of the number of KV heads, "
            f"found {config.num_heads} and {config.num_kv_heads}"
        )
    for name, value in (
        ("hidden size", config.hidden_size),
        ("head_dim", config.head_dim),
        ("FFN size", config.ffn_size),
    ):
        if value % SIZE_MULTIPLE != 0:
            raise ConfigError(f"{file.path}: {name} must be a multiple of {SIZE_MULTIPLE}, found {value}")
    return config


def _refuse_features(file: JsonObject, names: tuple[str, ...]) -> None:
    for name in names:
        value = file.values.get(name)
        if value is not None and value is not False:
            raise file.error(name, "must be null or absent, because this project does not serve it", value)


def _rope_theta(file: JsonObject) -> float:
    """Theta from `rope_parameters` (transformers 5) or `rope_theta` (before); any scaling is refused by its name."""
    thetas = [file.number("rope_theta", 1.0, 1e12)] if file.has("rope_theta") else []
    for name in ("rope_parameters", "rope_scaling"):
        section = file.child(name)
        if section is None:
            continue
        kind = section.values.get("rope_type", section.values.get("type", "default"))
        if kind != "default":
            raise file.error(f"{name}.rope_type", "must be 'default'", kind)
        if section.values.get("partial_rotary_factor", 1.0) != 1.0:
            raise file.error(f"{name}.partial_rotary_factor", "must be 1", section.values["partial_rotary_factor"])
        if section.has("rope_theta"):
            thetas.append(section.number("rope_theta", 1.0, 1e12))
    if not thetas:
        raise ConfigError(f"{file.path}: rope_theta (or rope_parameters.rope_theta) is missing; it is never guessed")
    if len(set(thetas)) > 1:
        raise file.error("rope_theta", "must agree with rope_parameters.rope_theta", thetas)
    return thetas[0]


def _source_dtype(file: JsonObject) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (before). The tensors themselves decide; this is for the log."""
    value = file.values.get("dtype", file.values.get("torch_dtype"))
    if value is None:
        return None
    if value not in _DTYPES:
        raise file.error("dtype", f"must be one of {', '.join(_DTYPES)}", value)
    return str(value)


def _optional_positions(file: JsonObject, name: str) -> int | None:
    return file.integer(name, 1, 2**31 - 1) if file.has(name) else None
