"""Which compiled programs a model's steps need, so that they can be compiled beside the reading of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from backend.checkpoint.layouts import HEAD_LAYER, Target
from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import has_input_scale, is_fp8, linear_sizes
from backend.runner.cuda.step_tokens import step_widths, width_for
from backend.runner.memory_plan import PIECE_ROWS
from kernels import (
    decode_attention,
    embedding,
    large_gemm,
    log_probs,
    prefill_attention,
    rmsnorm,
    rope_kv,
    sample,
    skinny_gemm,
    swiglu,
)
from kernels.program import Program


def programs_of(
    config: ModelConfig, weight_format: WeightFormat, *, is_fp8_kv: bool, max_num_seqs: int, max_step_tokens: int
) -> tuple[Program, ...]:
    """Every program that a CudaRunner of these limits may launch, each once. ContractError for sizes no kernel serves."""

    def quantisation(target: Target, layer: int = HEAD_LAYER) -> int:
        """Of a linear layer's inputs, as the programs of those who write them number it."""
        if not is_fp8(config, weight_format, target, layer):
            return 0
        return 2 if has_input_scale(config, target, layer) else 1

    heads, kv_heads, hidden = config.num_heads, config.num_kv_heads, config.hidden_size
    found = [
        embedding.program(hidden),
        rope_kv.program(heads, kv_heads, is_fp8=is_fp8_kv, is_interleaved=False),
        decode_attention.program(1, 1, is_fp8=False, output=0),
        rmsnorm.program(hidden, has_addend=True, quantisation=quantisation("head")),
        sample.program(),
        log_probs.program(),
    ]
    widths = step_widths(max_step_tokens)
    for layer in range(config.num_layers):
        output = quantisation("output", layer)
        found += [
            rmsnorm.program(hidden, has_addend=layer > 0, quantisation=quantisation("qkv", layer)),
            decode_attention.program(heads, kv_heads, is_fp8=is_fp8_kv, output=output),
            prefill_attention.program(heads, kv_heads, is_fp8=is_fp8_kv, output=output),
            rmsnorm.program(hidden, has_addend=True, quantisation=quantisation("gate_up", layer)),
            swiglu.program(config.ffn_size, quantisation=quantisation("down", layer)),
        ]
        for target, rows, columns in linear_sizes(config):
            has_fp8 = is_fp8(config, weight_format, target, layer)
            found += _linear(widths, rows, columns, has_fp8=has_fp8, is_float_out=False)
    widest_piece = width_for(min(max_step_tokens, PIECE_ROWS), PIECE_ROWS)
    head_widths = {*step_widths(max_num_seqs), *step_widths(widest_piece)}
    has_fp8 = is_fp8(config, weight_format, "head")
    found += _linear(head_widths, config.vocab_size, hidden, has_fp8=has_fp8, is_float_out=True)
    return tuple(dict.fromkeys(found))


def _linear(
    widths: Iterable[int], num_outputs: int, num_inputs: int, *, has_fp8: bool, is_float_out: bool
) -> Iterator[Program]:
    """As `kernels.linear` chooses them by the number of rows."""
    for width in widths:
        if width <= skinny_gemm.MAX_ROWS:
            skinny = skinny_gemm.plan_skinny_gemm(width, num_outputs, num_inputs, is_fp8=has_fp8)
            yield skinny_gemm.program(
                skinny, num_outputs, num_inputs, is_fp8=has_fp8, has_residual=False, is_float_out=is_float_out
            )
        else:
            large = large_gemm.plan_large_gemm(
                width, num_outputs, num_inputs, is_fp8=has_fp8, is_float_out=is_float_out
            )
            yield large_gemm.program(
                large, num_outputs, num_inputs, is_fp8=has_fp8, has_residual=False, is_float_out=is_float_out
            )
