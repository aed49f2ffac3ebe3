"""What was logged, kept instead of printed, and what became of loads: evidence, not noise.

The library only ever asks structlog for a logger; how it is configured is the host's business, and
here the host is a test.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NoReturn

import structlog

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Loaded
from orchestrator.runtime.owner import Owner

Entry = MutableMapping[str, Any]

_entries: list[Entry] = []


def _keep(_: object, method: str, entry: Entry) -> NoReturn:
    entry["level"] = method
    _entries.append(entry)
    raise structlog.DropEvent


@contextmanager
def only_failures() -> Iterator[list[Entry]]:
    """Keep what is logged as an error; everything below that costs next to nothing."""
    before, outside = structlog.get_config(), list(_entries)
    _entries.clear()
    structlog.configure(
        processors=[structlog.processors.format_exc_info, _keep],
        wrapper_class=structlog.make_filtering_bound_logger("error"),
    )
    try:
        yield _entries
    finally:
        structlog.configure(**before)
        _entries[:] = outside


def logged() -> list[Entry]:
    return _entries


def outcomes(owner: Owner) -> dict[Generation, Loaded | Problem]:
    """What became of the loads that have ended, oldest generation first."""
    return {g: record.answer for g, record in sorted(owner.history.records.items())}
