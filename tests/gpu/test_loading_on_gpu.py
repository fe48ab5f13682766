"""Checkpoints through pinned staging buffers onto the GPU: the same bits as on the CPU, however many pieces are in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.guarded import as_bytes
from kernels.launch import Device

pytest.importorskip("safetensors")
pytest.importorskip("msgspec")

from backend.checkpoint import piece_reader
from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.weight_loader import load_weights
from backend.checkpoint.weights import Weights
from tests.checkpoints import make_checkpoint
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint

pytestmark = pytest.mark.gpu


def all_tensors(weights: Weights) -> Iterator[torch.Tensor]:
    yield from (weights.embedding, weights.norm)
    matrices: list[Matrix] = [weights.head]
    for layer in weights.layers:
        yield from (layer.attention_norm, layer.ffn_norm)
        matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
    for matrix in matrices:
        yield from (tensor for tensor in (matrix.values, matrix.scales, matrix.input_scale) if tensor is not None)


def load(folder: Path, device: torch.device, weight_format: WeightFormat) -> list[torch.Tensor]:
    weights = load_weights(folder, read_model_config(folder), device=device, weight_format=weight_format)
    return [tensor.cpu() for tensor in all_tensors(weights)]


@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
@pytest.mark.parametrize("piece_bytes", [2**18, 2**24])
def test_weights_are_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device, scheme: str, piece_bytes: int
) -> None:
    monkeypatch.setattr(piece_reader, "PIECE_BYTES", piece_bytes)
    folder = make_checkpoint(
        tmp_path / "source", dtype=torch.bfloat16, hidden_size=640, ffn_size=1280, head_dim=128, vocab_size=4096
    )
    if scheme != "none":
        quantise_checkpoint(folder, tmp_path / "fp8", SCHEMES[scheme], num_shards=2)
        folder = tmp_path / "fp8"
    for weight_format in (WeightFormat(torch.bfloat16), WeightFormat(torch.bfloat16, True, True)):
        on_device = load(folder, device.torch_device, weight_format)
        on_cpu = load(folder, torch.device("cpu"), weight_format)
        for ours, theirs in zip(on_device, on_cpu, strict=True):
            assert torch.equal(as_bytes(ours), as_bytes(theirs))
