"""The safetensors files of a checkpoint: which there are, which tensor lies in which, and whether all is as it must be.

Only headers are read here. safetensors executes nothing, unlike pickled files, which this project never opens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from backend.checkpoint.json_object import JsonObject, refuse_lfs_pointer
from backend.checkpoint.layouts import TensorSpec
from backend.checkpoint.model_config import Layout
from backend.errors import ConfigError, one_line, shown

_DENSE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn}
"""The dtypes that are read, by safetensors' names."""
_STEMS: dict[Layout, str] = {"huggingface": "model", "mistral": "consolidated"}
_FILE_NAME = re.compile(r"[\w .+=@-]{1,200}\.safetensors")
_SHARD_NUMBER = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
REMEDY = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its values begin `offset` bytes into it, row by row."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU; ConfigError for a missing, truncated or foreign file."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path} is missing, though the checkpoint refers to it; {REMEDY}")
        refuse_lfs_pointer(path)
    except OSError as error:  # a name that is too long, a file that may not be read
        raise ConfigError(f"{shown(str(path))} cannot be read: {error.strerror}; {REMEDY}") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a complete safetensors file ({one_line(str(error))}); {REMEDY}") from error


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


def check_tensors(files: Mapping[str, Path], specs: Mapping[str, TensorSpec]) -> list[StoredTensor]:
    """All source tensors in the order of the files; exactly those of `specs` must be there, in shape and dtype."""
    _check_names(files, specs)
    return [
        _check_tensor(path, name, entry, specs[name])
        for path in sorted(set(files.values()))
        for name, entry in sorted(_entries(path).items(), key=lambda item: item[1]["data_offsets"][0])
    ]


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """A file's header: dtype, shape and data_offsets (in the file) of each tensor; safetensors has found it sound before.

    8 bytes of length, a JSON object, the values (source: the format's description, huggingface.co/docs/safetensors).
    """
    with open_tensors(path), path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return {
        name: entry | {"data_offsets": [8 + header_bytes + offset for offset in entry["data_offsets"]]}
        for name, entry in header.items()
    }


def _check_tensor(path: Path, name: str, entry: Mapping[str, Any], spec: TensorSpec) -> StoredTensor:
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if shape not in (spec.shape, *spec.other_shapes):
        expected = " or ".join(str(list(its_shape)) for its_shape in (spec.shape, *spec.other_shapes))
        raise ConfigError(
            f"{path}: tensor {spec.name} must have shape {expected} by the folder's configuration, "
            f"found {list(shape)}; configuration and weights are not of the same model"
        )
    known = _FP8_DTYPES if spec.scale_name else _DENSE_DTYPES
    if dtype not in known:
        remedy = (
            "the configuration says that it is quantised"
            if spec.scale_name
            else "use a checkpoint of a kind that is served"
        )
        raise ConfigError(f"{path}: tensor {spec.name} must be one of {', '.join(known)}, found {dtype}; {remedy}")
    return StoredTensor(name, path, entry["data_offsets"][0], shape, known[dtype])


def _names(path: Path) -> list[str]:
    with open_tensors(path) as file:
        return list(file.keys())


def _from_index(folder: Path, index_path: Path) -> dict[str, Path]:
    index = JsonObject.read(index_path).child("weight_map")
    if index is None or not index.values:
        raise ConfigError(f"{index_path}: weight_map is missing or empty; {REMEDY}")
    files: dict[str, Path] = {}
    for name, file_name in index.values.items():
        if not isinstance(file_name, str) or not _FILE_NAME.fullmatch(file_name):
            raise index.error(
                f"weight_map[{shown(name)}]", "must be the name of a .safetensors file in the same folder", file_name
            )
        files[name] = folder / file_name
    for path in sorted(set(files.values())):
        present = set(_names(path))
        listed = {name for name, its_path in files.items() if its_path == path}
        if absent := sorted(listed - present):
            raise ConfigError(
                f"{path}: tensor {shown(absent[0])} is missing, though {index_path.name} says it is there; {REMEDY}"
            )
        if unlisted := sorted(present - listed):
            raise ConfigError(f"{path}: tensor {shown(unlisted[0])} is not listed in {index_path.name}; {REMEDY}")
    return files


def _check_numbering(folder: Path, shards: list[Path]) -> None:
    matches = [_SHARD_NUMBER.search(shard.name) for shard in shards]
    numbers = sorted(int(match[1]) for match in matches if match)
    totals = {int(match[2]) for match in matches if match}
    if len(numbers) != len(shards) or len(totals) != 1 or numbers != list(range(1, max(totals) + 1)):
        raise ConfigError(
            f"{folder}: without an index the shards must be numbered 00001 to the total in their names, "
            f"found {shown([shard.name for shard in shards])}; {REMEDY}"
        )


def _check_names(files: Mapping[str, Path], specs: Mapping[str, TensorSpec]) -> None:
    if missing := sorted(specs.keys() - files.keys()):
        raise ConfigError(
            f"{next(iter(files.values())).parent if files else 'checkpoint'}: {len(missing)} tensors are missing, "
            f"the first is {missing[0]}; {REMEDY}, or correct the number of layers in its configuration"
        )
    if extra := sorted(files.keys() - specs.keys()):
        raise ConfigError(
            f"{files[extra[0]]}: {len(extra)} tensors are not part of this model, the first is {shown(extra[0])}; "
            "adapters, biases and other architectures are not served"
        )
