"""Logging that never raises: a failing log must not end the thread that writes it.

The owner and the warden owe answers to others. A closed pipe or a processor that raises is
reported on stderr, as `logging` does, and otherwise ignored.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable

import structlog


def event_log(name: str) -> Callable[..., None]:
    """Return `log(level, event, **fields)` of the structlog logger `name`."""
    logger = structlog.get_logger(name)

    def log(level: str, event: str, **fields: object) -> None:
        try:
            getattr(logger, level)(event, **fields)
        except (Exception, SystemExit):  # noqa: BLE001 (whatever a processor of the host raises)
            with contextlib.suppress(Exception):
                traceback.print_exc()

    return log
