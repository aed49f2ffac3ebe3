"""The `model` of a request as it arrives: found, replaced, and members that it leaves out added.

JSON is scanned, not parsed: a body may have hundreds of MB, of which only the outermost members
matter, and it is passed on as it comes. What is no JSON object goes through unchanged, and the
server says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Any, Final, Protocol

from orchestrator.errors import MalformedRequest

_OUTERMOST: Final = re.compile(rb'["{}\[\],:]')
_NESTED: Final = re.compile(rb'["{}\[\]]')
_IN_A_TEXT: Final = re.compile(rb'(?:[^"\\]+|\\.)*', re.DOTALL)  # up to its end, or half an escape
_MAX_TEXT: Final = 4096  # of the name of a member, or of a model
_MAX_HEAD: Final = 16 << 10  # of one part of a form


class Members(Protocol):
    """A body, fed piece by piece.

    Attributes:
        model: What it names; None before that is known, and if it names none.
        is_over: Nothing that follows can name one.
    """

    model: str | None
    is_over: bool

    def feed(self, data: bytes) -> bytes:
        """Take the next piece, and return what is to be passed on by now."""
        ...

    def finish(self) -> bytes:
        """Return what is left to be passed on at the end."""
        ...


class Json:
    """A JSON object.

    Args:
        model: What replaces its `model`, or is added; None changes nothing.
        added: Members that it gets at its end unless it has them; None: it gets no `model` either.
    """

    def __init__(self, model: str | None = None, added: Mapping[str, Any] | None = None) -> None:
        self.model: str | None = None
        self._replacement = None if model is None else _json(model)
        wanted = {} if model is None or added is None else {**added, "model": model}
        self._missing = {name: _json(value) for name, value in wanted.items()}
        self._depth = 0
        self._is_in_text = False
        self._is_escaped = False
        self.is_over: bool = False
        self._has_members = False
        self._is_value = False  # after the colon of an outermost member
        self._name: bytearray | None = None  # of an outermost member, while it is read
        self._key = ""
        self._held: bytearray | None = None  # the value of `model`, until it is whole

    def feed(self, data: bytes) -> bytes:
        made, at = bytearray(), 0
        while at < len(data) and not self.is_over:
            if self._is_escaped:
                self._is_escaped = False
                made += self._text(data[at : at + 1])
                at += 1
                continue
            end = self._next(data, at)
            made += self._text(data[at:end])
            if end < len(data):
                made += self._mark(data[end : end + 1])
            at = end + 1
        return bytes(made + data[at:])

    def finish(self) -> bytes:
        return bytes(self._held or b"")

    def _next(self, data: bytes, at: int) -> int:
        """Return where the next mark is, or the end of the data."""
        if self._is_in_text:
            inside = _IN_A_TEXT.match(data, at)
            return at if inside is None else inside.end()
        found = (_OUTERMOST if self._depth <= 1 else _NESTED).search(data, at)
        return len(data) if found is None else found.start()

    def _text(self, text: bytes) -> bytes:
        """Take what is between two marks."""
        if self._held is not None:
            self._held += text
            if len(self._held) > _MAX_TEXT:
                raise _not_a_name()
            return b""
        if self._name is not None:
            self._name += text[: _MAX_TEXT - len(self._name)]
        if not self._depth and text.strip():
            self.is_over = True  # no object
        return text

    def _mark(self, mark: bytes) -> bytes:
        """Take a byte of the structure, and return what is passed on."""
        if self._is_in_text:
            return self._in_text(mark)
        if self._held is not None and self._depth == 1 and mark in b",}":
            return self._whole_value() + self._mark(mark)
        if mark in b"{}[]":
            return self._bracket(mark)
        if not self._depth:
            self.is_over = True  # no object
        elif mark == b'"':
            self._is_in_text = True
            if self._depth == 1 and not self._is_value:
                self._name, self._has_members = bytearray(), True
        elif self._depth == 1:
            self._is_value = mark == b":"
            if self._is_value and self._key == "model":
                self._held = bytearray()
                return mark
        return mark if self._held is None else self._text(mark)

    def _bracket(self, mark: bytes) -> bytes:
        if mark in b"{[":
            self.is_over = not self._depth and mark == b"["
            self._depth += 1
            return mark if self._held is None else self._text(mark)
        self._depth -= 1
        self.is_over = self._depth <= 0
        if self._depth == 0:
            return self._rest() + mark
        return self._text(mark)

    def _in_text(self, mark: bytes) -> bytes:
        if mark == b"\\":
            self._is_escaped = True
            return self._text(mark)
        self._is_in_text = False
        if self._name is not None:
            self._key, self._name = _decoded(bytes(self._name)), None
            if self._key != "model":
                self._missing.pop(self._key, None)
            return mark
        return self._text(mark)

    def _whole_value(self) -> bytes:
        """Return what goes in the place of the value of `model`."""
        text, self._held = bytes(self._held or b""), None
        try:
            value = json.loads(text)
        except ValueError:
            return text  # the server will say so
        if not isinstance(value, str | None):
            raise _not_a_name()
        self.model = self.model or (value or "").strip() or None
        self._missing.pop("model", None)
        return text if self._replacement is None else b" " + self._replacement

    def _rest(self) -> bytes:
        added = [_json(name) + b":" + value for name, value in self._missing.items()]
        if not added:
            return b""
        return b"," * self._has_members + b",".join(added)


class Form:
    """A form of several parts (RFC 7578).

    Args:
        boundary: Of its parts.
        model: What replaces the part `model`, or is added; None changes nothing.
        added: Fields that it gets at its end unless it has them; None: no `model` either.
    """

    def __init__(
        self, boundary: str, model: str | None = None, added: Mapping[str, Any] | None = None
    ) -> None:
        self.model: str | None = None
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._replacement = model
        self._missing = {} if model is None or added is None else {**added, "model": model}
        self._left = b"\r\n"  # the first delimiter has none before it
        self._is_first = True
        self._is_head = False  # of a part
        self.is_over: bool = False
        self._held: bytearray | None = None  # the value of `model`

    def feed(self, data: bytes) -> bytes:
        self._left += data
        made = bytearray()
        while (piece := self._piece()) is not None:
            made += piece
        return self._without_first(bytes(made))

    def finish(self) -> bytes:
        left, self._left = bytes(self._held or b"") + self._left, b""
        return self._without_first(left)

    def _without_first(self, made: bytes) -> bytes:
        if self._is_first and made:
            self._is_first = False
            return made.removeprefix(b"\r\n")
        return made

    def _piece(self) -> bytes | None:
        """Return the next piece to be passed on; None if more must come first."""
        if self.is_over:
            return self._take(len(self._left)) or None
        if self._is_head:
            return self._head()
        at = self._left.find(self._delimiter)
        if at < 0:
            most = len(self._left) - len(self._delimiter) + 1
            return self._value(self._take(most)) if most > 0 else None
        after = at + len(self._delimiter)
        if len(self._left) < after + 2:
            return None
        value = self._value(self._take(at)) + self._whole_value()
        if self._left[len(self._delimiter) :].startswith(b"--"):
            self.is_over = True
            return value + b"".join(self._rest())
        self._is_head = True
        return value

    def _take(self, count: int) -> bytes:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def _head(self) -> bytes | None:
        end = self._left.find(b"\r\n\r\n", len(self._delimiter))
        if end < 0:
            if len(self._left) > _MAX_HEAD:
                raise MalformedRequest.because("a part of the form has no end of its head")
            return None
        head = self._take(end + 4)
        self._is_head = False
        name = _name_of_part(head[len(self._delimiter) :])
        if name == "model":
            self._held = bytearray()
        else:
            self._missing.pop(name, None)
        return head

    def _value(self, data: bytes) -> bytes:
        if self._held is None:
            return data
        self._held += data
        if len(self._held) > _MAX_TEXT:
            raise _not_a_name()
        return b""

    def _whole_value(self) -> bytes:
        if self._held is None:
            return b""
        text, self._held = bytes(self._held), None
        self.model = self.model or text.decode("utf-8", "replace").strip() or None
        self._missing.pop("model", None)
        return text if self._replacement is None else self._replacement.encode()

    def _rest(self) -> Iterator[bytes]:
        for name, value in self._missing.items():
            text = value if isinstance(value, str) else json.dumps(value)
            quoted = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
            head = f'\r\nContent-Disposition: form-data; name="{quoted}"\r\n\r\n'
            yield self._delimiter + head.encode() + text.encode()


def members_of(
    content_type: str, model: str | None = None, added: Mapping[str, Any] | None = None
) -> Members:
    """Return what scans a body of this type; see `Json` for the arguments."""
    if content_type.partition("/")[0].strip().lower() == "multipart":
        parsed = Message()
        parsed["Content-Type"] = content_type
        boundary = parsed.get_param("boundary")
        if isinstance(boundary, str) and boundary:
            return Form(boundary, model, added)
    return Json(model, added)


def _name_of_part(head: bytes) -> str:
    for line in head.split(b"\r\n"):
        key, _, value = line.decode("utf-8", "replace").partition(":")
        if key.strip().lower() == "content-disposition":
            parsed = Message()
            parsed["Content-Disposition"] = value.strip()
            found = parsed.get_param("name", header="content-disposition")
            return found if isinstance(found, str) else ""
    return ""


def _decoded(text: bytes) -> str:
    with contextlib.suppress(ValueError):
        return str(json.loads(b'"%b"' % text))
    return ""


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _not_a_name() -> MalformedRequest:
    return MalformedRequest.because("model must be the name of a model", field="model")
