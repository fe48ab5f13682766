"""python -m tests.kernels check [operation]: the checks of `python -m kernels`, on the emulator instead of a GPU."""

from __future__ import annotations

import sys

from kernels.__main__ import main
from tests.emulator.device import EmulatedDevice

if __name__ == "__main__":
    sys.exit(main(make_device=EmulatedDevice, only_emulated=True))
