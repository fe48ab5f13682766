"""Streams a checkpoint into the engine's weights, one tensor at a time, quantising or dequantising on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from backend.checkpoint import fp8
from backend.checkpoint.layouts import TensorSpec, tensor_specs
from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.quantization import BLOCK_SIZE
from backend.checkpoint.tensor_files import check_tensors, find_tensors, open_tensors
from backend.checkpoint.weights import Weights, allocate_weights
from backend.errors import ConfigError

Progress = Callable[[int, int], None]
"""Called with (bytes_done, bytes_total) of the source files after each tensor."""
_PIECE_ELEMENTS = 2**23
"""Elements that are converted at once, in FP32: the loader's memory above source and target."""


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    weight_format: WeightFormat,
    progress: Progress | None = None,
) -> Weights:
    """Check every file and header first, then copy tensor by tensor to `device`, converting to `weight_format`.

    Host memory holds at most one source tensor (mapped from the file), all scales, and a piece under conversion above
    the final copy. Dense values become FP8 with one scale for each row. FP8 values stay as they are, but those with block
    scales get one for each row, which rounds them once more. ConfigError names file, tensor, what is expected and found.
    """
    files = find_tensors(folder, config.layout)
    specs = tensor_specs(config, files)
    bytes_total = check_tensors(files, specs)
    weights = allocate_weights(config, device, weight_format)
    scales = _read_scales(files, specs)
    _place_scales(scales, specs, weights)
    bytes_done = 0
    for path, names in _by_file(files):
        with open_tensors(path) as file:
            for name in names:
                source, spec = file.get_tensor(name), specs[name]
                if spec.kind == "values":
                    _place_values(source, spec, scales.get(spec.scale_name), weights)
                bytes_done += source.numel() * source.itemsize
                del source  # before the next one is read
                if progress is not None:
                    progress(bytes_done, bytes_total)
    if weights.head.scales is not None and config.tie_word_embeddings:
        _convert(weights.embedding, None, weights.head, 0)
    return weights


def _by_file(files: Mapping[str, Path]) -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(set(files.values())):
        yield path, sorted(name for name, its_path in files.items() if its_path == path)


def _read_scales(files: Mapping[str, Path], specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """All scales, in FP32: they may lie in other shards than their values."""
    scales: dict[str, torch.Tensor] = {}
    for path, names in _by_file({name: path for name, path in files.items() if specs[name].kind != "values"}):
        with open_tensors(path) as file:
            for name in names:
                scale = file.get_tensor(name).float()
                if not bool(((scale > 0) & scale.isfinite()).all()):
                    bad = scale[~((scale > 0) & scale.isfinite())][0].item()
                    raise ConfigError(f"{path}: scale {name} must be positive and finite, found {bad}")
                scales[name] = _shaped(scale, specs[name])
    return scales


def _shaped(scale: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A weight's scales as [rows], or as they are when there is one a block; any other scale as [1]."""
    if spec.kind == "weight_scale" and not spec.is_block_scale:
        return scale.flatten().expand(spec.num_rows)
    return scale if spec.is_block_scale else scale.reshape(1)


def _place_scales(scales: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], weights: Weights) -> None:
    """KV scales and input scales; those of weights go with their values."""
    for name, scale in scales.items():
        spec = specs[name]
        target = _target(weights, spec)
        if spec.kind == "kv_scale":
            assert isinstance(target, torch.Tensor)
            target[spec.first_row : spec.first_row + spec.num_rows] = scale
        elif spec.kind == "input_scale" and isinstance(target, Matrix) and target.input_scale is not None:
            # The parts of one matrix see the same inputs: the largest scale covers all of them.
            torch.maximum(target.input_scale, scale.to(target.input_scale.device), out=target.input_scale)


def _place_values(source: torch.Tensor, spec: TensorSpec, scale: torch.Tensor | None, weights: Weights) -> None:
    target = _target(weights, spec)
    if spec.num_interleaved_heads:
        source = _split_pairs(source, spec.num_interleaved_heads)
    if isinstance(target, torch.Tensor):
        target.copy_(source)
    elif target.scales is not None and scale is not None and scale.dim() == 1:
        rows = slice(spec.first_row, spec.first_row + len(source))
        target.values[rows] = source.to(target.values.dtype)
        target.scales[rows] = scale.to(target.scales.device)
    else:
        _convert(source, scale, target, spec.first_row)


def _convert(source: torch.Tensor, scale: torch.Tensor | None, target: Matrix, first_row: int) -> None:
    """Real values of source [N, K] into rows of target, piece by piece; quantised there when the target is FP8."""
    num_rows = max(1, _PIECE_ELEMENTS // source.shape[1] // BLOCK_SIZE) * BLOCK_SIZE
    for first in range(0, len(source), num_rows):
        piece = source[first : first + num_rows].to(target.values.device)
        rows = slice(first_row + first, first_row + first + len(piece))
        if scale is not None:
            piece = piece.float() * _scales_of(scale, first, piece).to(piece.device)
        if target.scales is None:
            target.values[rows] = piece.to(target.values.dtype)
        else:
            row_scales = fp8.row_scales(piece)
            target.scales[rows] = row_scales
            target.values[rows] = fp8.quantise(piece.float(), row_scales).to(target.values.dtype)


def _scales_of(scale: torch.Tensor, first_row: int, piece: torch.Tensor) -> torch.Tensor:
    """The scales of rows `first_row` and following, broadcastable to piece [rows, columns]; `first_row` begins a block."""
    if scale.dim() == 1:
        return scale[first_row : first_row + len(piece)].unsqueeze(1)
    blocks = scale[first_row // BLOCK_SIZE : -(-(first_row + len(piece)) // BLOCK_SIZE)]
    rows = blocks.repeat_interleave(BLOCK_SIZE, dim=0)[: len(piece)]
    return rows.repeat_interleave(BLOCK_SIZE, dim=1)[:, : piece.shape[1]]


def _split_pairs(source: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Row 2 * pair + side of each head becomes row side * num_pairs + pair."""
    num_pairs = len(source) // num_heads // 2
    return source.view(num_heads, num_pairs, 2, -1).transpose(1, 2).reshape(source.shape)


def _target(weights: Weights, spec: TensorSpec) -> torch.Tensor | Matrix:
    target = getattr(weights if spec.layer < 0 else weights.layers[spec.layer], spec.target)
    assert isinstance(target, torch.Tensor | Matrix)
    return target
