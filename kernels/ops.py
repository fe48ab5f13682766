"""All operations, in the order of a decoding step. One more: a line here and its three files."""

from __future__ import annotations

from kernels import (
    decode_attention,
    embedding,
    gather_rows,
    large_gemm,
    log_probs,
    prefill_attention,
    read_bandwidth,
    rmsnorm,
    rope_kv,
    sample,
    scatter,
    skinny_gemm,
    swiglu,
)
from kernels.errors import KernelError
from kernels.op import Op

OPS: tuple[Op, ...] = (
    scatter.OP,
    embedding.OP,
    rmsnorm.OP,
    rope_kv.OP,
    decode_attention.OP,
    prefill_attention.OP,
    skinny_gemm.OP,
    large_gemm.OP,
    swiglu.OP,
    gather_rows.OP,
    sample.OP,
    log_probs.OP,
    read_bandwidth.OP,
)


def select_ops(name: str | None) -> tuple[Op, ...]:
    """The operation of that name, or all of them for None. KernelError lists the names there are."""
    selected = tuple(op for op in OPS if name in (None, op.name))
    if not selected:
        raise KernelError(f"no operation {name!r}, expected one of {', '.join(op.name for op in OPS)}")
    return selected
