"""Streams a checkpoint into the engine's weights, one tensor at a time, quantising or dequantising on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from backend.checkpoint import fp8
from backend.checkpoint.layouts import TensorSpec, tensor_specs
from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.piece_reader import Piece, read_pieces
from backend.checkpoint.quantization import BLOCK_SIZE
from backend.checkpoint.tensor_files import REMEDY, StoredTensor, check_tensors, find_tensors, open_tensors
from backend.checkpoint.weights import Weights, allocate_weights
from backend.errors import ConfigError

log = logging.getLogger("nemo.engine")
Progress = Callable[[int, int], None]
"""Called with (bytes_done, bytes_total) of the source files after each piece of a tensor."""
_TIED_HEAD_ROWS = 1024
"""Rows of the embedding that become an FP8 head at once."""


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    weight_format: WeightFormat,
    progress: Progress | None = None,
) -> Weights:
    """Check every file and header first, then copy piece by piece to `device`, converting to `weight_format` there.

    Host memory above the final copy: the staging buffers of `piece_reader`, and all scales. Dense values become FP8 with one
    scale for each row. FP8 values stay as they are, but those with block scales get one for each row, which rounds them once
    more. ConfigError names file, tensor, what is expected and found; also for values that are not finite as they are held, which
    would make every answer nonsense.
    """
    started_s = time.monotonic()
    files = find_tensors(folder, config.layout)
    specs = tensor_specs(config, files)
    tensors = check_tensors(files, specs)
    bytes_total = sum(tensor.num_bytes for tensor in tensors)
    weights = allocate_weights(config, device, weight_format)
    scales = _read_scales(tensors, specs)
    _place_scales(scales, specs, weights)
    values = [(tensor, _rows_together(specs[tensor.name])) for tensor in tensors if specs[tensor.name].kind == "values"]
    bytes_done = bytes_total - sum(tensor.num_bytes for tensor, _ in values)
    is_finite: dict[StoredTensor, torch.Tensor] = {}
    for piece in read_pieces(values, device):
        spec = specs[piece.tensor.name]
        rows = _place_values(piece, spec, scales.get(spec.scale_name), weights)
        is_finite[piece.tensor] = _is_finite(rows) & is_finite.get(piece.tensor, True)
        bytes_done += piece.rows.numel() * piece.rows.itemsize
        if progress is not None:
            progress(bytes_done, bytes_total)
    _refuse_what_is_not_finite(is_finite, weight_format)
    if weights.head.scales is not None and config.tie_word_embeddings:
        for first_row in range(0, config.vocab_size, _TIED_HEAD_ROWS):
            _convert(weights.embedding[first_row : first_row + _TIED_HEAD_ROWS], None, weights.head, first_row)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - started_s
    log.info("weights: %.2f GB in %.1f s, %.2f GB/s", bytes_total / 1e9, seconds, bytes_total / 1e9 / seconds)
    return weights


def _rows_together(spec: TensorSpec) -> int:
    """The rows of a head that are to be reordered, and the rows of a block of scales, are never cut."""
    if not spec.num_interleaved_heads:
        return BLOCK_SIZE
    return math.lcm(BLOCK_SIZE, spec.shape[0] // spec.num_interleaved_heads)


def _read_scales(tensors: Iterable[StoredTensor], specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """All scales, in FP32: they may lie in other shards than their values."""
    names: dict[Path, list[str]] = {}
    for tensor in tensors:
        if specs[tensor.name].kind != "values":
            names.setdefault(tensor.path, []).append(tensor.name)
    scales: dict[str, torch.Tensor] = {}
    for path, its_names in names.items():
        with open_tensors(path) as file:
            for name in its_names:
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


def _place_values(piece: Piece, spec: TensorSpec, scale: torch.Tensor | None, weights: Weights) -> Matrix:
    """Convert a piece into its rows of the weights; returns these rows."""
    target = _target(weights, spec)
    source, first_row = piece.rows, spec.first_row + piece.first_row
    if spec.num_interleaved_heads:
        source = _split_pairs(source, spec.shape[0] // spec.num_interleaved_heads)
    if scale is not None:
        scale = (
            scale[piece.first_row : piece.first_row + len(source)] if scale.dim() == 1 else _block_scales(scale, piece)
        )
    if isinstance(target, torch.Tensor):
        target[first_row : first_row + len(source)] = source
    elif target.scales is not None and scale is not None and scale.dim() == 1:
        rows = slice(first_row, first_row + len(source))
        target.values[rows] = source.to(target.values.dtype)
        target.scales[rows] = scale.to(target.scales.device)
    else:
        _convert(source, scale, target, first_row)
    rows = slice(first_row, first_row + len(source))
    if isinstance(target, torch.Tensor):
        return Matrix(target[rows])
    return Matrix(target.values[rows], None if target.scales is None else target.scales[rows])


def _is_finite(rows: Matrix) -> torch.Tensor:
    """Whether all values and scales are: a BOOL on their device, which nobody waits for."""
    if rows.values.dtype == fp8.DTYPE:  # has no infinities; a NaN is all ones but for the sign
        is_finite = ((rows.values.view(torch.uint8) & 0x7F) != 0x7F).all()
    else:
        low, high = torch.aminmax(rows.values)  # NaN when there is one
        is_finite = low.isfinite() & high.isfinite()
    return is_finite if rows.scales is None else is_finite & rows.scales.isfinite().all()


def _refuse_what_is_not_finite(is_finite: Mapping[StoredTensor, torch.Tensor], weight_format: WeightFormat) -> None:
    flags = torch.stack(tuple(is_finite.values())).tolist()
    bad = [tensor for tensor, flag in zip(is_finite, flags, strict=True) if not flag]
    if bad:
        held = str(weight_format.dense).removeprefix("torch.")
        raise ConfigError(
            f"{bad[0].path}: tensor {bad[0].name} must hold finite numbers, found NaN, infinity or a number beyond {held} "
            f"(so {len(bad)} of {len(is_finite)} tensors); {REMEDY}"
        )


def _convert(source: torch.Tensor, scale: torch.Tensor | None, target: Matrix, first_row: int) -> None:
    """Real values of source [rows, columns] into rows of target; quantised there when the target is FP8.

    scale: None, one for each row, or one for each value.
    """
    rows = slice(first_row, first_row + len(source))
    if scale is not None:
        source = source.float() * (scale if scale.dim() == 2 else scale.unsqueeze(1)).to(source.device)
    if target.scales is None:
        target.values[rows] = source.to(target.values.dtype)
    else:
        row_scales = fp8.row_scales(source)
        target.scales[rows] = row_scales
        target.values[rows] = fp8.quantise(source.float(), row_scales).to(target.values.dtype)


def _block_scales(scale: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The scale of every value of a piece; it begins with a block."""
    num_rows, num_columns = piece.rows.shape
    blocks = scale[piece.first_row // BLOCK_SIZE : -(-(piece.first_row + num_rows) // BLOCK_SIZE)].to(piece.rows.device)
    rows = blocks.repeat_interleave(BLOCK_SIZE, dim=0)[:num_rows]
    return rows.repeat_interleave(BLOCK_SIZE, dim=1)[:, :num_columns]


def _split_pairs(source: torch.Tensor, head_rows: int) -> torch.Tensor:
    """Row 2 * pair + side of each head becomes row side * num_pairs + pair."""
    num_heads, num_pairs = len(source) // head_rows, head_rows // 2
    return source.view(num_heads, num_pairs, 2, -1).transpose(1, 2).reshape(source.shape)


def _target(weights: Weights, spec: TensorSpec) -> torch.Tensor | Matrix:
    target = getattr(weights if spec.layer < 0 else weights.layers[spec.layer], spec.target)
    assert isinstance(target, torch.Tensor | Matrix)
    return target
