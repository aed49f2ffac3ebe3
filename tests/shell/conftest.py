"""Of every test of the shell: nothing fails behind its back, and no thread outlives it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kit.shell.facade import House
from tests.kit.shell.records import Entry, only_failures


@pytest.fixture(autouse=True)
def failures() -> Iterator[list[Entry]]:
    """What was logged as an error; a test that provokes one takes it out."""
    with only_failures() as entries:
        yield entries
        assert entries == []


@pytest.fixture
def house(failures: list[Entry]) -> Iterator[House]:
    """The orchestrators it makes have everything under their owner replaced."""
    house = House()
    yield house
    assert house.os.most_alive <= 1, "two servers were alive at once"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for callers."""
    with ThreadPoolExecutor(32, thread_name_prefix="caller") as pool:
        yield pool
