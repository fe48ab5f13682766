"""FP8 copies of a small checkpoint, with the fields and names that the tools which make such checkpoints write."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from tests.checkpoints import write_json, write_shards

Tensors = dict[str, torch.Tensor]
_E4M3_MAX = 448.0
_BLOCK = 128


@dataclass(frozen=True)
class Scheme:
    """One kind of FP8 checkpoint: what its configuration says, and how its scales are laid out and named."""

    config: dict[str, Any]
    weight_scales: Literal["tensor", "channel", "block"] = "tensor"
    scalar_shape: tuple[int, ...] = ()
    has_input_scales: bool = False
    kv_scale_names: tuple[str, ...] = ()
    is_in_own_file: bool = False

    @property
    def scale_name(self) -> str:
        return "weight_scale_inv" if self.weight_scales == "block" else "weight_scale"


def _fp8(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "ignored_layers": ["lm_head"]} | fields


def _compressed(weights: str, inputs: dict[str, Any], kv: dict[str, Any] | None = None) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "input_activations": number | {"observer": None, "actorder": None, "block_structure": None} | inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": number | {"dynamic": False, "strategy": weights, "observer": "minmax"},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": 1.24,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None if kv is None else number | kv,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _modelopt(kv: str | None) -> dict[str, Any]:
    producer = {"name": "modelopt", "version": "0.19.0"}
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": kv, "exclude_modules": ["lm_head"]}
    return {"producer": producer, "quantization": quantization}


SCHEMES = {
    "fp8 static": Scheme(_fp8(activation_scheme="static"), has_input_scales=True, scalar_shape=(1,)),
    "fp8 static, kv_scale": Scheme(
        _fp8(activation_scheme="static", kv_cache_scheme="static"),
        has_input_scales=True,
        kv_scale_names=("kv_scale",),
    ),
    "fp8 static, k_scale": Scheme(
        _fp8(activation_scheme="static", kv_cache_scheme="static"),
        has_input_scales=True,
        kv_scale_names=("k_scale", "v_scale"),
    ),
    "fp8 dynamic": Scheme(_fp8(activation_scheme="dynamic")),
    "fp8 block": Scheme(
        _fp8(activation_scheme="dynamic", weight_block_size=[128, 128], fmt="e4m3"), weight_scales="block"
    ),
    "compressed-tensors dynamic": Scheme(
        _compressed("channel", {"dynamic": True, "strategy": "token"}), weight_scales="channel"
    ),
    "compressed-tensors static": Scheme(
        _compressed("tensor", {"dynamic": False, "strategy": "tensor"}), has_input_scales=True, scalar_shape=(1,)
    ),
    "compressed-tensors, KV": Scheme(
        _compressed("channel", {"dynamic": True, "strategy": "token"}, {"dynamic": False, "strategy": "tensor"}),
        weight_scales="channel",
        kv_scale_names=("k_proj.output_scale", "v_proj.output_scale"),
    ),
    "modelopt": Scheme(_modelopt(None), has_input_scales=True, is_in_own_file=True),
    "modelopt, KV": Scheme(
        _modelopt("FP8"),
        has_input_scales=True,
        kv_scale_names=("k_proj.k_scale", "v_proj.v_scale"),
        is_in_own_file=True,
    ),
}


def quantise_checkpoint(source: Path, folder: Path, scheme: Scheme, *, num_shards: int = 1) -> Tensors:
    """Write an FP8 copy of a Hugging Face folder; returns the real values of its tensors, under the source's names."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    real, written = quantise(load_file(source / "model.safetensors"), scheme)
    write_shards(folder, "model", written, num_shards)
    if scheme.is_in_own_file:
        write_json(folder / "hf_quant_config.json", scheme.config)
    else:
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"quantization_config": scheme.config})
    return real


def quantise(tensors: Tensors, scheme: Scheme) -> tuple[Tensors, Tensors]:
    """Real values, and what is written: e4m3 values and scales of all linear layers but the head.

    Input scales are wide enough for activations of magnitude 16 at most; scales of K and V differ from each other and by layer.
    """
    real, written = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if not name.endswith("_proj.weight"):
            continue
        assert last == "weight"
        scales, shape = _scales(tensor.float(), scheme)
        values = (tensor.float() / scales).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        real[name], written[name] = values.float() * scales, values
        written[f"{module}.{scheme.scale_name}"] = shape
        if scheme.has_input_scales:
            part = 0.9 if "k_proj" in module or "up_proj" in module else 1.0
            written[f"{module}.input_scale"] = torch.full(scheme.scalar_shape, part * 16.0 / _E4M3_MAX)
    for layer in range(num_layers(tensors)):
        for index, scale_name in enumerate(scheme.kv_scale_names):
            written[f"model.layers.{layer}.self_attn.{scale_name}"] = torch.tensor(0.02 + 0.01 * index + 0.001 * layer)
    return real, written


def num_layers(tensors: Tensors) -> int:
    return sum(name.endswith("q_proj.weight") for name in tensors)


def _scales(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales broadcast to the weight's shape, and as they are written."""
    rows, columns = weight.shape
    if scheme.weight_scales == "tensor":
        scale = weight.abs().max() / _E4M3_MAX
        return scale.expand(rows, columns), scale.reshape(scheme.scalar_shape).clone()
    if scheme.weight_scales == "channel":
        scales = weight.abs().amax(dim=1, keepdim=True) / _E4M3_MAX
        return scales.expand(rows, columns), scales
    padded = torch.zeros(-(-rows // _BLOCK) * _BLOCK, -(-columns // _BLOCK) * _BLOCK)
    padded[:rows, :columns] = weight.abs()
    blocks = padded.view(len(padded) // _BLOCK, _BLOCK, -1, _BLOCK).amax(dim=(1, 3)) / _E4M3_MAX
    whole = blocks.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    return whole[:rows, :columns], blocks
