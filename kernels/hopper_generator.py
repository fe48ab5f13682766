"""Writes the two generated headers beside `hopper.cuh`: `python -m kernels.hopper_generator`.

`tensor_copies.cuh` (TMA, 2 to 5 dimensions) and `wgmma.cuh` (warpgroup matrix multiply) hold instructions whose operand
lists are too long to type. A test compares the files with what this module writes.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent

# N of m64nNkK: the token side of skinny GEMMs (8 to 128), large GEMM tiles (128 to 256), attention tiles (64, 128).
WGMMA_N = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)

NOTICE = "// Written by kernels/hopper_generator.py: change that, not this."


def tensor_copies() -> str:
    """The text of tensor_copies.cuh, which hopper.cuh includes inside its namespace."""
    parts = [
        NOTICE,
        "",
        "// ---- TMA: a box of a tensor, described by a tensor map, between global and shared memory ----",
        "//",
        "// x counts elements along the innermost dimension. What a load asks for outside the tensor is zero and counts in",
        "// bytes; a store there writes nothing. _hint takes an L2 policy, _multicast a mask of the cluster's blocks.",
        "",
    ]
    for rank in (2, 3, 4, 5):
        parts += [_load(rank, ""), _load(rank, "hint"), _load(rank, "multicast"), _store(rank)]
    return "\n".join(parts)


def _coordinates(rank: int) -> list[str]:
    return ["x", "y", "z", "w", "v"][:rank]


def _load(rank: int, form: str) -> str:
    names = _coordinates(rank)
    parameters = ", ".join(f"int {name}" for name in names)
    places = ", ".join(f"%{3 + i}" for i in range(rank))
    operands = ", ".join(f'"r"({name})' for name in names)
    qualifier, place, operand, parameter, mask = {
        "": ("", "", "", "", "0"),
        "hint": (".L2::cache_hint", f", %{3 + rank}", ', "l"(policy)', ", u64 policy", "0"),
        "multicast": (".multicast::cluster", f", %{3 + rank}", ', "h"(mask)', ", u16 mask", "mask"),
    }[form]
    suffix = f"_{form}" if form else ""
    return f"""\
HW void tma_load_{rank}d{suffix}(void* dst, const TensorMap* map, Barrier* b, {parameters}{parameter} HW_AT) {{
  HW_EITHER(asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes{qualifier} "
                         "[%0], [%1, {{{places}}}], [%2]{place};"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), {operands}{operand} : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates({", ".join(names)}), {rank}, {mask}, at));
}}"""


def _store(rank: int) -> str:
    names = _coordinates(rank)
    parameters = ", ".join(f"int {name}" for name in names)
    places = ", ".join(f"%{2 + i}" for i in range(rank))
    operands = ", ".join(f'"r"({name})' for name in names)
    return f"""\
HW void tma_store_{rank}d(const TensorMap* map, const void* src, {parameters} HW_AT) {{
  HW_EITHER(asm volatile("cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%0, {{{places}}}], [%1];"
                         ::"l"(map), "r"(shared_address(src)), {operands} : "memory"),
            emu::tma_store(map, src, emu::Coordinates({", ".join(names)}), {rank}, at));
}}
"""


WGMMA_HEAD = f"""\
{NOTICE}
//
// Warpgroup matrix multiply: d[64 x WIDTH] (+)= a[64 x K] . b[K x WIDTH], asynchronous, by a whole warpgroup.
//
//   wgmma_fence();                    // before the first wgmma that uses registers touched since the last wait
//   wgmma_...<WIDTH>(d, a, b, accumulate) // any number; accumulate = 0: d = a . b
//   wgmma_commit();
//   wgmma_wait<0>();                  // d may be read, and shared memory reused by this warp's part, only now
//
// Thread t of the warpgroup holds, in d[4 j + i], row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2), column 8 j + 2 (t % 4) + i % 2.
// Operands in shared memory are named by descriptors (wgmma_descriptor); a from registers (_ra) is laid out as for mma.
#pragma once
#include "hopper.cuh"

