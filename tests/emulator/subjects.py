"""The kernels that test the emulator, with their references and the mistakes planted in them."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Argument, Buffer, Swizzle, TensorMap, int32
from kernels.launch import Device, Launch
from kernels.program import Program
from tests.emulator.build import Mutant
from tests.emulator.mutation import Subject
from tests.emulator.toolchain import ROOT

FOLDER = ROOT / "tests" / "emulator" / "kernels"


def buffer(name: str, tensor: torch.Tensor, access: Access) -> Buffer:
    """A buffer of whatever shape."""
    return Buffer(name, tensor, access, " ".join(map(str, tensor.shape)), tensor.dtype)


def generator(seed: int) -> torch.Generator:
    """Random numbers of one test."""
    return torch.Generator().manual_seed(seed)


# ---- reduction


def run_reduction(device: Device) -> None:
    """Three rows against FP64."""
    x = torch.rand(3, 1024, generator=generator(1)) + 0.5
    weight = torch.rand(1024, generator=generator(2)) + 0.5
    scaled, largest = torch.full_like(x, torch.nan), torch.full((3,), torch.nan)
    arguments = (
        buffer("in", x, Access.READ),
        buffer("weight", weight, Access.CONSTANT),
        buffer("scaled", scaled, Access.WRITE),
        buffer("largest", largest, Access.WRITE),
    )
    program = Program(FOLDER / "reduction.cu")
    device.launch(Launch(program, "reduction", (3, 1, 1), (256, 1, 1), arguments, overlaps_previous=True))
    product = x.double() * weight.double()
    expected = product / product.sum(dim=1, keepdim=True)
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(largest.double(), expected.amax(dim=1), rtol=1e-5, atol=0)


def in_reduction(name: str, old: str, new: str = "") -> Mutant:
    return Mutant.of(name, "reduction.cu", old, new)


REUSE = "  __syncthreads();  // part[] is read above and rewritten below\n"
REDUCTION = Subject(
    "reduction",
    run_reduction,
    (
        in_reduction("no barrier before the array is rewritten", REUSE),
        in_reduction(
            "no barrier before the sums are read", "part[warp] = sum;\n  __syncthreads();", "part[warp] = sum;"
        ),
        in_reduction(
            "no barrier before the maxima are read", "part[warp] = top;\n  __syncthreads();", "part[warp] = top;"
        ),
        in_reduction("barrier in divergent code", REUSE, "  if (t & 1) __syncthreads(); else\n  __syncthreads();\n"),
        in_reduction("barrier that one warp skips", REUSE, "  if (warp != 3) __syncthreads();\n"),
        in_reduction("shuffle that half a warp skips", "float sum = hw", "float sum = 0; if (lane < 16) sum = hw"),
        in_reduction("global write behind the end", "largest[blockIdx.x] = top", "largest[blockIdx.x + 1] = top"),
        in_reduction(
            "global read behind the end, of a value without effect",
            "  hw::st16(scaled",
            "  if (weight[t * 4 + 1 + (t == 255) * 3] == 123.f) x.x = 0;\n  hw::st16(scaled",
        ),
        in_reduction("write to an input", "  hw::st16(scaled", "  ((float*)weight)[t] = x.x;\n  hw::st16(scaled"),
        in_reduction("misaligned vector load", "(weight + t * 4)", "(weight + t * 4 - (t == 255))"),
        in_reduction("read before the dependency wait", "  hw::griddep_wait();\n  float4 x", "  float4 x"),
        in_reduction("two blocks write one row", "scaled + blockIdx.x * 1024", "scaled + blockIdx.x / 2 * 1024"),
        in_reduction("uninitialised shared read", "for (int i = 1; i < 8; i++) top", "for (int i = 1; i < 9; i++) top"),
        in_reduction(
            "output read before it is written", "  hw::st16(scaled", "  x.x += 0 * scaled[t];\n  hw::st16(scaled"
        ),
        in_reduction(
            "read-only path for memory that is written",
            "  if (t == 0) largest",
            "  hw::ld16_nc<float4>(scaled + blockIdx.x * 1024 + t * 4);\n  if (t == 0) largest",
        ),
    ),
)

# ---- gather


def run_gather(device: Device) -> None:
    """150 tokens in pages of 16, the last one part of a page."""
    length, num_pages = 150, 14
    q = torch.randn(16, 64, generator=generator(3)).bfloat16()
    pages = torch.randn(num_pages, 16, 64, generator=generator(4)).bfloat16()
    table = torch.randperm(num_pages, generator=generator(5))[: (length + 15) // 16].int()
    scores, best = torch.full((16, length), torch.nan), torch.full((16,), torch.nan)
    arguments: tuple[Argument, ...] = (
        buffer("q", q, Access.READ),
        buffer("pages", pages, Access.READ),
        buffer("table", table, Access.READ),
        buffer("scores", scores, Access.WRITE),
        buffer("best", best, Access.WRITE),
        int32("length", length),
    )
    program = Program(FOLDER / "gather.cu")
    device.launch(Launch(program, "gather", (1, 1, 1), (128, 1, 1), arguments, shared_bytes=2 * 64 * 128))
    keys = pages[table.long()].reshape(-1, 64)[:length]
    expected = q.double() @ keys.double().T
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(best, scores.amax(dim=1), rtol=0, atol=0)


def in_gather(name: str, old: str, new: str = "") -> Mutant:
    return Mutant.of(name, "gather.cu", old, new)


GATHER = Subject(
    "gather",
    run_gather,
    (
        in_gather(
            "no barrier before the buffer is overwritten",
            "    __syncthreads();  // everyone has read the tile: it may be overwritten\n",
        ),
        in_gather("no barrier after the copies", "    __syncthreads();  // the tile of every thread is there\n"),
        in_gather("copies read one group too early", "cp_async_wait<1>()", "cp_async_wait<2>()"),
        in_gather("last copies not waited for", "      cp_async_wait<0>();\n"),
        in_gather("copies not committed", "    cp_async_commit();\n"),
        in_gather(
            "ldmatrix without the swizzle",
            "rows + chunk_at(warp * 16 + (lane & 7) + (lane >> 4) * 8, k * 2 + (lane >> 3 & 1))",
            "rows + (warp * 16 + (lane & 7) + (lane >> 4) * 8) * ROW_BYTES + (k * 2 + (lane >> 3 & 1)) * 16",
        ),
        in_gather("shared read behind the end", "for (int w = 1; w < 4; w++)", "for (int w = 1; w <= 4; w++)"),
        in_gather("page table read behind its end", "position < length;", "true;"),
        in_gather("tail not masked", "if (position < length) {", "if (true) {"),
        in_gather(
            "no barrier before the warps' results are combined", "  __syncthreads();  // all warps' tops are there\n"
        ),
        in_gather("copy to a misaligned place", "chunk_at(token, chunk), from", "chunk_at(token, chunk) + 8, from"),
    ),
)

# ---- gemm

E4M3 = torch.float8_e4m3fn


def run_gemm(device: Device, m: int = 200, n: int = 192, k: int = 1104) -> None:
    """Tails in every direction: neither size is a multiple of the tile."""
    a = torch.randn(m, k, generator=generator(6)).to(E4M3)
    b = torch.randn(n, k, generator=generator(7)).to(E4M3)
    a_scale = torch.rand(m, generator=generator(8)) + 0.5
    b_scale = torch.rand(n, generator=generator(9)) + 0.5
    out = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    arguments: tuple[Argument, ...] = (
        TensorMap(buffer("a", a, Access.READ), (k, m), (k,), (128, 128), Swizzle.BYTES_128),
        TensorMap(buffer("b", b, Access.CONSTANT), (k, n), (k,), (128, 128), Swizzle.BYTES_128),
        TensorMap(buffer("out", out, Access.WRITE), (n, m), (2 * n,), (64, 64), Swizzle.BYTES_128),
        buffer("a_scale", a_scale, Access.READ),
        buffer("b_scale", b_scale, Access.CONSTANT),
        int32("rows", m),
        int32("columns", n),
        int32("depth", k),
    )
    program = Program(FOLDER / "gemm.cu")
    grid = ((n + 127) // 128, (m + 127) // 128, 1)
    shared_bytes = 3 * 32768 + 32768
    launch = Launch(program, "gemm", grid, (384, 1, 1), arguments, shared_bytes=shared_bytes, overlaps_previous=True)
    device.launch(launch)
    exact = (a.double() @ b.double().T) * a_scale.double()[:, None] * b_scale.double()
    # Sums of FP32 products, then one rounding to BF16.
    magnitude = (a.double().abs() @ b.double().abs().T) * a_scale.double()[:, None] * b_scale.double()
    bound = magnitude * k * 2.0**-24 + exact.abs() * 2.0**-8
    wrong = ~((out.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {out.numel()} values are wrong"


def in_gemm(name: str, *replacements: tuple[str, str]) -> Mutant:
    return Mutant(name, "gemm.cu", replacements)


RELEASE = (
    "      if (k && lane == 0) mbarrier_arrive(&empty[(k - 1) % STAGES]);  // this warp is done with the stage before\n"
)
EPILOGUE_BARRIER = "    if (group == 0)\n      bar_sync<1>(128);\n    else\n      bar_sync<2>(128);\n"
GEMM = Subject(
    "gemm",
    run_gemm,
    (
        in_gemm("no wait for the full stage", ("      mbarrier_wait(&full[s], phase);\n", "")),
        in_gemm("no wait for the empty stage", ("        mbarrier_wait(&empty[s], phase ^ 1);\n", "")),
        in_gemm("wrong parity of the empty stage", ("&empty[s], phase ^ 1", "&empty[s], phase")),
        in_gemm(
            "full stage tried once, not waited for",
            ("mbarrier_wait(&full[s], phase)", "mbarrier_try_wait(&full[s], phase)"),
        ),
        in_gemm(
            "stage released while wgmma reads it", ("(k - 1) % STAGES", "k % STAGES"), ("if (k && lane", "if (lane")
        ),
        in_gemm(
            "stage released by one warp for its warpgroup",
            ("(&empty[i], 8)", "(&empty[i], 2)"),
            ("if (k && lane == 0)", "if (k && (t & 127) == 0)"),
        ),
        in_gemm("stage never released", (RELEASE, "")),
        in_gemm("accumulators read before the last wait", ("    wgmma_wait<0>();\n", "")),
        in_gemm("no wgmma_fence", ("      wgmma_fence();\n", "")),
        in_gemm("no wgmma_commit", ("      wgmma_commit();\n", "")),
        in_gemm("no proxy fence before the store", ("    fence_proxy_async();\n", "")),
        in_gemm(
            "proxy fence by the storing thread only",
            ("    fence_proxy_async();\n", "    if ((t & 127) == 0) fence_proxy_async();\n"),
        ),
        in_gemm(
            "proxy fence after the barrier",
            ("    fence_proxy_async();\n", ""),
            (EPILOGUE_BARRIER, EPILOGUE_BARRIER + "    fence_proxy_async();\n"),
        ),
        in_gemm("no barrier before the store", (EPILOGUE_BARRIER, "")),
        in_gemm("store not waited for", ("      bulk_wait<0>();\n", "")),
        in_gemm("store not committed", ("      bulk_commit();\n", "")),
        in_gemm(
            "epilogue with another swizzle",
            ("half + swizzle128(row * 128 + (c & 63) * 2)", "half + (row * 128 + (c & 63) * 2)"),
        ),
        in_gemm("descriptor without the swizzle", ("group * 64 * 128, 128, 1024)", "group * 64 * 128, 0, 1024)")),
        in_gemm("too many bytes expected", ("&full[s], STAGE_BYTES", "&full[s], STAGE_BYTES + 128")),
        in_gemm("too few bytes expected", ("&full[s], STAGE_BYTES", "&full[s], A_BYTES")),
        in_gemm(
            "no barrier after the barriers' initialisation",
            ("  __syncthreads();  // the barriers are initialised\n", ""),
        ),
        in_gemm("no fence after the barriers' initialisation", ("    fence_mbarrier_init();\n", "")),
        in_gemm(
            "shared memory aligned to 128 bytes only", ("SHARED_DYNAMIC(memory, 1024)", "SHARED_DYNAMIC(memory, 128)")
        ),
        in_gemm("step along K of 64 instead of 32 bytes", ("da + j * 2", "da + j * 4")),
        in_gemm(
            "rows of the accumulator exchanged",
            ("d[j * 4 + 2] * s1 * b0, d[j * 4 + 3] * s1", "d[j * 4 + 3] * s1 * b0, d[j * 4 + 2] * s1"),
        ),
        in_gemm("loads before the dependency wait", ("  griddep_wait();\n", "")),
        in_gemm(
            "loads of stages swapped", ("&a, &full[s], k * TILE_K, m0", "&a, &full[(s + 1) % STAGES], k * TILE_K, m0")
        ),
        in_gemm(
            "half a warp sits out wgmma_wait", ("      wgmma_wait<1>();\n", "      if (lane < 16) wgmma_wait<1>();\n")
        ),
        in_gemm("too small a count of arrivals", ("(&empty[i], 8)", "(&empty[i], 7)")),
        in_gemm(
            "store behind the tensor's columns",
            ("if (n0 + h * 64 < columns) tma", "tma"),
            ("n0 + h * 64, m0", "n0 + h * 64 - columns / 2 * h, m0"),
        ),
        in_gemm("scales read behind their end", ("n < columns ? b_scale", "n < columns + 2 ? b_scale")),
    ),
)

SUBJECTS = (REDUCTION, GATHER, GEMM)
