"""Checks of setting values: each returns the normal form of a value or raises.

A check takes the name of the field and any value that JSON or Python can hold. It returns None for
blank text, which means the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, Final

from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.settings import flags

Check = Callable[[str, Any], Any]

MAX_SECONDS: Final = 30 * 24 * 3600.0
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def malformed(field: str, expected: str, value: object) -> MalformedRequest:
    """Return the error for a value of the wrong type."""
    kind = type(value).__name__
    return MalformedRequest.because(f"{field} must be {expected}, not {kind}", field=field)


def invalid(field: str, value: object, expected: str) -> InvalidRequest:
    """Return the error for a value that cannot be used."""
    if isinstance(value, str):
        shown = repr(value[:40])
    elif isinstance(value, int) and abs(value) >= 10**18:  # str() raises above 4300 digits
        shown = "a number of more than 18 digits"
    else:
        shown = str(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
    return InvalidRequest.because(f"{field} is {shown}: it must be {expected}", field=field)


def of_type(expected: str, *types: type) -> Check:
    """Return a check of the type; a bool is no number."""

    def check(field: str, value: object) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise malformed(field, expected, value)
        return value

    return check


string: Final = of_type("a string", str)
boolean: Final = of_type("true or false", bool)
integer: Final = of_type("an integer", int)
number_of_seconds: Final = of_type("a number of seconds", int, float)


def text(field: str, value: object) -> str | None:
    """Text, stripped."""
    stripped = string(field, value).strip()
    if not flags.is_encodable(stripped):
        raise InvalidRequest.because(f"{field} is not valid Unicode text", field=field)
    return stripped or None


def line(field: str, value: object) -> str | None:
    """Text without control characters."""
    found = text(field, value)
    if found is not None and flags.has_control_character(found):
        raise InvalidRequest.because(f"{field} contains a control character", field=field)
    return found


def word(field: str, value: object) -> str | None:
    """A line in lower case."""
    found = line(field, value)
    return found and found.lower()


def path(field: str, value: object) -> str | None:
    """A line or an `os.PathLike`."""
    return line(field, os.fspath(value) if isinstance(value, os.PathLike) else value)


def model_path(field: str, value: object) -> str:
    if (found := path(field, value)) is None:
        raise InvalidRequest.because(
            f"{field} is empty: give a .gguf file, a folder with one, or a Hub repo id", field=field
        )
    return found


def template(field: str, value: object) -> str | None:
    """Text exactly as written: white space matters in a template."""
    return string(field, value) if text(field, value) else None


def seconds(field: str, value: object) -> float:
    return checked_seconds(field, number_of_seconds(field, value), zero=False)


def request_id(field: str, value: object) -> str | None:
    found = text(field, value)
    if found is not None and not _REQUEST_ID.fullmatch(found):
        raise InvalidRequest.because(
            f"{field} must be 1 to 128 of A-Z a-z 0-9 . _ : - and start with a letter or a digit",
            field=field,
        )
    return found


def checked_seconds(field: str, value: Any, *, zero: bool = True) -> float:
    """Return an option of an orchestrator in seconds.

    Raises:
        InvalidRequest: not a number, negative, more than 30 days, or 0 where `zero` is false.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (0 < value <= MAX_SECONDS or (zero and value == 0)):  # false for NaN
        return float(value)
    least = "at least 0" if zero else "more than 0"
    raise invalid(field, value, f"{least} and at most {MAX_SECONDS:.0f} seconds")


def unknown_field(name: str, known: Iterable[str]) -> MalformedRequest:
    """Return the error of a field that does not exist; it names the nearest one, if one is near."""
    shown, known = printable(name), sorted(known)
    if near := get_close_matches(shown, known, n=1, cutoff=0.75):
        message = f"unknown field {shown!r}: did you mean {near[0]}?"
    else:
        message = f"unknown field {shown!r}; known fields: {', '.join(known)}"
    return MalformedRequest.because(message, field=shown)


def printable(name: str) -> str:
    """Return a name that any answer can carry: encodable, and of bounded length."""
    return name[:64].encode(errors="backslashreplace").decode()
