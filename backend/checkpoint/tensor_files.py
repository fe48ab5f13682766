"""The safetensors files of a checkpoint: which there are, which tensor lies in which, and whether all is as it must be.

Only headers are read here. safetensors executes nothing, unlike pickled files, which this project never opens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from backend.checkpoint.json_object import JsonObject, refuse_lfs_pointer
from backend.checkpoint.layouts import TensorSpec
from backend.checkpoint.model_config import Layout
from backend.errors import ConfigError, shown

_DENSE_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_FP8_DTYPE_BYTES = {"F8_E4M3": 1}
"""safetensors' names of the dtypes that are read, and bytes per element."""
_STEMS: dict[Layout, str] = {"huggingface": "model", "mistral": "consolidated"}
_SHARD_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_REMEDY = "download the checkpoint again"


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU; ConfigError for a missing, truncated or foreign file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing, though the checkpoint refers to it; {_REMEDY}")
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a complete safetensors file ({error}); {_REMEDY}") from error


def find_tensors(folder: Path, layout: Layout) -> dict[str, Path]:
    """The file of every tensor, by tensor name, from one file, from the index, or from all numbered shards.

    ConfigError when the index and the files disagree, a shard is missing, or two files hold the same tensor.
    """
    stem = _STEMS[layout]
    single, index_path = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if index_path.is_file():
        return _from_index(folder, index_path)
    shards = sorted(folder.glob(f"{stem}*.safetensors"))
    _check_numbering(folder, shards)
    found: dict[str, Path] = {}
    for shard in shards:
        for name in _names(shard):
            if name in found:
                raise ConfigError(
                    f"tensor {shown(name)} lies in both {found[name]} and {shard}; remove the file that is too many"
                )
            found[name] = shard
    return found


def check_tensors(files: Mapping[str, Path], specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of all source tensors, after checking that exactly those of `specs` are there, in shape and dtype."""
    _check_names(files, specs)
    num_bytes = 0
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            for name in sorted(name for name, its_path in files.items() if its_path == path):
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                _check_tensor(path, specs[name], shape, dtype)
                num_bytes += math.prod(shape) * (_DENSE_DTYPE_BYTES | _FP8_DTYPE_BYTES)[dtype]
    return num_bytes


def _check_tensor(path: Path, spec: TensorSpec, shape: tuple[int, ...], dtype: str) -> None:
    if shape not in (spec.shape, *spec.other_shapes):
        expected = " or ".join(str(list(its_shape)) for its_shape in (spec.shape, *spec.other_shapes))
        raise ConfigError(
            f"{path}: tensor {spec.name} must have shape {expected} by the folder's configuration, "
            f"found {list(shape)}; configuration and weights are not of the same model"
        )
    known = _FP8_DTYPE_BYTES if spec.scale_name else _DENSE_DTYPE_BYTES
    if dtype not in known:
        remedy = (
            "the configuration says that it is quantised"
            if spec.scale_name
            else "use a checkpoint of a kind that is served"
        )
        raise ConfigError(f"{path}: tensor {spec.name} must be one of {', '.join(known)}, found {dtype}; {remedy}")


def _names(path: Path) -> list[str]:
    with open_tensors(path) as file:
        return list(file.keys())


def _from_index(folder: Path, index_path: Path) -> dict[str, Path]:
    index = JsonObject.read(index_path).child("weight_map")
    if index is None or not index.values:
        raise ConfigError(f"{index_path}: weight_map is missing or empty; {_REMEDY}")
    files: dict[str, Path] = {}
    for name, file_name in index.values.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise index.error(f"weight_map[{shown(name)}]", "must be the name of a file in the same folder", file_name)
        files[name] = folder / file_name
    for path in sorted(set(files.values())):
        present = set(_names(path))
        listed = {name for name, its_path in files.items() if its_path == path}
        if absent := sorted(listed - present):
            raise ConfigError(
                f"{path}: tensor {shown(absent[0])} is missing, though {index_path.name} says it is there; {_REMEDY}"
            )
        if unlisted := sorted(present - listed):
            raise ConfigError(f"{path}: tensor {shown(unlisted[0])} is not listed in {index_path.name}; {_REMEDY}")
    return files


def _check_numbering(folder: Path, shards: list[Path]) -> None:
    matches = [_SHARD_NUMBER.search(shard.name) for shard in shards]
    numbers = sorted(int(match[1]) for match in matches if match)
    totals = {int(match[2]) for match in matches if match}
    if len(numbers) != len(shards) or len(totals) != 1 or numbers != list(range(1, max(totals) + 1)):
        raise ConfigError(
            f"{folder}: without an index the shards must be numbered 00001 to the total in their names, "
            f"found {shown([shard.name for shard in shards])}; {_REMEDY}"
        )


def _check_names(files: Mapping[str, Path], specs: Mapping[str, TensorSpec]) -> None:
    if missing := sorted(specs.keys() - files.keys()):
        raise ConfigError(
            f"{next(iter(files.values())).parent if files else 'checkpoint'}: {len(missing)} tensors are missing, "
            f"the first is {missing[0]}; {_REMEDY}, or correct the number of layers in its configuration"
        )
    if extra := sorted(files.keys() - specs.keys()):
        raise ConfigError(
            f"{files[extra[0]]}: {len(extra)} tensors are not part of this model, the first is {shown(extra[0])}; "
            "adapters, biases and other architectures are not served"
        )
