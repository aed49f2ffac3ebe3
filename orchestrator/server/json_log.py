"""llama-server's log as JSON, one object a line: its messages, and its memory figures.

A message becomes the text that the server would print without `--log-jsonl`. Figures are printed
by the fitting of unset arguments, before a weight is read; `runtime/sizes.py` knows their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from orchestrator.settings.memory import HOST, total

_LETTERS: Final = {"debug": "D", "info": "I", "warn": "W", "error": "E"}
_EVENT: Final = b'{"type":"'
_MESSAGE: Final = ',"msg":"'
_WHOLE: Final = re.compile(r'(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')
_LATEST_US: Final = 1 << 62
_MOST_MIB: Final = 1 << 40
_LONGEST: Final = 8192  # of a message that has not ended


class Figure(NamedTuple):
    """What the server would take, as it has printed it; `model_mib` of it is weights."""

    devices: dict[str, int]
    model_mib: int


class JsonLog:
    """Turns lines of output into lines of text.

    Attributes:
        figures: What the server has printed of its memory, in order.
    """

    def __init__(self) -> None:
        self.figures: tuple[Figure, ...] = ()
        self._partial = ""

    def lines(self, raw: bytes) -> list[bytes]:
        """Return the lines of text that a line of output ends; one that is no event is itself."""
        if not raw.startswith(_EVENT):
            return [raw]
        match event := _event(raw):
            case {"type": "log", "msg": str(message)}:
                *whole, partial = (self._partial + _prefix(event) + message).split("\n")
                self._partial = partial[:_LONGEST]
                return [line.encode("utf-8", "replace") for line in whole]
            case {"type": "fit_memory_breakdown", "data": {"unit": "MiB", "rows": [*rows]}}:
                if (figure := _figure(rows)) is not None:
                    self.figures += (figure,)
                    shown = ", ".join(f"{name} {mib}" for name, mib in figure.devices.items())
                    return [f"memory, MiB: {shown}".encode("utf-8", "replace")]
        return [raw]

    def rest(self) -> bytes:
        """Return what is left of a message without an end: the output has ended."""
        rest, self._partial = self._partial, ""
        return rest.encode("utf-8", "replace")


def _event(raw: bytes) -> Any:
    text = raw.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # such as one that was cut to the longest line
        head, _, message = text.partition(_MESSAGE)
        whole = _WHOLE.match(message)
        try:
            event = json.loads(head + "}")
            return event | {"msg": json.loads(f'"{whole[0]}"') + "\n"} if whole else None
        except (ValueError, TypeError, RecursionError):
            return None


def _prefix(event: Mapping[str, Any]) -> str:
    """Return what the server would print before a message, where it has a level."""
    letter, at_us = _LETTERS.get(str(event.get("level"))), event.get("time")
    if letter is None or not isinstance(at_us, int) or not 0 <= at_us < _LATEST_US:
        return ""
    seconds, us = divmod(at_us, 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}.{seconds:02}.{us // 1000:03}.{us % 1000:03} {letter} "


def _figure(rows: list[Any]) -> Figure | None:
    """Return the sums of a breakdown; host memory has several rows, one for each kind of it."""
    sums: dict[str, int] = {}
    model_mib = 0
    for row in rows:
        match row:
            case {"kind": str(kind), "name": str(name), "self": int(mib), "model": int(model)} if (
                0 <= mib < _MOST_MIB
            ):
                device = name if kind == "device" else HOST
                sums[device] = sums.get(device, 0) + mib
                model_mib += model
            case _:
                return None
    return Figure(total(sums), model_mib)
