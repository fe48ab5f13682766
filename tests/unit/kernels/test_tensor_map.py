from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.arguments import Access, Buffer, Swizzle, TensorMap
from kernels.errors import ContractError
from kernels.tensor_map import check_tensor_map

MEMORY = torch.zeros(64 * 256 + 8, dtype=torch.bfloat16)


def make_map(offset: int = 0, tensor: torch.Tensor | None = MEMORY, **changes: Any) -> TensorMap:
    view = None if tensor is None else tensor[offset:]
    settings: dict[str, Any] = {"dims": (256, 64), "strides_bytes": (512,), "box": (64, 64), **changes}
    return TensorMap(
        Buffer("w", view, Access.READ, "N", torch.bfloat16),
        swizzle=settings.pop("swizzle", Swizzle.BYTES_128),
        **settings,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"box": (64, 256)},
        {"dims": (1, 1), "box": (8, 1)},
        {"dims": (64, 4, 64), "strides_bytes": (128, 512), "box": (64, 1, 8)},
        {"swizzle": Swizzle.NONE, "box": (256, 1)},
        {"swizzle": Swizzle.BYTES_32, "box": (16, 1)},
        {"dims": (16384,), "strides_bytes": (), "box": (64,), "l2_promotion_bytes": 0},
    ],
)
def test_good_maps_are_accepted(changes: dict[str, Any]) -> None:
    check_tensor_map(make_map(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (), "strides_bytes": (), "box": ()}, "rank is 0, expected 1 to 5"),
        ({"dims": (1,) * 6, "strides_bytes": (16,) * 5, "box": (8,) * 6}, "rank is 6, expected 1 to 5"),
        ({"box": (64,)}, "rank of box is 1, expected 2, as dims have"),
        ({"strides_bytes": (512, 512)}, "number of strides_bytes is 2, expected 1, one less than dims"),
        ({"tensor": None}, "the tensor is none, expected one"),
        ({"offset": 4}, "address is 0x[0-9a-f]+8, expected a multiple of 16"),
        ({"dims": (0, 64)}, r"dims\[0\] is 0, expected 1 to 2\^32"),
        ({"box": (64, 257)}, r"box\[1\] is 257, expected 1 to 256"),
        ({"box": (64, 0)}, r"box\[1\] is 0, expected 1 to 256"),
        ({"strides_bytes": (520,)}, r"strides_bytes\[0\] is 520, expected a multiple of 16 below 2\^40"),
        ({"strides_bytes": (0,)}, r"strides_bytes\[0\] is 0, expected a multiple of 16"),
        ({"strides_bytes": (1 << 40,)}, r"strides_bytes\[0\] is 1099511627776, expected a multiple of 16"),
        ({"box": (4, 64)}, r"bytes of box\[0\] is 8, expected a multiple of 16"),
        ({"box": (128, 64)}, r"bytes of box\[0\] is 256, expected at most 128 with BYTES_128"),
        ({"swizzle": Swizzle.BYTES_64}, r"bytes of box\[0\] is 128, expected at most 64 with BYTES_64"),
        ({"l2_promotion_bytes": 32}, r"l2_promotion_bytes is 32, expected one of \(0, 64, 128, 256\)"),
        ({"dims": (256, 65)}, "extent in bytes is 33280, expected at most 32784"),
    ],
)
def test_every_rule_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=f"tensor map of w: {message}"):
        check_tensor_map(make_map(**changes))
