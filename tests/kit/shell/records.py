"""Captured log entries, and the outcomes of loads.

The library leaves the configuration of structlog to its host, and here the host is a test.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NoReturn

import structlog

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.owner import Owner

Entry = MutableMapping[str, Any]

_entries: list[Entry] = []


def _keep(_: object, method: str, entry: Entry) -> NoReturn:
    entry["level"] = method
    _entries.append(entry)
    raise structlog.DropEvent


@contextmanager
def only_failures() -> Iterator[list[Entry]]:
    """Capture what is logged as an error, and drop the rest cheaply."""
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


def outcomes(owner: Owner) -> dict[Generation, LoadOutcome | Problem]:
    """Return the outcomes of the loads that have ended, oldest generation first."""
    ended = sorted(owner.snapshot.history, key=lambda load: load.generation)
    return {load.generation: load.outcome for load in ended if load.outcome is not None}