namespace hw {{

HW void wgmma_fence(HW_AT_ALONE) {{
  HW_EITHER(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"), emu::wgmma_fence(at));
}}
HW void wgmma_commit(HW_AT_ALONE) {{
  HW_EITHER(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"), emu::wgmma_commit(at));
}}
template <int NUM_GROUPS>
HW void wgmma_wait(HW_AT_ALONE) {{
  HW_EITHER(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NUM_GROUPS) : "memory"), emu::wgmma_wait(NUM_GROUPS, at));
}}

// A descriptor of an operand tile that starts at `tile`; swizzle is 128, 64, 32 or 0 bytes, the tile aligned to 8 rows of it.
// K-major (the K elements of a row adjacent, rows `swizzle` bytes apart): stride_bytes leads to the next 8 rows (8 * swizzle
// when dense), leading_bytes is used without a swizzle only. MN-major (16-bit types, _TRANS): leading_bytes leads to the next
// swizzle span of M or N, stride_bytes to the next 8 of K. A step along K inside the span adds its bytes / 16.
HW u64 wgmma_descriptor(const void* tile, u32 swizzle, u32 stride_bytes, u32 leading_bytes = 16 HW_AT) {{
  const u64 mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  const u32 address = shared_address(tile HW_PASS_AT);
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(stride_bytes >> 4) << 32 | mode << 62;
}}

"""


def _wgmma_asm(name: str, k: int, n: int, registers: bool, transposes: int) -> str:
    count = n // 2
    places = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if registers:
        a = f"{{{', '.join(f'%{count + i}' for i in range(4))}}}"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        following = count + 4
    else:
        a, inputs, following = f"%{count}", '"l"(a)', count + 1
    b, predicate = f"%{following}", f"%{following + 1}"
    inputs += ', "l"(b), "r"(accumulate)'
    flags = ""
    for i, flag in enumerate(("TRANS_A", "TRANS_B")[2 - transposes :]):
        flags += f", %{following + 2 + i}"
        inputs += f', "n"({flag})'
    return (
        f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, {predicate}, 0;\\n"\n'
        f'                 "wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{name}.{name} "\n'
        f'                 "{{{places}}}, {a}, {b}, p, 1, 1{flags}; }}"\n'
        f"                 : {outputs} : {inputs});"
    )


def _wgmma(name: str, k: int, registers: bool) -> str:
    flags = [] if name == "e4m3" else ["TRANS_B"] if registers else ["TRANS_A", "TRANS_B"]
    template = "".join(f", int {flag} = 0" for flag in flags)
    a = "const u32 (&a)[4]" if registers else "u64 a"
    chain = "\n".join(
        f"  {'' if n == WGMMA_N[0] else 'else '}if constexpr (WIDTH == {n})\n    {_wgmma_asm(name, k, n, registers, len(flags))}"
        for n in WGMMA_N
    )
    emulated = ", ".join(
        ["d", "WIDTH", f"emu::Element::{name}", "a", "b", "accumulate"]
        + [flag if flag in flags else "0" for flag in (("TRANS_B",) if registers else ("TRANS_A", "TRANS_B"))]
        + ["at"]
    )
    accepted = " || ".join(f"WIDTH == {n}" for n in WGMMA_N)
    return f"""\
template <int WIDTH{template}>
HW void wgmma_m64k{k}_{name}{"_ra" if registers else ""}(float (&d)[WIDTH / 2], {a}, u64 b, int accumulate HW_AT) {{
  static_assert({accepted});
#ifdef __CUDACC__
{chain}
#else
  emu::wgmma{"_ra" if registers else ""}({emulated});
#endif
}}
"""


def wgmma() -> str:
    """The text of wgmma.cuh."""
    forms = [
        _wgmma(name, k, registers)
        for name, k in (("e4m3", 32), ("bf16", 16), ("f16", 16))
        for registers in (False, True)
    ]
    return WGMMA_HEAD + "\n".join(forms) + "\n}  // namespace hw\n"


def main() -> None:
    """Write both headers."""
    (HERE / "tensor_copies.cuh").write_text(tensor_copies())
    (HERE / "wgmma.cuh").write_text(wgmma())


if __name__ == "__main__":
    main()
