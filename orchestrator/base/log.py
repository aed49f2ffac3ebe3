"""Log records for the standard `logging`, which never block and never raise.

One thread of ours makes the records and hands them to `logging`, in order: levels, filters, record
factories and handlers are the host's, and may block. Loggers are children of `orchestrator`, which
has a `NullHandler`, so that a host that has not configured `logging` sees nothing.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import structlog

from orchestrator.base.background import FLUSH_S, Background

ROOT: Final = "orchestrator"
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "exception": 40}
_pairs = structlog.processors.LogfmtRenderer(bool_as_flag=False)

logging.getLogger(ROOT).addHandler(logging.NullHandler())


def event_log(name: str) -> Callable[..., None]:
    """Return `log(level, event, **fields)` of the `logging` logger `name`.

    `exception` is the level `error` with the traceback of the exception being handled. A message is
    one line, `event key=value ...`, and its record has the parts as `event` and `fields`.
    """
    return partial(_log, logging.getLogger(name))


def flush(timeout_s: float = FLUSH_S) -> bool:
    """Wait until the records so far have been handled, and return whether they have."""
    return thread.flush(timeout_s)


def _log(logger: logging.Logger, level: str, event: str, **fields: object) -> None:
    number, trace = _LEVELS[level], None
    if number < logger.getEffectiveLevel():  # takes no lock, as `isEnabledFor` may
        return
    error = sys.exc_info()[1] if level == "exception" else None
    if error is not None:  # text, because frames hold secrets; the source is read by the thread
        trace = traceback.TracebackException.from_exception(error, lookup_lines=False)
    at = {
        "created": time.time(),
        "thread": threading.get_ident(),
        "threadName": threading.current_thread().name,
    }
    thread.put(partial(_handle, logger, number, event, fields, trace, at))


def _handle(
    logger: logging.Logger,
    level: int,
    event: str,
    fields: dict[str, object],
    trace: traceback.TracebackException | None,
    at: dict[str, Any],
) -> None:
    if not logger.isEnabledFor(level):
        return
    text = f"{event} {_pairs(None, '', dict(fields))}" if fields else event
    extra = {"event": event, "fields": fields}
    record = logger.makeRecord(logger.name, level, "", 0, escaped(text), (), None, extra=extra)
    record.relativeCreated -= (record.created - at["created"]) * 1000
    record.msecs = float(int(at["created"] % 1 * 1000))
    vars(record).update(at)
    record.exc_text = "".join(trace.format()).rstrip() if trace else None
    logger.handle(record)


def escaped(text: str, *, kept: str = "") -> str:
    """Escape what is not printable, such as line ends and bytes of a name that is not UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def _report_loss(count: int) -> None:
    _log(logging.getLogger(ROOT), "warning", "log.dropped", count=count)


thread: Final = Background("llama-log", _report_loss)
