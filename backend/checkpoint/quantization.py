"""How the linear layers of a checkpoint are quantised: what `config.json` or `hf_quant_config.json` says, checked.

    quant_method                     weights               activations            scales of a linear layer
    fp8                              per tensor            static or dynamic      weight_scale, input_scale (static)
    fp8 with weight_block_size       blocks of 128 x 128   dynamic                weight_scale_inv
    compressed-tensors               tensor or channel     static or dynamic      weight_scale, input_scale (static)
    modelopt (hf_quant_config.json)  per tensor            static                 weight_scale, input_scale

All values are e4m3, and real value = stored value * scale. Every other scheme is refused by its name. Sources: the files that
AutoFP8, llm-compressor (github.com/vllm-project/compressed-tensors) and TensorRT Model Optimizer write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from backend.checkpoint.json_object import JsonObject
from backend.errors import one_line

WeightScales = Literal["tensor", "channel", "block"]
BLOCK_SIZE = 128
"""Rows and columns of a block of values that share one scale."""
_SERVED = "served are FP8 (e4m3) as fp8, compressed-tensors float-quantized and modelopt write it"


@dataclass(frozen=True, slots=True)
class Quantization:
    """One scheme for all linear layers but `ignored`: names of modules, or regular expressions after `re:`.

    With `has_static_activations` each layer brings the scale its inputs are quantised with; otherwise every row of them
    gets its own while running. With `has_kv_scales` each layer brings scales for FP8 KV pages.
    """

    name: str
    weight_scales: WeightScales
    has_static_activations: bool
    has_kv_scales: bool
    ignored: tuple[str, ...]

    @property
    def weight_scale_name(self) -> str:
        """What the scale of `<module>.weight` is called."""
        return "weight_scale_inv" if self.weight_scales == "block" else "weight_scale"

    def quantises(self, module: str) -> bool:
        """Whether the values of linear layer `module` are FP8.

        >>> scheme = Quantization("fp8", "tensor", False, False, ("lm_head", r"re:.*layers\\.3\\.mlp.*"))
        >>> [scheme.quantises(name) for name in ("lm_head", "model.layers.3.mlp.up_proj", "model.layers.4.mlp.up_proj")]
        [False, False, True]
        """
        return not any(
            matches(pattern[3:], module) if pattern.startswith("re:") else _is_or_holds(pattern, module)
            for pattern in self.ignored
        )


def read_quantization(config: JsonObject) -> Quantization | None:
    """The scheme of a Hugging Face folder, None when it is not quantised; ConfigError names a scheme that is not served."""
    separate_path = config.path.with_name("hf_quant_config.json")
    section = config.child("quantization_config")
    if section is None and separate_path.is_file():
        separate = JsonObject.read(separate_path)
        section = separate.child("quantization")
        if section is None:
            raise separate.error("quantization", "must be an object", None)
        return _modelopt(section)
    if section is None:
        return None
    method = section.values.get("quant_method")
    if method == "fp8":
        return _fp8(section)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    if method == "modelopt":
        return _modelopt(section)
    raise section.error("quantization_config.quant_method", f"is not served ({_SERVED})", method)


def _fp8(section: JsonObject) -> Quantization:
    is_static = _one_of(section, "activation_scheme", ("static", "dynamic"), "dynamic") == "static"
    _one_of(section, "fmt", ("e4m3",), "e4m3")
    block = section.values.get("weight_block_size")
    if block not in (None, [BLOCK_SIZE, BLOCK_SIZE]):
        raise section.error("weight_block_size", f"must be [{BLOCK_SIZE}, {BLOCK_SIZE}]", block)
    if block and is_static:
        raise section.error("activation_scheme", "must be 'dynamic' with weight_block_size", "static")
    has_kv = _one_of(section, "kv_cache_scheme", ("static",), None) == "static"
    ignored = section.values.get("ignored_layers", section.values.get("modules_to_not_convert"))
    return Quantization(
        "fp8", "block" if block else "tensor", is_static, has_kv, _names(section, "ignored_layers", ignored)
    )


def _compressed_tensors(section: JsonObject) -> Quantization:
    _one_of(section, "format", ("float-quantized", "naive-quantized"), None, is_required=True)
    groups = section.child("config_groups")
    if groups is None or len(groups.values) != 1:
        raise section.error(
            "config_groups", "must hold exactly one group", None if groups is None else list(groups.values)
        )
    (group_name,) = groups.values
    group = groups.child(group_name)
    assert group is not None or groups.values[group_name] is None
    if group is None or group.values.get("targets") != ["Linear"]:
        raise section.error(
            f"config_groups.{group_name}.targets", "must be ['Linear']", group and group.values.get("targets")
        )
    for name in ("sparsity_config", "transform_config"):
        if section.values.get(name):
            raise section.error(name, "must be empty, because this project does not serve it", section.values[name])
    weights, inputs = group.child("weights"), group.child("input_activations")
    if weights is None or inputs is None:
        missing = "weights" if weights is None else "input_activations"
        raise group.error(missing, "must be given: layers that quantise only one side are not served", None)
    _check_number_format(weights)
    _check_number_format(inputs)
    scales: WeightScales = _one_of(weights, "strategy", ("tensor", "channel"), None, is_required=True)
    is_dynamic = inputs.boolean("dynamic", default=False)
    _one_of(inputs, "strategy", ("token", "tensor") if is_dynamic else ("tensor",), None, is_required=True)
    kv = section.child("kv_cache_scheme")
    if kv is not None:
        _check_number_format(kv)
        _one_of(kv, "strategy", ("tensor",), "tensor")
        if kv.boolean("dynamic", default=False):
            raise kv.error("kv_cache_scheme.dynamic", "must be false", True)
    ignored = _names(section, "ignore", section.values.get("ignore"))
    return Quantization("compressed-tensors", scales, not is_dynamic, kv is not None, ignored)


def _modelopt(section: JsonObject) -> Quantization:
    _one_of(section, "quant_algo", ("FP8",), None, is_required=True)
    kv = section.values.get("kv_cache_quant_algo")
    if isinstance(section.values.get("kv_cache_scheme"), dict):  # how newer files in config.json say it
        kv_scheme = section.child("kv_cache_scheme")
        assert kv_scheme is not None
        _check_number_format(kv_scheme)
        kv = "FP8"
    if kv not in (None, "FP8"):
        raise section.error("kv_cache_quant_algo", "must be null or 'FP8'", kv)
    name = "exclude_modules" if "exclude_modules" in section.values else "ignore"
    ignored = tuple(_glob(pattern) for pattern in _names(section, name, section.values.get(name)))
    return Quantization("modelopt", "tensor", True, kv == "FP8", ignored)


def _check_number_format(arguments: JsonObject) -> None:
    _one_of(arguments, "type", ("float",), None, is_required=True)
    if arguments.values.get("num_bits") != 8:
        raise arguments.error("num_bits", "must be 8", arguments.values.get("num_bits"))
    if not arguments.boolean("symmetric", default=True):
        raise arguments.error("symmetric", "must be true", False)


def _one_of(
    section: JsonObject, name: str, allowed: tuple[str, ...], default: Any, *, is_required: bool = False
) -> Any:
    value = section.values.get(name)
    if value is None and not is_required:
        return default
    if value not in allowed:
        raise section.error(name, f"must be one of {', '.join(allowed)} ({_SERVED})", value)
    return value


def _names(section: JsonObject, name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise section.error(name, "must be a list of names of modules", value)
    for item in value:
        if item.startswith("re:"):
            try:
                matches(item[3:], "")
            except ValueError as error:
                reason = one_line(str(error).splitlines()[-1])
                raise section.error(name, f"must hold regular expressions after re: ({reason})", item) from error
    return tuple(value)


def matches(pattern: str, text: str) -> bool:
    """Whether `text` begins with a match of a checkpoint's regular expression; ValueError when it is none.

    By Rust's engine, which pydantic brings: it takes no longer than the text is long, where Python's takes for ever on some
    expressions. It knows no look-around and no back-references.
    """
    return _matcher(pattern)(text)


@lru_cache
def _matcher(pattern: str) -> Callable[[str], bool]:
    from pydantic import StringConstraints, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(Annotated[str, StringConstraints(pattern=f"^(?:{pattern})")])
    except Exception as error:  # pydantic does not export what it raises here
        raise ValueError(str(error)) from error

    def is_match(text: str) -> bool:
        try:
            adapter.validate_python(text)
        except ValidationError:
            return False
        return True

    return is_match


def _is_or_holds(name: str, module: str) -> bool:
    return module == name or module.startswith(name + ".")


def _glob(pattern: str) -> str:
    """ModelOpt's wildcard patterns as regular expressions.

    >>> _glob("lm_head"), _glob("model.layers.3*")
    ('lm_head', 're:model\\\\.layers\\\\.3.*$')
    """
    return "re:" + re.escape(pattern).replace(r"\*", ".*") + "$" if "*" in pattern else pattern
