"""Logging that stops nobody: a log that cannot be written must not end the thread that writes it.

The owner and the warden carry promises to others (an answer, an exit that must be known); a closed
pipe or a processor that raises is the host's affair, and is told on stderr if there is one.
"""

from __future__ import annotations

import contextlib
import traceback
from typing import Any


def say(log: Any, level: str, event: str, **fields: object) -> None:
    """Log `event` to a structlog logger, whatever becomes of it."""
    try:
        getattr(log, level)(event, **fields)
    except (Exception, SystemExit):  # noqa: BLE001 (as `logging`: complain on stderr, if any)
        with contextlib.suppress(Exception):
            traceback.print_exc()
