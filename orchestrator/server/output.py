"""The server's output: a bounded ring of its last lines, and the addresses it announces.

The thread that drains the pipe feeds raw bytes in; lines may have any length and hold any bytes.
A line is cleaned when it is first read, once for all readers: terminal control sequences and
secrets never leave this module.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from orchestrator.base.redaction import redact
from orchestrator.server.json_log import Figure, JsonLog

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
# C0 except tab, C1, and the Unicode characters that reorder text, hide it or break a line.
_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
# What readiness asks for; servers that log their requests log ours too.
_PROBE_PATH: Final = re.compile(rb"/(?:health|props|slots)\b")
_LISTENING: Final = re.compile(r"listening on (http://[\w.:\[\]-]+:\d{1,5})(?!\d)")


class _Line:
    """A line of output: raw until somebody reads it."""

    __slots__ = ("_text",)

    def __init__(self, raw: bytes) -> None:
        self._text: bytes | str = raw

    def __str__(self) -> str:
        text = self._text
        if isinstance(text, bytes):  # two readers at once get the same
            text = self._text = _clean(text)
        return text


class OutputRing:
    """The last lines of one server.

    Attributes:
        unprompted_bytes: Bytes of output, except lines that name a path which our probes request.
        announced: The last addresses it printed, oldest first. They are not confirmed: it
            also prints metadata of the model.
    """

    def __init__(self, notify: Callable[[], None] = lambda: None) -> None:
        self.unprompted_bytes: int = 0
        self.lines_seen: int = 0
        self.announced: tuple[str, ...] = ()
        self._notify = notify
        self._log = JsonLog()
        self._lines: deque[_Line] = deque(maxlen=MAX_LINES)
        self._partial = b""
        self._guard = threading.Lock()

    def feed(self, data: bytes) -> None:
        """Add what was read from the pipe."""
        *whole, partial = (self._partial + data).split(b"\n")
        about_probes = sum(len(line) + 1 for line in whole if _PROBE_PATH.search(line))
        self.unprompted_bytes += len(data) - about_probes
        self._partial = partial[:MAX_LINE_BYTES]
        lines = [text for line in whole for text in self._log.lines(line[:MAX_LINE_BYTES])]
        self._add(lines)
        for line in lines:
            found = _LISTENING.search(_clean(line)) if b"listening on" in line else None
            if found is not None and found[1] not in self.announced:
                self.announced = (*self.announced, found[1])[-_MAX_ANNOUNCED:]
        self._notify()

    def close(self) -> None:
        """Add an unfinished line: the pipe has ended."""
        partial, self._partial = self._partial, b""
        lines = self._log.lines(partial) if partial else []
        self._add([*lines, *filter(None, [self._log.rest()])])

    def _add(self, lines: list[bytes]) -> None:
        with self._guard:
            self.lines_seen += len(lines)
            self._lines.extend(_Line(line[:MAX_LINE_BYTES]) for line in lines[-MAX_LINES:])

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What the server has printed of its memory, in order."""
        return self._log.figures

    def tail(self, count: int = TAIL_LINES) -> tuple[str, ...]:
        """Return the last lines, oldest first."""
        with self._guard:
            lines = tuple(self._lines)[max(0, len(self._lines) - count) :]
        return tuple(map(str, lines))

    def since(self, seen: int) -> tuple[int, tuple[str, ...]]:
        """Return how many lines there were, and the retained ones after the first `seen`."""
        with self._guard:
            total, lines = self.lines_seen, tuple(self._lines)
        new = min(max(0, total - seen), len(lines))
        return total, tuple(map(str, lines[len(lines) - new :]))


def _clean(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return redact(_CONTROL.sub("", _ESCAPES.sub("", text)).rstrip())
