"""Fixtures: a test of the shell fails if the library logs an error that it does not expect."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kit.shell.harness import Harness
from tests.kit.shell.records import Entry, only_failures


@pytest.fixture(autouse=True)
def failures() -> Iterator[list[Entry]]:
    """The errors that were logged; a test that provokes one removes it."""
    with only_failures() as entries:
        yield entries
    assert entries == []


@pytest.fixture
def harness(failures: list[Entry]) -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.release_all_look_ups()  # a thread that waits any longer would fail in another test
    assert harness.os.most_alive <= 1, "two servers were alive at once"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for callers."""
    with ThreadPoolExecutor(32, thread_name_prefix="caller") as pool:
        yield pool
