from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from backend.checkpoint.json_object import JsonObject
from backend.checkpoint.quantization import Quantization, read_quantization
from backend.errors import ConfigError
from tests.checkpoints import write_json
from tests.quantised_checkpoints import SCHEMES

COMPRESSED = SCHEMES["compressed-tensors, KV"].config


def read(folder: Path, scheme: Any, own_file: Any = None) -> Quantization | None:
    write_json(folder / "config.json", {} if scheme is None else {"quantization_config": scheme})
    if own_file is not None:
        write_json(folder / "hf_quant_config.json", own_file)
    return read_quantization(JsonObject.read(folder / "config.json"))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_kind(tmp_path: Path, name: str) -> None:
    scheme = SCHEMES[name]
    found = read(tmp_path, None, scheme.config) if scheme.is_in_own_file else read(tmp_path, scheme.config)
    assert found is not None
    assert found.name == name.split()[0].rstrip(",")
    assert found.weight_scales == scheme.weight_scales
    assert found.weight_scale_name == scheme.scale_name
    assert found.has_static_activations == scheme.has_input_scales
    assert found.has_kv_scales == bool(scheme.kv_scale_names)
    assert found.ignored == ("lm_head",)


def test_modelopt_in_config_json(tmp_path: Path) -> None:
    """As newer versions of the tool write it, with wildcards."""
    number = {"type": "float", "num_bits": 8, "dynamic": False}
    found = read(
        tmp_path,
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_scheme": number,
            "ignore": ["lm_head", "model.layers.1*"],
        },
    )
    assert found is not None
    assert found.has_kv_scales
    assert not found.quantises("model.layers.1.mlp.up_proj")
    assert not found.quantises("model.layers.17.mlp.up_proj")
    assert not found.quantises("lm_head")
    assert found.quantises("model.layers.2.mlp.up_proj")


def test_none(tmp_path: Path) -> None:
    assert read(tmp_path, None) is None


def changed(scheme: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    result = copy.deepcopy(scheme)
    owner = result
    for name in path[:-1]:
        owner = owner[name]
    owner[path[-1]] = to
    return result


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config.quant_method is not served .* found 'gptq'"),
        ({}, "quantization_config.quant_method is not served .* found None"),
        (7, "quantization_config must be an object, found 7"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme must be one of static, dynamic .*'none'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be one of e4m3 .* found 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size must be \[128, 128\], found \[64, 64\]"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
            "activation_scheme must be 'dynamic' with weight_block_size",
        ),
        ({"quant_method": "fp8", "kv_cache_scheme": "int8"}, "kv_cache_scheme must be one of static .* found 'int8'"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers must be a list of names of modules"),
        ({"quant_method": "fp8", "ignored_layers": ["re:("]}, "ignored_layers must hold regular expressions after re:"),
        ({"quant_method": "fp8", "ignored_layers": ["re:(?!a)"]}, r"after re: \(error: look-around.* is not supported\)"),
        ({"quant_method": "fp8", "ignored_layers": ["re:" + "(" * 5000]}, "after re: .*, found .*characters"),
        ({"quant_method": "fp8", "ignored_layers": ["re:a{999999999999}"]}, "after re: .*decimal literal invalid"),
        (changed(COMPRESSED, "format", to="pack-quantized"), "format must be one of float-quantized.*'pack-quantized'"),
        (changed(COMPRESSED, "config_groups", to={}), r"config_groups must hold exactly one group, found \[\]"),
        (changed(COMPRESSED, *GROUP, to=None), "config_groups.group_0.targets must be"),
        (changed(COMPRESSED, *GROUP, "targets", to=["re:.*mlp.*"]), r"group_0.targets must be \['Linear'\]"),
        (changed(COMPRESSED, *GROUP, "input_activations", to=None), "input_activations must be given"),
        (changed(COMPRESSED, *GROUP, "weights", "num_bits", to=4), "num_bits must be 8, found 4"),
        (changed(COMPRESSED, *GROUP, "weights", "type", to="int"), "type must be one of float .* found 'int'"),
        (changed(COMPRESSED, *GROUP, "weights", "strategy", to="group"), "strategy must be one of tensor, channel .*'group'"),
        (changed(COMPRESSED, *GROUP, "input_activations", "strategy", to="group"), "strategy must be one of token, tensor"),
        (changed(COMPRESSED, *GROUP, "input_activations", "symmetric", to=False), "symmetric must be true, found False"),
        (changed(COMPRESSED, "kv_cache_scheme", "dynamic", to=True), "kv_cache_scheme.dynamic must be false"),
        (changed(COMPRESSED, "sparsity_config", to={"format": "dense"}), "sparsity_config must be empty"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo must be one of FP8 .* found 'NVFP4'"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"},
            "kv_cache_quant_algo must be null or 'FP8', found 'INT8'",
        ),
    ],
)  # fmt: skip
def test_schemes_that_are_not_served(tmp_path: Path, scheme: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        read(tmp_path, scheme)


def test_an_own_file_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: quantization must be an object, found None"):
        read(tmp_path, None, {"producer": {}})
    assert json.loads((tmp_path / "config.json").read_text()) == {}


def test_an_expression_that_backtracks_for_ever_elsewhere_is_matched_at_once() -> None:
    scheme = Quantization("fp8", "tensor", False, False, ("re:(.+)+ x", "re:" + ".*" * 60 + "x"))
    assert scheme.quantises("model.layers.39.self_attn.o_proj.and.so.on.and.on")
