"""Captured log entries, a log writer that never returns, and the outcomes of loads.

The library leaves the configuration of `logging` to its host, and here the host is a test.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.base import log
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.owner import Owner

PATIENCE_S = 20.0
Entry = dict[str, Any]


class _Capture(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.entries: list[Entry] = []

    def emit(self, record: Any) -> None:
        entry = {"event": record.event, "level": record.levelname.lower(), **record.fields}
        self.entries.append(entry | ({"exception": record.exc_text} if record.exc_text else {}))


class HeldUpError(BaseException):
    """A thread of the library has called a log handler, which might never return."""


class _Stuck(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.is_over = threading.Event()

    def handle(self, record: logging.LogRecord) -> bool:
        """Take no lock: who comes while the log's own thread is stuck shall fail, not wait."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if threading.current_thread().name != "llama-log":
            raise HeldUpError(record.getMessage())
        self.is_over.wait()


@contextmanager
def _only(handler: logging.Handler, level: int) -> Iterator[None]:
    """Have one handler for what the library logs."""
    logger = logging.getLogger(log.ROOT)
    assert log.flush(PATIENCE_S)
    handlers, level_before, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level_before)


def _until_handled() -> None:
    """Wait as `flush` does, which gives up at once after a wait in vain."""
    thread = log.thread
    with thread._changed:
        is_done = thread._changed.wait_for(lambda: thread._done == thread._put, PATIENCE_S)
    assert is_done, "the log is held up"


_captures: list[_Capture] = []


@contextmanager
def captured(level: int = logging.DEBUG) -> Iterator[list[Entry]]:
    """Capture what is logged; the list is complete after `log.flush`, and after the block."""
    capture = _Capture(level)
    _captures.append(capture)
    try:
        with _only(capture, level):
            try:
                yield capture.entries
            finally:
                assert log.flush(PATIENCE_S)
    finally:
        _captures.pop()


def only_failures() -> Any:
    """Capture what is logged as an error; the rest is dropped cheaply."""
    return captured(logging.ERROR)


def logged() -> list[Entry]:
    """Return what the innermost block has captured so far."""
    log.flush(PATIENCE_S)
    return _captures[-1].entries


@contextmanager
def stuck() -> Iterator[None]:
    """A log handler that does not return before the end of the block.

    Raises:
        HeldUpError: in a thread that called it and is not the log's own.
    """
    handler = _Stuck()
    with _only(handler, logging.DEBUG):
        log.event_log(log.ROOT)("debug", "log.stuck")
        log.flush(0)  # the next flush does not wait
        try:
            yield
        finally:
            handler.is_over.set()
            _until_handled()


def outcomes(owner: Owner) -> dict[Generation, LoadOutcome | Problem]:
    """Return the outcomes of the loads that have ended, oldest generation first."""
    ended = sorted(owner.snapshot.history, key=lambda load: load.generation)
    return {load.generation: load.outcome for load in ended if load.outcome is not None}
