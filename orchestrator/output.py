"""What the server prints: a bounded ring of its last lines, and the address it announces.

Fed with raw bytes by the one thread that drains the pipe; a line of any length and any bytes is
taken. Terminal control sequences and secrets never leave this module.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from orchestrator.redaction import redact

MAX_LINES: Final = 2000
MAX_LINE_BYTES: Final = 8192
TAIL_LINES: Final = 40

_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LISTENING: Final = re.compile(r"listening on (http://[\w.:\[\]-]+:\d+)")


class OutputRing:
    """The last lines of one server."""

    def __init__(self, notify: Callable[[], None] = lambda: None) -> None:
        self.bytes_seen = 0
        self.base_url: str | None = None
        self._notify = notify
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._partial = b""
        self._guard = threading.Lock()

    def feed(self, data: bytes) -> None:
        """Take what was read from the pipe."""
        self.bytes_seen += len(data)
        *whole, partial = (self._partial + data).split(b"\n")
        with self._guard:
            for line in whole[-MAX_LINES:]:
                self._lines.append(_clean(line))
        self._partial = partial[:MAX_LINE_BYTES]
        if self.base_url is None:
            self._look_for_address(whole)
        self._notify()

    def close(self) -> None:
        """The pipe has ended: an unfinished line is a line."""
        if self._partial:
            with self._guard:
                self._lines.append(_clean(self._partial))
            self._partial = b""

    def tail(self, count: int = TAIL_LINES) -> tuple[str, ...]:
        """Return the last lines, oldest first."""
        with self._guard:
            return tuple(self._lines)[-count:]

    def _look_for_address(self, lines: list[bytes]) -> None:
        for line in lines:
            if b"listening on" in line and (found := _LISTENING.search(_clean(line))):
                self.base_url = found.group(1)
                return


def _clean(line: bytes) -> str:
    text = line[:MAX_LINE_BYTES].decode("utf-8", "replace")
    return redact(_CONTROL.sub("", _ESCAPES.sub("", text)).rstrip())
