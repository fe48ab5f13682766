"""A random checkpoint of Mistral NeMo's shape in the format of compressed-tensors' FP8, so that the real server can serve it.

13.6 GB at full size, made on the GPU if there is one and written file by file. Tekken's vocabulary is that of mistral-common
where that is installed, otherwise made up: prompts are ids, and nobody reads the answers.
"""

from __future__ import annotations

import base64
import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from backend.checkpoint.layouts import TensorSpec, tensor_specs
from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.tokenizer_json import TEKKEN_PATTERN
from tests.bench.gpu.models import fill_normal
from tests.checkpoints import NUM_SPECIAL_TOKENS, TinyConfig, config_json, write_json, write_tekken
from tests.quantised_checkpoints import SCHEMES

_FP8_SIZE = 64.0
"""Standard deviation of the e4m3 values, whose largest is 448."""
_LAYERS_A_FILE = 4


def write_config(folder: Path, config: ModelConfig, *, is_fp8: bool = True) -> None:
    """Only config.json: of the FP8 checkpoint, or of the same model in BF16, for peers that quantise weights themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TinyConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn_size=config.ffn_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=131072,
    )
    quantization = {"quantization_config": SCHEMES["compressed-tensors dynamic"].config} if is_fp8 else {}
    write_json(folder / "config.json", config_json(sizes, torch.bfloat16) | quantization)


def write_checkpoint(folder: Path, config: ModelConfig, device: torch.device) -> Path:
    """All of it: e4m3 linear layers with a scale a row, embedding and head in BF16; returns `folder`."""
    write_config(folder, config)
    (folder / "model.safetensors").touch()  # so that it is a checkpoint, whose tensors can be asked for
    specs = tensor_specs(read_model_config(folder))
    (folder / "model.safetensors").unlink()
    columns = {spec.name: spec.shape[-1] for spec in specs.values()}
    columns |= {spec.scale_name: spec.shape[1] for spec in specs.values() if spec.scale_name}
    files: dict[int, list[TensorSpec]] = defaultdict(list)
    for spec in specs.values():
        files[spec.layer // _LAYERS_A_FILE].append(spec)
    generator = torch.Generator(device=device).manual_seed(0)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, of_file in enumerate(files.values(), start=1):
        tensors = {spec.name: _random(spec, columns[spec.name], device, generator).cpu() for spec in of_file}
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    if importlib.util.find_spec("mistral_common") is not None:
        write_tekken(folder / "tekken.json", config.vocab_size)
    else:
        write_made_up_tekken(folder / "tekken.json", config.vocab_size)
    return folder


def write_made_up_tekken(path: Path, vocab_size: int) -> None:
    """A vocabulary of single bytes, then of pairs, then of triples."""
    num_ranks = vocab_size - NUM_SPECIAL_TOKENS
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in zip(range(num_ranks), _byte_strings(), strict=False)
    ]
    config = {
        "pattern": TEKKEN_PATTERN,
        "num_vocab_tokens": num_ranks,
        "default_vocab_size": vocab_size,
        "default_num_special_tokens": NUM_SPECIAL_TOKENS,
        "version": "v3",
    }
    write_json(path, {"config": config, "vocab": vocab})


def _byte_strings() -> Iterable[bytes]:
    for length in (1, 2, 3):
        yield from map(bytes, product(range(256), repeat=length))


def _random(spec: TensorSpec, columns: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Values that keep activations near one through the layers; never zeros, which a GPU multiplies faster.

    `columns`: inputs of the matrix whose values or scales these are.
    """
    if spec.kind == "weight_scale":
        scales = torch.empty(spec.shape, device=device).uniform_(0.5, 1.5, generator=generator)
        return scales.mul_(columns**-0.5 / _FP8_SIZE)
    if len(spec.shape) == 1:
        return torch.empty(spec.shape, device=device).uniform_(0.5, 1.5, generator=generator).bfloat16()
    is_fp8 = bool(spec.scale_name)
    tensor = torch.empty(spec.shape, device=device, dtype=torch.float8_e4m3fn if is_fp8 else torch.bfloat16)
    size = 1.0 if spec.target == "embedding" else columns**-0.5
    fill_normal(tensor, generator, _FP8_SIZE if is_fp8 else size)
    return tensor
