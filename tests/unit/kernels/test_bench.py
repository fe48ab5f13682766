from __future__ import annotations

import pytest

from kernels.bench import bench, summarise
from kernels.errors import CheckError
from kernels.op import Case, Op
from kernels.ops import select_ops


def test_samples_become_rates_and_a_share_of_the_ceiling() -> None:
    (op,) = select_ops("rmsnorm")
    case = next(case for case in op.cases if case.is_timed)
    cost = op.cost(case)
    timing = summarise(op, case, [float(sample) for sample in range(1, 12)], bytes_per_us=4.5e6)
    assert (timing.num_samples, timing.median_us, timing.p10_us, timing.p90_us) == (11, 6.0, 2.0, 10.0)
    assert timing.tb_per_s == pytest.approx(cost.bytes / 6e-6 / 1e12)
    assert timing.tflop_per_s == pytest.approx(cost.flops / 6e-6 / 1e12)
    assert timing.share_of_ceiling == pytest.approx(cost.bytes / 4.5e12 / 6e-6)
    assert summarise(op, case, [5.0] * 20, bytes_per_us=None).share_of_ceiling == 1.0
    assert "6.00 us [2.00-10.00]" in timing.line()


def test_nothing_is_timed_that_has_not_passed_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    timed: list[int] = []

    def check(op: Op, case: Case, device: object) -> None:
        checked.append(case.name)
        if op.name == "rmsnorm":
            raise CheckError("rmsnorm, NeMo decode: wrong")

    class FakeClock:
        def __init__(self, device: object) -> None:
            pass

        def samples_us(self, runs: dict[str, object]) -> dict[str, list[float]]:
            timed.append(len(runs))
            return {name: [1.0] * 20 for name in runs}

    monkeypatch.setattr("kernels.bench.check_case", check)
    monkeypatch.setattr("kernels.bench.GpuClock", FakeClock)
    monkeypatch.setattr("kernels.bench.inputs_on", lambda *_: {})
    monkeypatch.setattr("kernels.bench.captured", lambda *_: None)
    with pytest.raises(CheckError, match="rmsnorm, NeMo decode: wrong"):
        bench(select_ops("rmsnorm"), object(), lambda _: None)  # type: ignore[arg-type]
    assert (checked, timed) == (["1 GiB", "NeMo decode"], [1])
