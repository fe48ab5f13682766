"""The unit kernels of units.cu: what each is given, and by the PTX ISA's words, without the kernels' helpers, what it must give.

`ALL` is the list a test runs under the emulator and, on a GPU, on both back ends.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kernels.arguments import Argument, Buffer, int32
from tests.kernels.unit import Array, Tensors, Unit, filled, tensor, unsigned
from tests.kernels.units_tensor import TENSOR_UNITS
from tests.kernels.units_wgmma import MATRIX_UNITS


def random(seed: int) -> np.random.Generator:
    """The numbers of one unit."""
    return np.random.default_rng(seed)


def words(seed: int, *shape: int) -> torch.Tensor:
    """Random 32-bit words."""
    return tensor(random(seed).integers(0, 1 << 32, shape, dtype=np.uint32))


# ---- memory and arithmetic


def vector_access_expected(t: Tensors) -> dict[str, Array]:
    given = unsigned(t["in"]).reshape(-1, 4)
    return {"out": np.concatenate([given, given, given, given[:, [2, 3, 0, 1]], given])}


def e4m3_value(code: int) -> float:
    """OCP 8-bit floating point, E4M3."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


E4M3 = np.array([e4m3_value(code) for code in range(256)])


def e4m3_to_half_expected(t: Tensors) -> dict[str, Array]:
    halves = E4M3.astype(np.float16).view(np.uint16).astype(np.uint32)
    halves[[127, 255]] = 0x7FFF
    codes = np.arange(65536)
    return {"out": (halves[codes & 255] | halves[codes >> 8] << 16).astype(np.uint32)}


def e4m3_code(value: np.float32) -> int:
    """The nearest code, ties to the even one, clamped to +-448."""
    if np.isnan(value):
        return 127
    magnitude = min(float(abs(value)), 448.0)
    distance = np.abs(E4M3[:127] - magnitude)
    nearest = np.flatnonzero(distance == distance.min())
    code = next(code for code in nearest if len(nearest) == 1 or code % 2 == 0)
    return int(code) | (128 if np.signbit(value) else 0)


def conversions() -> torch.Tensor:
    rng = random(2)
    scaled = rng.standard_normal(1500) * 10.0 ** rng.uniform(-4, 3, 1500)
    exact = np.concatenate([E4M3[:127], -E4M3[:127]])
    between = (E4M3[:126] + E4M3[1:127]) / 2  # ties
    special = [
        0.0,
        -0.0,
        448.1,
        464.0,
        480.0,
        1e30,
        -1e30,
        np.inf,
        -np.inf,
        np.nan,
        2.0**-10,
        2.0**-11,
        -(2.0**-10),
        1e-30,
    ]
    values = np.concatenate([scaled, exact, between, special]).astype(np.float32)
    return torch.from_numpy(values[: len(values) // 2 * 2])


def float_to_e4m3_expected(t: Tensors) -> dict[str, Array]:
    codes = np.array([e4m3_code(value) for value in t["in"].numpy()], dtype=np.uint16)
    return {"out": codes[0::2] | codes[1::2] << 8}


def approximation_arguments() -> torch.Tensor:
    return torch.from_numpy(np.concatenate([random(3).uniform(-100, 100, 254), [0.0, 1.0]]).astype(np.float32))


def approximations_expected(t: Tensors) -> dict[str, Array]:
    x = t["in"].double().numpy()
    with np.errstate(divide="ignore"):
        return {"exp2": np.exp2(x), "log2": np.log2(np.abs(x))}


def addresses_expected(t: Tensors) -> dict[str, Array]:
    # Of 1024 bytes, in rows of 128: chunk c of row r lies where chunk c ^ r would.
    index = np.arange(64)
    row, chunk = index // 8, index % 8
    return {"out": np.concatenate([index * 16, row * 128 + (chunk ^ row) * 16, [0]]).astype(np.int32)}


# ---- a warp


def warp_values() -> torch.Tensor:
    # Multiples of 1/4, so that every order of additions gives the same sum.
    return torch.from_numpy((random(4).integers(-400, 400, 32) / 4).astype(np.float32))


def warp_expected(t: Tensors) -> dict[str, Array]:
    x, lane = t["in"].numpy(), np.arange(32)
    u = x.view(np.uint32)
    i = u.view(np.int32)

    def every(value: object) -> Array:
        return np.full(32, value)

    down = np.where(lane % 16 + 3 < 16, lane + 3, lane)
    up = np.where(lane % 8 >= 2, lane - 2, lane)
    floats = [every(x.sum()), every(x.max()), x[lane * 7 % 32], x[lane ^ 5], x[down], x[up]]
    ballot = int(sum(1 << k for k in range(32) if x[k] > 0))
    matches = [sum(1 << j for j in range(32) if u[j] % 4 == u[k] % 4) for k in range(32)]
    bits = [
        every(ballot),
        every(int((x > 100).any()) | int((x < 100).all()) << 1),
        every(int(u.astype(np.uint64).sum()) & 0xFFFFFFFF),
        every(u.min()),
        every(u.max()),
        every(int(i.min()) & 0xFFFFFFFF),
        every(int(i.max()) & 0xFFFFFFFF),
        every(np.bitwise_and.reduce(u)),
        every(np.bitwise_or.reduce(u)),
        every(np.bitwise_xor.reduce(u)),
        np.array(matches),
        every(1),
    ]
    return {
        "out": np.stack(floats).astype(np.float32),
        "bits": np.stack([np.asarray(b, dtype=np.uint64) for b in bits]).astype(np.uint32),
    }


def matrix_expected(t: Tensors) -> dict[str, Array]:
    matrices = unsigned(t["in"]).view(np.uint16).reshape(4, 8, 8)
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32)  # lane L: row L / 4, columns 2 (L % 4), + 1
    flipped = np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.uint32).reshape(4, 32)
    read = np.concatenate([pairs[:1], pairs[:2], pairs, flipped[:2], flipped]).T
    rows = unsigned(t["in"]).reshape(32, 4)
    zeros = np.zeros((16, 4), np.uint32)
    flipped_rows = np.ascontiguousarray(flipped).reshape(32, 4)
    return {"out": np.concatenate([a.reshape(-1) for a in (read, rows[:16], zeros, rows, flipped_rows)])}


