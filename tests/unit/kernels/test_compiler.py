from __future__ import annotations

from pathlib import Path

import pytest

from kernels.compiler import compile_program, compiler_version, read_resources
from kernels.errors import BuildError
from kernels.program import Program
from tests.kernels.disassembly import disassemble

COPY = Path(__file__).parent / "copy.cu"


def test_kernel_is_compiled_for_hopper_and_its_resources_are_told() -> None:
    cubin = compile_program(Program(COPY, (("E", 48),)))
    assert cubin.image[:4] == b"\x7fELF"
    resources = cubin.kernels["copy"]
    assert resources.shared_bytes == 48 * 4
    assert 4 <= resources.num_registers <= 64
    assert (resources.stack_bytes, resources.spill_bytes) == (0, 0)


def test_stack_is_told(tmp_path: Path) -> None:
    source = tmp_path / "stack.cu"
    source.write_text(
        'extern "C" __global__ void stack(const int *index, int *out) {\n'
        "  int values[64];\n"
        "  for (int i = 0; i < 64; i++) values[index[i]] = i;\n"
        "  out[0] = values[index[64]];\n"
        "}\n"
    )
    assert compile_program(Program(source)).kernels["stack"].stack_bytes >= 256


def test_products_and_sums_are_contracted_only_on_demand(tmp_path: Path) -> None:
    def instructions(expression: str) -> str:
        source = tmp_path / "product.cu"
        source.write_text(f'extern "C" __global__ void product(float *x) {{ x[0] = {expression}; }}\n')
        return disassemble(compile_program(Program(source)).image)

    assert "FFMA" not in instructions("x[1] * x[2] + x[3]")
    assert "FFMA" in instructions("__fmaf_rn(x[1], x[2], x[3])")


def test_messages_of_the_compiler_are_passed_on(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void wrong() { undeclared = E; }\n')
    with pytest.raises(BuildError) as caught:
        compile_program(Program(source, (("E", 8),)))
    message = str(caught.value)
    assert message.startswith("wrong E=8 does not compile (NVRTC_ERROR_COMPILATION):\n")
    assert 'wrong.cu(1): error: identifier "undeclared" is undefined' in message


def test_source_without_a_kernel_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "empty.cu"
    source.write_text("__device__ int unused;\n")
    with pytest.raises(BuildError, match="empty: no kernel in it"):
        compile_program(Program(source))


def test_resources_of_several_kernels() -> None:
    log = "".join(
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"ptxas         .     {stack} bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        f"ptxas info    : Used 40 registers, used 1 barriers{shared}\n"
        for name, stack, shared in (("first", 16, ""), ("second", 0, ", 512 bytes smem, 400 bytes cmem[0]"))
    )
    found = read_resources(log)
    assert {name: (r.stack_bytes, r.spill_bytes, r.shared_bytes, r.num_registers) for name, r in found.items()} == {
        "first": (16, 12, 0, 40),
        "second": (0, 12, 512, 40),
    }
    with pytest.raises(BuildError, match="the compiler's log has another form than expected"):
        read_resources("ptxas info    : Compiling entry function 'f' for 'sm_90a'\nUsed a few registers\n")


def test_version_has_the_library_and_its_size() -> None:
    assert compiler_version().startswith("NVRTC 13.")
    assert int(compiler_version().split()[-1]) > 10**7
