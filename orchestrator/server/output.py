"""What the server prints: a bounded ring of its last lines, and the address it announces.

Fed with raw bytes by the one thread that drains the pipe; a line of any length and any bytes is
taken as it is. Lines are cleaned when they are read, which is rare: terminal control sequences and
secrets never leave this module.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from orchestrator.base.redaction import redact

MAX_LINES: Final = 2000
MAX_LINE_BYTES: Final = 8192
TAIL_LINES: Final = 200  # a debugger's backtrace, or a chat template, may follow the reason
_MAX_ANNOUNCED: Final = 16

# ECMA-48: control sequences, strings up to their terminator, and everything else after an ESC.
_ESCAPES: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*+[ -/]*+[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])(?:[^\x07\x1b\x9c]*+(?:\x07|\x1b\\|\x9c))?"
    r"|\x1b[ -/]*+[0-~]"
)
# C0 but the tab, C1, and what reorders, hides or breaks a line in Unicode's own way.
_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
_LISTENING: Final = re.compile(r"listening on (http://[\w.:\[\]-]+:\d{1,5})(?!\d)")


class OutputRing:
    """The last lines of one server."""

    def __init__(self, notify: Callable[[], None] = lambda: None) -> None:
        self.bytes_seen: int = 0
        self.lines_seen: int = 0
        self.announced: tuple[str, ...] = ()
        self._notify = notify
        self._lines: deque[bytes] = deque(maxlen=MAX_LINES)  # cleaned when somebody asks
        self._partial = b""
        self._guard = threading.Lock()

    def feed(self, data: bytes) -> None:
        """Take what was read from the pipe."""
        self.bytes_seen += len(data)
        *whole, partial = (self._partial + data).split(b"\n")
        with self._guard:
            self.lines_seen += len(whole)
            self._lines.extend(line[:MAX_LINE_BYTES] for line in whole[-MAX_LINES:])
        self._partial = partial[:MAX_LINE_BYTES]
        if any(b"listening on" in line for line in whole):
            self._look_for_addresses(whole)
        self._notify()

    @property
    def base_url(self) -> str | None:
        """The last address that was announced."""
        return self.announced[-1] if self.announced else None

    def close(self) -> None:
        """The pipe has ended: an unfinished line is a line."""
        if self._partial:
            with self._guard:
                self.lines_seen += 1
                self._lines.append(self._partial)
            self._partial = b""

    def tail(self, count: int = TAIL_LINES) -> tuple[str, ...]:
        """Return the last lines, oldest first."""
        with self._guard:
            lines = tuple(self._lines)[max(0, len(self._lines) - count) :]
        return tuple(map(_clean, lines))

    def since(self, seen: int) -> tuple[int, tuple[str, ...]]:
        """Return how many lines there were, and those after the first `seen`, as far as kept."""
        with self._guard:
            total, kept = self.lines_seen, tuple(self._lines)
        new = min(max(0, total - seen), len(kept))
        return total, tuple(map(_clean, kept[len(kept) - new :]))

    def _look_for_addresses(self, lines: list[bytes]) -> None:
        """Anything may be printed, also what a model's file says: these are claims, not facts."""
        for line in lines:
            found = _LISTENING.search(_clean(line)) if b"listening on" in line else None
            if found is not None and found[1] not in self.announced:
                self.announced = (*self.announced, found[1])[-_MAX_ANNOUNCED:]


def _clean(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return redact(_CONTROL.sub("", _ESCAPES.sub("", text)).rstrip())
