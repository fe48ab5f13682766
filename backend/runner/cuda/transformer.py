"""The dense Mistral transformer on the project's kernels: all tokens of a step through all layers."""

from __future__ import annotations

import torch

from backend.checkpoint.matrix import Matrix
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import LayerWeights, Weights
from backend.runner.cuda.activations import LinearInput, first_of, input_of
from backend.runner.cuda.attention import StepAttention, StepShape
from backend.runner.cuda.slot_state import SlotState
from backend.runner.cuda.staging import Staging
from backend.runner.kv_pages import KvPages
from kernels.embedding import embedding
from kernels.launch import Device
from kernels.linear import linear
from kernels.rmsnorm import rmsnorm
from kernels.rope_kv import angle_table, rope_kv
from kernels.scatter import scatter
from kernels.swiglu import swiglu


class CudaTransformer:
    """Runs the tokens of steps. How many there are is read from device memory, so one graph serves every step of a width.

    Activations are BF16 between the layers and e4m3 where a linear layer is FP8; sums are FP32.
    """

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        weights: Weights,
        kv: KvPages,
        state: SlotState,
        staging: Staging,
        *,
        max_model_len: int,
    ) -> None:
        """Allocate what steps of as many tokens need as `staging` has room for."""
        self._device = device
        self._config = config
        self._weights = weights
        self._kv = kv
        self._state = state
        self._step = staging.inputs
        self._tokens = staging.tokens
        self._norms = [(_bf16(layer.attention_norm), _bf16(layer.ffn_norm)) for layer in weights.layers]
        self._norm = _bf16(weights.norm)
        self._angles = angle_table(config.rope_theta, max_model_len).to(device.torch_device)
        is_fp8_kv = kv.layer(0)[0].dtype == torch.float8_e4m3fn
        self._kv_scales = [
            tuple(torch.tensor([scale], device=device.torch_device) for scale in kv.scales(layer))
            if is_fp8_kv
            else (None, None)
            for layer in range(config.num_layers)
        ]
        self._num_tokens = self._step["num_tokens"]
        rows = self._max_rows = max(self._tokens)
        heads = config.num_heads + 2 * config.num_kv_heads
        widest = max(config.hidden_size, config.query_size, config.ffn_size)
        self._residual, self._branch = (self._zeros(rows, config.hidden_size) for _ in range(2))
        self._qkv = self._zeros(rows, heads, config.head_dim)
        self._queries = self._zeros(rows, config.num_heads, config.head_dim)
        self._gate_up = self._zeros(rows, 2 * config.ffn_size)
        self._values = {
            dtype: self._zeros(rows, widest, dtype=dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)
        }
        self._attention = StepAttention(
            device,
            config.num_heads,
            config.num_kv_heads,
            page_tables=state.page_tables,
            tokens=self._tokens,
            num_tiles=self._step["num_tiles"],
            # Nothing else is in this memory while attention runs: its result is what it holds next, if that is BF16.
            unscaled=first_of(self._values[torch.bfloat16], rows, config.query_size),
        )
        self._scale = self._zeros(rows, dtype=torch.float32)
        self._inputs = [
            {name: self._input_of(getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")}
            for layer in weights.layers
        ]
        self.head_input = self._input_of(weights.head)

    def head_rows(self, num_rows: int) -> LinearInput:
        """New memory for rows as the head reads them."""
        matrix, dtype = self._weights.head, self.head_input.values.dtype
        values = {dtype: self._zeros(num_rows, matrix.shape[1], dtype=dtype)}
        return input_of(matrix, num_rows, values, self._zeros(num_rows, dtype=torch.float32))

    def hidden(self, shape: StepShape) -> LinearInput:
        """The normed rows of the step that runs in `shape`, as the head reads them; they stand until the next one runs."""
        return self.head_input.first(shape.width)

    def logits(self, rows: LinearInput, out: torch.Tensor, num_rows: torch.Tensor) -> None:
        """out [n, V] FP32 of normed rows [n]; `num_rows` [1] INT32: rows from there on are left alone."""
        self._linear(rows, self._weights.head, out, num_rows)

    def run(self, shape: StepShape) -> None:
        """All layers for the first rows of everything, `shape.width` of them; before that, what has changed in the slots."""
        width, tokens = shape.width, self._tokens[shape.width]
        scatter(
            self._device,
            updates=tokens["updates"],
            memory=self._state.memory,
            num_updates=self._step["num_updates"],
        )
        embedding(
            self._device,
            table=self._weights.embedding,
            token_ids=tokens["token_ids"],
            last_ids=self._state.last_ids,
            out=self._residual[:width],
            num_tokens=self._num_tokens,
        )
        self._attention.schedule(shape)
        for index, layer in enumerate(self._weights.layers):
            inputs = {name: its_input.first(width) for name, its_input in self._inputs[index].items()}
            attention_norm, ffn_norm = self._norms[index]
            self._add_and_norm(width, attention_norm, inputs["qkv"], has_branch=index > 0)
            self._attend(index, layer, inputs, shape)
            self._add_and_norm(width, ffn_norm, inputs["gate_up"])
            self._linear(inputs["gate_up"], layer.gate_up, self._gate_up[:width], self._num_tokens)
            swiglu(
                self._device,
                gate_up=self._gate_up[:width],
                out=inputs["down"].values,
                scale=inputs["down"].written_scale,
                static_scale=inputs["down"].static_scale,
                num_rows=self._num_tokens,
            )
            self._linear(inputs["down"], layer.down, self._branch[:width], self._num_tokens)
        self._add_and_norm(width, self._norm, self.head_input.first(width))

    def _attend(self, index: int, layer: LayerWeights, inputs: dict[str, LinearInput], shape: StepShape) -> None:
        width = shape.width
        qkv = self._qkv[:width]
        self._linear(inputs["qkv"], layer.qkv, qkv.flatten(1), self._num_tokens)
        k_pages, v_pages = self._kv.layer(index)
        k_scale, v_scale = self._kv_scales[index]
        rope_kv(
            self._device,
            qkv=qkv,
            angles=self._angles,
            positions=self._tokens[width]["positions"],
            sequences=self._tokens[width]["slots"],
            page_tables=self._state.page_tables,
            k_scale=k_scale,
            v_scale=v_scale,
            q=self._queries[:width],
            k_pages=k_pages,
            v_pages=v_pages,
            num_tokens=self._num_tokens,
            is_interleaved=False,
        )
        self._attention.run(shape, self._queries[:width], (k_pages, v_pages), (k_scale, v_scale), inputs["output"])
        self._linear(inputs["output"], layer.output, self._branch[:width], self._num_tokens)

    def _add_and_norm(self, width: int, weight: torch.Tensor, out: LinearInput, *, has_branch: bool = True) -> None:
        """Add what the last linear layer gave to the residual stream, and norm the sum."""
        rmsnorm(
            self._device,
            x=self._branch[:width] if has_branch else None,
            residual=self._residual[:width],
            weight=weight,
            out=out.values,
            scale=out.written_scale,
            static_scale=out.static_scale,
            num_rows=self._num_tokens,
            eps=self._config.rms_norm_eps,
        )

    def _linear(self, rows: LinearInput, matrix: Matrix, out: torch.Tensor, num_rows: torch.Tensor) -> None:
        linear(
            self._device,
            x=rows.values,
            weight=matrix.values,
            x_scale=rows.scale,
            weight_scale=matrix.scales,
            residual=None,
            out=out,
            num_rows=num_rows,
        )

    def _input_of(self, matrix: Matrix) -> LinearInput:
        return input_of(matrix, self._max_rows, self._values, self._scale)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device.torch_device)


def _bf16(norm: torch.Tensor) -> torch.Tensor:
    return norm.to(torch.bfloat16)
