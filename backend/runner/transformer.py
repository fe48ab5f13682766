"""The dense Mistral transformer: embedding, L layers of attention and SwiGLU with residuals, norm, head."""

from __future__ import annotations

import numpy as np
import torch

from backend.checkpoint.matrix import Matrix
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import LayerWeights, Weights
from backend.runner.attention import attend
from backend.runner.batch import Batch
from backend.runner.gathered_attention import attend_gathered
from backend.runner.kv_pages import KvPages
from backend.runner.linear import linear, padded_rows
from backend.runner.placement import Arithmetic
from backend.runner.rope import RopeTable, rotate
from backend.runner.work_items import IntArray


class Transformer:
    """Runs a Batch. Activations are FP32, products run in the weights' dtype, K and V are kept in the pages' dtype.

    With tiled arithmetic every row of the logits is, bit for bit, independent of the other rows of the batch.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, kv: KvPages, rope: RopeTable, arithmetic: Arithmetic
    ) -> None:
        self._config = config
        self._weights = weights
        self._kv = kv
        self._rope = rope
        self._arithmetic = arithmetic

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Run all tokens through the layers, write their K and V, and return what the last layer gives [R, E] FP32."""
        x = self._weights.embedding.index_select(0, batch.token_ids).float()
        angles = self._rope.at(batch.positions)
        if batch.fresh_pages.numel() > 0:
            self._kv.clear(batch.fresh_pages)
        for index, layer in enumerate(self._weights.layers):
            x += self._attention(index, layer, self._norm(x, layer.attention_norm), angles, batch)
            x += self._feed_forward(layer, self._norm(x, layer.ffn_norm))
        return x

    def logits(self, hidden: torch.Tensor, tokens: IntArray) -> torch.Tensor:
        """Logits [n, V] FP32 of `tokens` [n], rows of `hidden` [R, E]."""
        if len(tokens) == 0:
            return hidden.new_empty(0, self._config.vocab_size)
        padded = np.zeros(padded_rows(len(tokens)), dtype=np.int64)
        padded[: len(tokens)] = tokens
        rows = hidden.index_select(0, torch.from_numpy(padded).to(hidden.device))
        return self._linear(self._norm(rows, self._weights.norm), self._weights.head)[: len(tokens)]

    def _attention(
        self, index: int, layer: LayerWeights, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        config, num_tokens = self._config, len(batch.pages)
        heads = self._linear(x, layer.qkv).view(len(x), -1, config.head_dim)
        turned = rotate(heads[:, : config.num_heads + config.num_kv_heads], *angles)
        q, k = turned[:, : config.num_heads], turned[:num_tokens, config.num_heads :]
        v = heads[:num_tokens, config.num_heads + config.num_kv_heads :]
        self._kv.write(index, batch.pages, batch.offsets, k, v)
        # Scales of FP8 pages stand outside the sums, so the pages' own values go into the products.
        key_scale, value_scale = self._kv.scales(index)
        scaled_q, tiles = q * (config.head_dim**-0.5 * key_scale), self._kv.tiles(index)
        if self._arithmetic.is_tiled:
            attended = attend(scaled_q, *tiles, batch.items)
        else:
            attended = attend_gathered(scaled_q, *tiles, batch.gathered)
        return self._linear(attended.mul_(value_scale).flatten(1), layer.output)

    def _feed_forward(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._linear(x, layer.gate_up).chunk(2, dim=1)
        # silu(gate) * up. NOTE: not torch's silu, whose vectorised and scalar tails round differently; exp's do not.
        return self._linear((gate / (1.0 + torch.exp(-gate))).mul_(up), layer.down)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(dim=1, keepdim=True)
        return (x * torch.rsqrt(mean_square + self._config.rms_norm_eps)).mul_(weight)

    def _linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return linear(x, matrix, is_tiled=self._arithmetic.is_tiled, has_scaled_mm=self._arithmetic.has_scaled_mm)
