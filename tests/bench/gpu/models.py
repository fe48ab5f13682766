"""Random models of Mistral NeMo's shape, and of its shape in small, made on the device."""

from __future__ import annotations

from dataclasses import replace

import torch

from backend.checkpoint.matrix import Matrix, WeightFormat
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import Weights, allocate_weights
from backend.engine.plan import PAGE_TOKENS
from backend.plan import NEMO_12B
from backend.runner.cuda.runner import CudaRunner
from kernels.launch import Device

TOY = replace(NEMO_12B, num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=1, ffn_size=256, vocab_size=512)

FP8 = WeightFormat(torch.bfloat16, has_fp8_linears=True)
_VALUES_AT_ONCE = 1 << 26


def random_weights(config: ModelConfig, device: torch.device) -> Weights:
    """Normal values, never zeros, which the GPU multiplies 13 % faster; activations keep a size near one."""
    generator = torch.Generator(device=device).manual_seed(0)
    weights = allocate_weights(config, device, FP8)
    matrices = [
        weights.head,
        *(m for layer in weights.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)),
    ]
    for matrix in matrices:
        _fill_matrix(matrix, generator)
    fill_normal(weights.embedding, generator)
    for norm in (weights.norm, *(n for layer in weights.layers for n in (layer.attention_norm, layer.ffn_norm))):
        norm.uniform_(0.5, 1.5, generator=generator)
    return weights


def fill_normal(tensor: torch.Tensor, generator: torch.Generator, scale: float = 1.0) -> None:
    """In its dtype, a piece at a time, so that little more memory is needed than the tensor has."""
    flat = tensor.view(-1)
    for first in range(0, flat.numel(), _VALUES_AT_ONCE):
        piece = flat[first : first + _VALUES_AT_ONCE]
        values = torch.randn(piece.shape, device=tensor.device, generator=generator)
        piece.copy_(values.mul_(scale).to(tensor.dtype))


def _fill_matrix(matrix: Matrix, generator: torch.Generator) -> None:
    size = matrix.shape[1] ** -0.5
    if matrix.scales is None:
        fill_normal(matrix.values, generator, size)
    else:
        fill_normal(matrix.values, generator, 64.0)
        matrix.scales.uniform_(0.5, 1.5, generator=generator).mul_(size / 64.0)


def runner_of(
    config: ModelConfig, weights: Weights, device: Device, *, kv_dtype: torch.dtype = torch.float8_e4m3fn, **limits: int
) -> CudaRunner:
    """FP8 weights, the head in BF16. `limits`: num_pages, max_num_seqs, max_model_len, max_step_tokens."""
    return CudaRunner(config, weights, device, weight_format=FP8, kv_dtype=kv_dtype, **limits)


def random_runner(
    config: ModelConfig, device: Device, *, kv_dtype: torch.dtype = torch.float8_e4m3fn, **limits: int
) -> CudaRunner:
    """As `runner_of`; weights and all pages hold normal values."""
    with torch.inference_mode():
        runner = runner_of(config, random_weights(config, device.torch_device), device, kv_dtype=kv_dtype, **limits)
        generator = torch.Generator(device=device.torch_device).manual_seed(1)
        for layer in range(config.num_layers):
            for kept in runner.kv.layer(layer):
                fill_normal(kept, generator)
    return runner


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_TOKENS)
