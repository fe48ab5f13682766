"""Attention to 131,072 tokens finds keys at both ends; and what finds them would notice that it reads other places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.decode_attention import OP
from tests.emulator.build import Mutant
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.kernels.far_probes import Probes, check_decode, launched

_POOL_PAGES = 2**32 // (8 * 64 * 128) + 4
_IN_32_BITS = Mutant.of("offsets of pages in 32 bits", "kv_layout.cuh", "((long long)page *", "((int)page *")


def test_the_first_and_the_last_of_131_072_keys_are_found() -> None:
    probes = Probes.make(131_072, 4, 1, is_fp8=True)
    check_decode(EmulatedDevice(PLAIN[0]), probes, [(0, 131_072), (len(probes.positions) - 1, 131_072)])


def test_a_page_table_with_two_pages_exchanged_is_noticed() -> None:
    probes = Probes.make(300, 4, 1, is_fp8=False)
    check_decode(EmulatedDevice(PLAIN[0]), probes, [(0, 64)])
    order = torch.arange(probes.page_table.shape[1])
    order[[0, 2]] = order[[2, 0]]
    wrong = replace(probes, page_table=probes.page_table[:, order].contiguous())
    with pytest.raises(AssertionError, match="the key at 0 of 64 has weights"):
        check_decode(EmulatedDevice(PLAIN[0]), wrong, [(0, 64)])


@pytest.mark.parametrize("mutant", [None, _IN_32_BITS], ids=["as it is", "32 bits"])
def test_pages_behind_4_gigabytes_need_offsets_of_64_bits(mutant: Mutant | None) -> None:
    device = EmulatedDevice(PLAIN[0], mutant)
    probes = Probes.make(250, 32, 8, is_fp8=True)
    page_ids = torch.tensor([_POOL_PAGES - 1, 0, _POOL_PAGES - 2, 1])
    far = probes.moved(_POOL_PAGES, page_ids, torch.device("cpu"))
    near_out, far_out = (launched(OP, its.decode_inputs([(1, 250)]), device) for its in (probes, far))
    assert torch.equal(near_out, far_out) == (mutant is None)
