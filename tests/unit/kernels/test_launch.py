from __future__ import annotations

from typing import Any

import pytest

from kernels.launch import Launch, Program
from tests.unit.kernels.fake_device import FakeDevice


def make_launch(**changes: Any) -> Launch:
    settings: dict[str, Any] = {"grid": (8, 1, 1), "block": (128, 1, 1), "arguments": (), **changes}
    return Launch(Program.of("op", E=8), "kernel", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (0, 1, 1)}, "kernel: grid.x is 0, expected 1 to 2147483647"),
        ({"grid": (1, 65536, 1)}, "kernel: grid.y is 65536, expected 1 to 65535"),
        ({"block": (1, 1, 65)}, "kernel: block.z is 65, expected 1 to 64"),
        ({"block": (1024, 2, 1)}, r"kernel: block \(1024, 2, 1\) has 2048 members, expected at most 1024"),
        ({"cluster": (4, 4, 1)}, r"kernel: cluster \(4, 4, 1\) has 16 members, expected at most 8"),
        ({"cluster": (3, 1, 1)}, r"kernel: grid \(8, 1, 1\) is no multiple of cluster \(3, 1, 1\)"),
        ({"shared_bytes": 232_449}, "kernel: shared_bytes is 232449, expected 0 to 232448"),
    ],
)
def test_impossible_launches_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_launch(**changes)


def test_largest_launch_is_allowed() -> None:
    make_launch(grid=(8, 65535, 65535), block=(512, 2, 1), cluster=(8, 1, 1), shared_bytes=232_448)


def test_programs_are_equal_by_content() -> None:
    assert Program.of("op", E=8, ADD=1) == Program.of("op", ADD=1, E=8)
    assert Program.of("op", E=8) != Program.of("op", E=16)
    assert Program.of("op").source.parent.name == "kernels"


def test_recorded_graph_replays_its_launches_in_order() -> None:
    device = FakeDevice()
    launches = [make_launch(grid=(size, 1, 1)) for size in (1, 2)]

    def record() -> None:
        for launch in launches:
            device.launch(launch)

    graph = device.capture(record)
    assert device.launches == []
    graph.replay()
    graph.replay()
    assert device.launches == launches * 2
