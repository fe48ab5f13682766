"""The dense Mistral transformer on the project's kernels: one block of tokens through all layers, replayed as a graph."""

from __future__ import annotations

import torch

from backend.checkpoint.matrix import Matrix
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import LayerWeights, Weights
from backend.engine.plan import PAGE_TOKENS
from backend.runner.cuda.activations import LinearInput, input_of
from backend.runner.cuda.step_blocks import MAX_BLOCK_TOKENS, TokenBlock
from backend.runner.kv_pages import KvPages
from kernels.decode_attention import decode_attention, make_workspace, schedule_attention
from kernels.embedding import embedding
from kernels.launch import Device, Graph
from kernels.rmsnorm import rmsnorm
from kernels.rope_kv import angle_table, rope_kv
from kernels.skinny_gemm import skinny_gemm
from kernels.swiglu import swiglu


class CudaTransformer:
    """Runs TokenBlocks. The real number of tokens is read from device memory, so one graph serves every block of a width.

    Activations are BF16 between the layers and e4m3 where a linear layer is FP8; sums are FP32.
    """

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        weights: Weights,
        kv: KvPages,
        last_ids: torch.Tensor,
        *,
        max_model_len: int,
    ) -> None:
        """Allocate what every block needs. `last_ids` [slots] INT32: the id last drawn in each slot."""
        self._device = device
        self._config = config
        self._weights = weights
        self._kv = kv
        self._last_ids = last_ids
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
        self._page_tables = self._zeros(len(last_ids), -(-max_model_len // PAGE_TOKENS), dtype=torch.int32)
        self._known_pages: list[tuple[int, ...]] = [()] * len(last_ids)
        self._num_tokens = self._zeros(1, dtype=torch.int32)
        self._token_ids, self._slots, self._positions, self._lengths = (
            self._zeros(MAX_BLOCK_TOKENS, dtype=torch.int32) for _ in range(4)
        )
        max_pages = self._page_tables.shape[1]
        self._attention = make_workspace(MAX_BLOCK_TOKENS, max_pages, config.num_heads, device.torch_device)
        rows, heads = MAX_BLOCK_TOKENS, config.num_heads + 2 * config.num_kv_heads
        widest = max(config.hidden_size, config.query_size, config.ffn_size)
        self._residual, self._branch = (self._zeros(rows, config.hidden_size) for _ in range(2))
        self._qkv = self._zeros(rows, heads, config.head_dim)
        self._queries = self._zeros(rows, config.num_heads, config.head_dim)
        self._gate_up = self._zeros(rows, 2 * config.ffn_size)
        self._values = {
            dtype: self._zeros(rows, widest, dtype=dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)
        }
        self._scale = self._zeros(rows, dtype=torch.float32)
        self._inputs = [
            {name: self._input_of(getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")}
            for layer in weights.layers
        ]
        self.head_input = self._input_of(weights.head)
        self._graphs: dict[int, Graph] = {}

    def set_pages(self, slot: int, page_ids: tuple[int, ...]) -> None:
        """Where the tokens of a slot's sequence lie; only what has changed is uploaded."""
        known = self._known_pages[slot]
        if page_ids != known:
            first = len(known) if page_ids[: len(known)] == known else 0
            new = torch.tensor(page_ids[first:], dtype=torch.int32)
            self._page_tables[slot, first : len(page_ids)] = new.to(self._page_tables.device)
            self._known_pages[slot] = page_ids

    def hidden(self, block: TokenBlock) -> LinearInput:
        """Run a block; its normed rows [width], as the head reads them, stand until the next one runs."""
        for target, values in (
            (self._num_tokens, [len(block.token_ids)]),
            (self._token_ids, block.token_ids),
            (self._slots, block.slots),
            (self._positions, block.positions),
            (self._lengths, [position + 1 for position in block.positions]),
        ):
            target[: len(values)] = torch.tensor(values, dtype=torch.int32).to(target.device)
        width = block.width
        if width not in self._graphs:
            self._graphs[width] = self._device.capture(lambda: self._run(width))
        self._graphs[width].replay()
        return self.head_input.first(width)

    def logits(self, rows: LinearInput, out: torch.Tensor, num_rows: torch.Tensor) -> None:
        """out [n, V] FP32 of normed rows [n], n at most 128; `num_rows` [1] INT32: rows from there on are left alone."""
        self._gemm(rows, self._weights.head, out, num_rows)

    def _run(self, width: int) -> None:
        """All layers for the first `width` rows of everything."""
        embedding(
            self._device,
            table=self._weights.embedding,
            token_ids=self._token_ids[:width],
            last_ids=self._last_ids,
            out=self._residual[:width],
            num_tokens=self._num_tokens,
        )
        schedule_attention(
            self._device,
            lengths=self._lengths[:width],
            items=self._attention["items"],
            first_items=self._attention["first_items"][: width + 1],
            num_rows=self._num_tokens,
        )
        for index, layer in enumerate(self._weights.layers):
            inputs = {name: its_input.first(width) for name, its_input in self._inputs[index].items()}
            attention_norm, ffn_norm = self._norms[index]
            self._add_and_norm(width, attention_norm, inputs["qkv"], has_branch=index > 0)
            self._attend(index, layer, inputs, width)
            self._add_and_norm(width, ffn_norm, inputs["gate_up"])
            self._gemm(inputs["gate_up"], layer.gate_up, self._gate_up[:width], self._num_tokens)
            swiglu(
                self._device,
                gate_up=self._gate_up[:width],
                out=inputs["down"].values,
                scale=inputs["down"].written_scale,
                static_scale=inputs["down"].static_scale,
                num_rows=self._num_tokens,
            )
            self._gemm(inputs["down"], layer.down, self._branch[:width], self._num_tokens)
        self._add_and_norm(width, self._norm, self.head_input.first(width))

    def _attend(self, index: int, layer: LayerWeights, inputs: dict[str, LinearInput], width: int) -> None:
        qkv = self._qkv[:width]
        self._gemm(inputs["qkv"], layer.qkv, qkv.flatten(1), self._num_tokens)
        k_pages, v_pages = self._kv.layer(index)
        k_scale, v_scale = self._kv_scales[index]
        rope_kv(
            self._device,
            qkv=qkv,
            angles=self._angles,
            positions=self._positions[:width],
            sequences=self._slots[:width],
            page_tables=self._page_tables,
            k_scale=k_scale,
            v_scale=v_scale,
            q=self._queries[:width],
            k_pages=k_pages,
            v_pages=v_pages,
            num_tokens=self._num_tokens,
            is_interleaved=False,
        )
        decode_attention(
            self._device,
            q=self._queries[:width],
            k_pages=k_pages,
            v_pages=v_pages,
            k_scale=k_scale,
            v_scale=v_scale,
            page_tables=self._page_tables,
            sequences=self._slots[:width],
            lengths=self._lengths[:width],
            **(self._attention | {"first_items": self._attention["first_items"][: width + 1]}),
            out=inputs["output"].values,
            scale=inputs["output"].written_scale,
            static_scale=inputs["output"].static_scale,
        )
        self._gemm(inputs["output"], layer.output, self._branch[:width], self._num_tokens)

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

    def _gemm(self, rows: LinearInput, matrix: Matrix, out: torch.Tensor, num_rows: torch.Tensor) -> None:
        skinny_gemm(
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
        return input_of(matrix, MAX_BLOCK_TOKENS, self._values, self._scale)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device.torch_device)


def _bf16(norm: torch.Tensor) -> torch.Tensor:
    return norm.to(torch.bfloat16)
