"""Configures `logging` for the process, which the library itself never does.

Log lines go to stderr, one for each event, as text or JSON, including those of other libraries
such as uvicorn. Results go to stdout and are not logs.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["console", "json"]


class _Console(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, _: str | None = None) -> str:  # noqa: N802
        return datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds")


class _JSON(_Console):
    def format(self, record: logging.LogRecord) -> str:
        members: dict[str, Any] = {
            "timestamp": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None) or record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            members["exception"] = record.exc_text
        return json.dumps(members, default=str)


class _NoLock:
    """Like a lock that is always free."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass


class _Handler(logging.StreamHandler[Any]):
    """Has no lock, as the stream writes whole lines: nobody waits for a thread that writes one."""

    def createLock(self) -> None:  # noqa: N802
        self.lock = _NoLock()  # type: ignore[assignment]  # Python 3.13 enters it unasked


def configure(level: Level, form: Format = "console") -> None:
    """Send every log line of at least this level to stderr, those of others from `warning` on."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        _JSON() if form == "json" else _Console("%(asctime)s %(levelname)-7s %(message)s")
    )
    least = logging.getLevelName(level.upper())
    logging.basicConfig(handlers=[handler], level=max(logging.WARNING, least), force=True)
    logging.getLogger("orchestrator").setLevel(least)
