"""The `model` in the answers of another server, which has names of its own."""

from __future__ import annotations

import json
from typing import Any, Final

import aiohttp

from orchestrator.http.pool.members import Json
from orchestrator.http.upstream import Rewrites

_MAX_LINE: Final = 8 << 20
_PREFIX: Final = b"data:"


class Events:
    """A stream of server-sent events whose data are JSON; each line goes on when it is whole."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._left = b""
        self._is_long = False  # the present line, which passes as it is

    def feed(self, data: bytes) -> bytes:
        *lines, self._left = (self._left + data).split(b"\n")
        made = [self._line(line) + b"\n" for line in lines]
        if len(self._left) > _MAX_LINE:
            self._is_long = True
            made.append(self._left)
            self._left = b""
        return b"".join(made)

    def finish(self) -> bytes:
        return self._line(self._left)

    def _line(self, line: bytes) -> bytes:
        if self._is_long:
            self._is_long = False
            return line
        if not line.startswith(_PREFIX) or b'"model"' not in line:
            return line
        try:
            members = json.loads(line[len(_PREFIX) :])
        except (ValueError, RecursionError):
            return line
        if not isinstance(members, dict):
            return line
        for one in (members, members.get("response"), members.get("message")):
            self._rename(one)
        return _PREFIX + b" " + json.dumps(members, separators=(",", ":")).encode()

    def _rename(self, members: Any) -> None:
        if isinstance(members, dict) and isinstance(members.get("model"), str):
            members["model"] = self._model


def renames_in(response: aiohttp.ClientResponse, model: str) -> Rewrites | None:
    """Return what gives an answer this `model`; None for an answer that has none."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None
    match response.content_type:
        case "application/json":
            return Json(model)
        case "text/event-stream":
            return Events(model)
    return None
