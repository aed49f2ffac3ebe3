"""docs/assurance.md has one row for every fault, with the tests that inject it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAULTS = (
    "exit at once",
    "hang before bind",
    "503 for ever",
    "crash while Healthy",
    "TERM ignored",
    "stopped child",
    "grandchild holding port and pipes",
    "killed by the kernel",
    "pipe flood",
    "port stolen",
    "foreign server answering",
    "disk full: download",
    "disk full: log and record",
    "disk full, file gone or damaged: activity",
    "keys withdrawn, changed or unreadable",
    "truncated, corrupt or replaced model",
    "clock stepped",
    "parent ended, in each state",
    "fork of the parent",
    "event loop closed under us",
    "thread ended under us",
    "two processes, one slot",
    "slot record corrupt, foreign, stale or of a reused pid",
    "10,000 open files in the parent",
    "no descriptor left",
    "memory limit",
    "/proc unreadable",
    "PATH without anything",
    "locale and non-UTF-8 output",
    "paths with spaces, quotes, newlines and Unicode",
)


def rows() -> dict[str, list[str]]:
    """Return the cells of the table by fault: injection, expected, seen."""
    page = (ROOT / "docs/assurance.md").read_text()
    [table] = re.findall(r"^\| fault \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert all(len(cells) == 4 for cells in found), [c for c in found if len(c) != 4]
    return {fault: rest for fault, *rest in found}


def test_every_fault_has_a_row_and_every_row_is_a_fault() -> None:
    assert sorted(rows()) == sorted(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_row_has_an_injection_an_expectation_and_a_test(fault: str) -> None:
    """`test_every_test_a_page_names_exists` checks that these tests exist."""
    injection, expected, seen = rows()[fault]
    assert injection
    assert expected
    assert re.findall(r"`(test_\w+)`", seen)