# ---- a block


def named_barriers_expected(t: Tensors) -> dict[str, Array]:
    given = unsigned(t["in"]).reshape(3, 32)
    out = np.full((3, 128), 0xFFFFFFFF, np.uint32)
    out[:, 32:] = np.tile(given, 3)
    return {"out": out}


def block_votes_expected(t: Tensors) -> dict[str, Array]:
    given = t["in"].numpy() != 0
    return {"out": np.concatenate([np.full(96, v, np.int32) for v in (given.sum(), given.all(), given.any())])}


def atomics_tensors() -> Tensors:
    return {
        "in": torch.from_numpy(random(7).integers(-1000, 1000, 96).astype(np.int32)),
        "integers": torch.tensor([5, 0, 0, 9], dtype=torch.int32),
        "words": torch.tensor([-1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32),
        "longs": torch.tensor([1 << 40], dtype=torch.int64),
        "floats": torch.tensor([0.5]),
    }


def atomics_expected(t: Tensors) -> dict[str, Array]:
    x = t["in"].numpy().astype(np.int64)
    seen = int(np.bitwise_or.reduce(1 << (x & 31)))
    counter = 0
    down = 0
    for _ in x:
        counter = 0 if counter >= 9 else counter + 1
        down = 9 if down == 0 or down > 9 else down - 1
    words_ = [~seen & 0xFFFFFFFF, seen, int(np.bitwise_xor.reduce(x)) & 0xFFFFFFFF, counter, down]
    return {
        "integers": np.array([5 + x.sum(), min(0, x.min()), max(0, x.max()), 9 - x.sum()], np.int32),
        "words": np.array([*words_, int((x & 0xFFFFFFFF).max()), 77, 5], np.uint32),
        "longs": np.array([(1 << 40) + x.sum()], np.int64),
        "floats": np.array([0.5 + x.sum()], np.float32),
    }


def last_block_expected(t: Tensors) -> dict[str, Array]:
    parts = unsigned(t["in"]).reshape(5, 64).astype(np.uint64).sum(axis=1) & 0xFFFFFFFF
    total = 0
    for part in parts:
        total = (total * 31 + int(part)) & 0xFFFFFFFF
    return {"out": np.array([total], np.uint32), "parts": parts.astype(np.uint32), "count": np.zeros(1, np.uint32)}


# ---- copies and clusters


def thread_copies_expected(t: Tensors) -> dict[str, Array]:
    given = unsigned(t["in"]).view(np.uint8).reshape(2, 128, 16).copy()
    for thread in range(128):
        given[0, thread, thread % 17 :] = 0
    swapped = np.arange(128) ^ 1
    return {"out": np.concatenate([given[0][swapped], given[1][swapped]])}


def cluster_expected(t: Tensors) -> dict[str, Array]:
    thread = np.arange(64)
    out = np.concatenate([(rank + 1) % 4 * 1000 + thread + 4 for rank in range(4)])
    return {"out": out.astype(np.int32), "loaded": np.tile(t["in"].numpy(), 4)}


def rounds(buffers: Mapping[str, Buffer]) -> tuple[Argument, ...]:
    return buffers["in"], buffers["out"], int32("rounds", 7)


def mbarriers_expected(t: Tensors) -> dict[str, Array]:
    return {"out": np.tile(unsigned(t["in"]).reshape(7, 1, 32), (1, 3, 1))}


def approximation_call(buffers: Mapping[str, Buffer]) -> tuple[Argument, ...]:
    return buffers["in"], buffers["exp2"], buffers["log2"], int32("n", 256)


def vector_call(buffers: Mapping[str, Buffer]) -> tuple[Argument, ...]:
    return buffers["in"], buffers["out"], int32("n", 100)


def conversion_call(buffers: Mapping[str, Buffer]) -> tuple[Argument, ...]:
    return buffers["in"], buffers["out"], int32("n", len(conversions()) // 2)


PLAIN_UNITS = (
    Unit(
        "vector access",
        "vector_access",
        lambda: {"in": words(1, 400), "out": filled((2000,), torch.int32)},
        vector_access_expected,
        arguments=vector_call,
        grid=(4, 1, 1),
    ),
    Unit(
        "e4m3 to half",
        "e4m3_to_half",
        lambda: {"out": filled((65536,), torch.int32)},
        e4m3_to_half_expected,
        grid=(256, 1, 1),
        block=(256, 1, 1),
    ),
    Unit(
        "float to e4m3",
        "float_to_e4m3",
        lambda: {"in": conversions(), "out": filled((len(conversions()) // 2,), torch.int16)},
        float_to_e4m3_expected,
        arguments=conversion_call,
        grid=(8, 1, 1),
        block=(128, 1, 1),
    ),
    Unit(
        "exp2 and log2",
        "approximations",
        lambda: {
            "in": approximation_arguments(),
            "exp2": filled((256,), torch.float32),
            "log2": filled((256,), torch.float32),
        },
        approximations_expected,
        outputs=("exp2", "log2"),
        arguments=approximation_call,
        grid=(8, 1, 1),
        tolerance=2.0**-21,
    ),
    Unit(
        "addresses",
        "addresses",
        lambda: {"out": filled((129,), torch.int32)},
        addresses_expected,
        block=(64, 1, 1),
        shared_bytes=1024,
    ),
    Unit(
        "warp functions",
        "warp_functions",
        lambda: {
            "in": warp_values(),
            "out": filled((6 * 32,), torch.float32),
            "bits": filled((12 * 32,), torch.int32),
        },
        warp_expected,
        outputs=("out", "bits"),
    ),
    Unit(
        "ldmatrix and stmatrix",
        "matrix_moves",
        lambda: {"in": words(5, 128), "out": filled((32 * 25,), torch.int32)},
        matrix_expected,
    ),
    Unit(
        "named barriers",
        "named_barriers",
        lambda: {"in": words(6, 96), "out": filled((384,), torch.int32)},
        named_barriers_expected,
        block=(128, 1, 1),
    ),
    Unit(
        "setmaxnreg",
        "register_moves",
        lambda: {"out": filled((256,), torch.int32)},
        lambda t: {"out": np.arange(256, dtype=np.int32) * 3},
        block=(256, 1, 1),
    ),
    Unit(
        "block votes",
        "block_votes",
        lambda: {"in": torch.arange(96, dtype=torch.int32) % 3, "out": filled((288,), torch.int32)},
        block_votes_expected,
        block=(96, 1, 1),
    ),
    Unit(
        "mbarriers",
        "mbarriers",
        lambda: {"in": words(8, 7 * 32), "out": filled((7 * 96,), torch.int32)},
        mbarriers_expected,
        arguments=rounds,
        block=(128, 1, 1),
    ),
    Unit(
        "atomics",
        "atomics",
        atomics_tensors,
        atomics_expected,
        outputs=("integers", "words", "longs", "floats"),
        updated=("integers", "words", "longs", "floats"),
        block=(96, 1, 1),
    ),
    Unit(
        "last block",
        "last_block",
        lambda: {
            "in": words(9, 320),
            "parts": filled((5,), torch.int32),
            "count": torch.zeros(1, dtype=torch.int32),
            "out": filled((1,), torch.int32),
        },
        last_block_expected,
        outputs=("parts", "count", "out"),
        updated=("count",),
        grid=(5, 1, 1),
        block=(64, 1, 1),
    ),
    Unit(
        "dependent launch",
        "dependent",
        lambda: {"weights": words(10, 64), "in": words(11, 64), "out": filled((64,), torch.int32)},
        lambda t: {"out": unsigned(t["weights"]) + unsigned(t["in"])},
        constants=("weights",),
        block=(64, 1, 1),
        overlaps_previous=True,
    ),
    Unit(
        "cp.async",
        "thread_copies",
        lambda: {"in": words(12, 1024), "out": filled((1024,), torch.int32)},
        thread_copies_expected,
        block=(128, 1, 1),
    ),
    Unit(
        "bulk copies",
        "bulk_copies",
        lambda: {"in": words(13, 2048).view(torch.uint8), "out": filled((8192,), torch.uint8)},
        lambda t: {"out": t["in"].numpy() ^ 0x55},
        block=(128, 1, 1),
        shared_bytes=8192,
    ),
    Unit(
        "cluster",
        "cluster_functions",
        lambda: {
            "in": words(14, 128).view(torch.uint8),
            "out": filled((256,), torch.int32),
            "loaded": filled((2048,), torch.uint8),
        },
        cluster_expected,
        outputs=("out", "loaded"),
        grid=(4, 1, 1),
        block=(64, 1, 1),
        cluster=(4, 1, 1),
        shared_bytes=512,
    ),
)

ALL = (*PLAIN_UNITS, *TENSOR_UNITS, *MATRIX_UNITS)
