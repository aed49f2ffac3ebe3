"""The soak test of `tests.kit.process.soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.process.soak import ANSWERS, soak

MIB = 1 << 20


@pytest.mark.parametrize(
    ("operations", "most_traced", "most_resident"),
    [
        pytest.param(500, 3 * MIB, 48 * MIB, id="500"),
        pytest.param(
            5_000,
            3 * MIB,
            48 * MIB,
            id="5000",
            marks=[pytest.mark.deep, pytest.mark.timeout(1800)],
        ),
    ],
)
def test_random_operations_with_faults_never_run_two_servers_and_leak_nothing(
    tmp_path: Path, operations: int, most_traced: int, most_resident: int
) -> None:
    """What is retained on purpose (256 outcomes, 2,000 lines, the last events) is bounded, so a run
    ten times as long may grow by no more than a short one.
    """
    report = soak(tmp_path, operations, warm_up=max(100, operations // 5))
    print(report)
    assert report.two_alive == 0
    assert report.overlaps == 0
    assert report.left == 0
    assert report.answers.keys() <= ANSWERS, report.answers
    assert report.answers.total() >= operations
    assert report.sabotages > operations / 250
    assert report.starts > operations / 20
    warm, cold = report.warm, report.cold
    assert cold.descriptors <= warm.descriptors
    assert cold.threads <= warm.threads
    assert cold.children <= warm.children
    assert cold.files <= warm.files
    assert cold.traced_bytes - warm.traced_bytes < most_traced
    assert cold.resident_bytes - warm.resident_bytes < most_resident
