"""The memory that is available, on machines and in containers that are folders of this test."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.server.memory import available_bytes, limits, total_and_available_bytes

V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"
UNLIMITED = 9223372036854771712  # of version 1: the largest multiple of a page
MEMINFO = "MemTotal:  16000 kB\nMemFree:  100 kB\nMemAvailable:  8000 kB\n"
FREE = 8000 * 1024
TOTAL = 16000 * 1024


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        pytest.param("0::/\n", {}, [], id="no limit"),
        pytest.param("0::/a/b\n", {f"{V2}/a/b/memory.max": "max\n"}, [], id="max"),
        pytest.param("0::/a/b\n", {f"{V2}/a/b/memory.max": "500\n"}, [500], id="own"),
        pytest.param(
            "0::/a/b/c\n",
            {
                f"{V2}/a/memory.max": "900\n",
                f"{V2}/a/b/memory.max": "300\n",
                f"{V2}/a/b/c/memory.max": "700\n",
                f"{V2}/other/memory.max": "1\n",
                f"{V2}/a/b/c/below/memory.max": "1\n",
                "sys/fs/memory.max": "1\n",
            },
            [300, 700, 900],
            id="nested",
        ),
        pytest.param(
            "0::/kubepods/pod7/x\n", {f"{V2}/memory.max": "400\n"}, [400], id="path of the host"
        ),
        pytest.param(
            "0::/../../other\n",
            {f"{V2}/memory.max": "400\n", "sys/other/memory.max": "1\n"},
            [400],
            id="outside of the namespace",
        ),
        pytest.param(
            "9:cpu,cpuacct:/x\n5:memory:/docker/x\n",
            {
                f"{V1}/docker/x/memory.limit_in_bytes": "600\n",
                f"{V1}/docker/memory.limit_in_bytes": "200\n",
                f"{V1}/memory.limit_in_bytes": f"{UNLIMITED}\n",
                f"{V1}/x/memory.limit_in_bytes": "1\n",
                "sys/fs/cgroup/cpu,cpuacct/x/memory.limit_in_bytes": "1\n",
            },
            [200, 600, UNLIMITED],
            id="version 1",
        ),
        pytest.param(
            "5:hugetlb,memory:/d:e\n",
            {f"{V1}/d:e/memory.limit_in_bytes": "600\n"},
            [600],
            id="version 1, shared hierarchy, colon in a name",
        ),
        pytest.param(
            "5:memory:/x\n0::/y\n",
            {f"{V1}/x/memory.limit_in_bytes": "600\n", f"{V2}/y/memory.max": "500\n"},
            [500, 600],
            id="both",
        ),
        pytest.param("nonsense\n5:memory\n\n::\n", {f"{V2}/memory.max": "?\n"}, [], id="nonsense"),
    ],
)
def test_limits_are_those_of_the_own_group_and_of_all_above(
    tmp_path: Path, group: str, files: dict[str, str], expected: list[int]
) -> None:

    root = machine(tmp_path, {"proc/self/cgroup": group, "proc/meminfo": MEMINFO, **files})
    assert sorted(limits(root)) == expected
    assert available_bytes(root) == min([FREE, *expected])
    assert total_and_available_bytes(root)[0] == min([TOTAL, *expected])


@pytest.mark.parametrize(
    ("group", "files"),
    [
        pytest.param(
            "0::/a/b\n",
            {
                f"{V2}/a/memory.max": "5000\n",
                f"{V2}/a/memory.current": "4500\n",
                f"{V2}/a/memory.stat": "anon 1500\nfile 3000\nkernel 10\n",
                f"{V2}/a/b/memory.max": "4000\n",
            },
            id="version 2, the group above is the fuller one",
        ),
        pytest.param(
            "5:memory:/x\n",
            {
                f"{V1}/x/memory.limit_in_bytes": "5000\n",
                f"{V1}/x/memory.usage_in_bytes": "4500\n",
                f"{V1}/x/memory.stat": "cache 1\ntotal_cache 3000\n",
            },
            id="version 1",
        ),
    ],
)
def test_what_a_group_uses_is_not_available_but_for_its_page_cache(
    tmp_path: Path, group: str, files: dict[str, str]
) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": group, "proc/meminfo": MEMINFO, **files})
    assert max(limits(root)) == 5000
    assert available_bytes(root) == 3500


def test_a_machine_that_hides_its_memory_is_judged_by_the_limit(tmp_path: Path) -> None:
    """`ProcSubset=pid` leaves no /proc/meminfo."""
    assert available_bytes(tmp_path) is None
    assert total_and_available_bytes(tmp_path) == (None, None)
    root = machine(tmp_path, {"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "500\n"})
    assert total_and_available_bytes(root) == (500, 500)


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: ? kB\n"])
def test_unreadable_memory_is_unknown(tmp_path: Path, text: str) -> None:
    assert available_bytes(machine(tmp_path, {"proc/meminfo": text})) is None


def test_this_machine_has_memory() -> None:
    assert 1 << 20 < (available_bytes() or 0) < (total_and_available_bytes()[0] or 0)
