"""The rules of `cuTensorMapEncodeTiled` in Python, so that every back end refuses the same maps with words.

Source: the function's description in CUDA 13's driver API reference.
"""

from __future__ import annotations

from kernels.arguments import TensorMap
from kernels.errors import ContractError

MAX_RANK = 5
MAX_BOX = 256
# In units of the hardware's: addresses, strides and box rows are counted in 16 bytes.
_UNIT_BYTES = 16
_L2_PROMOTIONS = (0, 64, 128, 256)


def check_tensor_map(tensor_map: TensorMap) -> None:
    """ContractError if the map breaks a rule, or reaches beyond its tensor."""
    name, element_bytes = tensor_map.name, tensor_map.element_bytes
    dims, strides, box = tensor_map.dims, tensor_map.strides_bytes, tensor_map.box

    def expect(holds: bool, what: str, found: object, expected: str) -> None:
        if not holds:
            raise ContractError(f"tensor map of {name}: {what} is {found}, expected {expected}")

    rank = len(dims)
    expect(1 <= rank <= MAX_RANK, "rank", rank, f"1 to {MAX_RANK}")
    expect(len(box) == rank, "rank of box", len(box), f"{rank}, as dims have")
    expect(len(strides) == rank - 1, "number of strides_bytes", len(strides), f"{rank - 1}, one less than dims")
    address = tensor_map.buffer.address
    expect(address != 0, "the tensor", "none", "one")
    expect(address % _UNIT_BYTES == 0, "address", hex(address), f"a multiple of {_UNIT_BYTES}")
    for axis, (size, extent) in enumerate(zip(dims, box, strict=True)):
        expect(1 <= size <= 1 << 32, f"dims[{axis}]", size, "1 to 2^32")
        expect(1 <= extent <= MAX_BOX, f"box[{axis}]", extent, f"1 to {MAX_BOX}")
    for axis, stride in enumerate(strides):
        valid = stride % _UNIT_BYTES == 0 and 0 < stride < 1 << 40
        expect(valid, f"strides_bytes[{axis}]", stride, f"a multiple of {_UNIT_BYTES} below 2^40")
    row_bytes = box[0] * element_bytes
    expect(row_bytes % _UNIT_BYTES == 0, "bytes of box[0]", row_bytes, f"a multiple of {_UNIT_BYTES}")
    span_bytes = tensor_map.swizzle.span_bytes
    expect(
        span_bytes is None or row_bytes <= span_bytes,
        "bytes of box[0]",
        row_bytes,
        f"at most {span_bytes} with {tensor_map.swizzle.name}",
    )
    expect(
        tensor_map.l2_promotion_bytes in _L2_PROMOTIONS,
        "l2_promotion_bytes",
        tensor_map.l2_promotion_bytes,
        f"one of {_L2_PROMOTIONS}",
    )
    # Of the last element; a box may reach beyond it, what lies there reads as zero and is not written.
    last_byte = dims[0] * element_bytes + sum(
        (size - 1) * stride for size, stride in zip(dims[1:], strides, strict=True)
    )
    expect(
        last_byte <= tensor_map.buffer.num_bytes, "extent in bytes", last_byte, f"at most {tensor_map.buffer.num_bytes}"
    )
