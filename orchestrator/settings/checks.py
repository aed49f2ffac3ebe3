"""What the values of settings may be: each check returns the normal form of a value, or refuses it.

A check takes the name of the field and the value, whatever JSON or Python can hold. Blank text is
None. Pure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final

from orchestrator.errors import InvalidRequest, MalformedRequest
from orchestrator.settings import flags

Check = Callable[[str, Any], Any]

MAX_SECONDS: Final = 30 * 24 * 3600.0
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def malformed(field: str, wanted: str, value: object) -> MalformedRequest:
    """Return the refusal of a value for its type."""
    kind = type(value).__name__
    return MalformedRequest.because(f"{field} must be {wanted}, not {kind}", field=field)


def text(field: str, value: object) -> str | None:
    """Stripped; blank means None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise malformed(field, "a string", value)
    if not flags.is_encodable(value):
        raise InvalidRequest.because(f"{field} is not valid Unicode text", field=field)
    return value.strip() or None


def line(field: str, value: object) -> str | None:
    """Text without control characters."""
    found = text(field, value)
    if found is not None and flags.holds_control(found):
        raise InvalidRequest.because(f"{field} holds a control character", field=field)
    return found


def path(field: str, value: object) -> str | None:
    """A line, or a path object."""
    return line(field, os.fspath(value) if isinstance(value, os.PathLike) else value)


def model_path(field: str, value: object) -> str:
    if value is None:
        raise malformed(field, "a string", value)
    if (found := path(field, value)) is None:
        raise InvalidRequest.because(
            f"{field} is empty: give a .gguf file, a folder with one, or a Hub repo id", field=field
        )
    return found


def template(field: str, value: object) -> str | None:
    """Kept exactly as written, because white space means something in a template."""
    return None if text(field, value) is None else str(value)


def boolean(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise malformed(field, "true or false", value)
    return value


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""

    def check(field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise malformed(field, "a whole number", value)
        if not low <= value <= high:
            shown = _number(value)
            raise InvalidRequest.because(f"{field} is {shown}: use {low} to {high}", field=field)
        return value

    return check


def seconds(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise malformed(field, "a number of seconds", value)
    if not 0 < value <= MAX_SECONDS:  # false for NaN too, and safe for a huge int
        raise InvalidRequest.because(
            f"{field} is {_number(value)}: use more than 0 to {MAX_SECONDS:.0f} seconds",
            field=field,
        )
    return float(value)


def one_of(*choices: str) -> Check:
    """One of these words, exactly as it is."""

    def check(field: str, value: object) -> str:
        if not isinstance(value, str):
            raise malformed(field, "a string", value)
        if value not in choices:
            raise InvalidRequest.because(
                f"{field} is {value[:40]!r}: use one of {', '.join(choices)}", field=field
            )
        return value

    return check


def word_of(*choices: str) -> Check:
    """One of these words, whatever its case and padding."""
    exact = one_of(*choices)

    def check(field: str, value: object) -> str | None:
        word = line(field, value)
        return None if word is None else str(exact(field, word.lower()))

    return check


def optional(check: Check) -> Check:
    """As `check`; None stays None."""
    return lambda field, value: None if value is None else check(field, value)


def request_id(field: str, value: object) -> str | None:
    found = text(field, value)
    if found is not None and not _REQUEST_ID.fullmatch(found):
        raise InvalidRequest.because(
            f"{field} must be 1 to 128 of A-Z a-z 0-9 . _ : - and start with a letter or a digit",
            field=field,
        )
    return found


def checked_seconds(field: str, value: object, *, zero: bool = True) -> float:
    """Return a setting of an orchestrator in seconds, or say what is wrong with it.

    Raises:
        InvalidRequest: not a number, negative, or more than a clock can wait (field as given).
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MAX_SECONDS
        or (value == 0 and not zero)
    ):
        least = "0" if zero else "more than 0"
        message = f"{field} is no time to wait: use {least} to {MAX_SECONDS:.0f} seconds"
        raise InvalidRequest.because(message, field=field)
    return float(value)


def printable(name: str) -> str:
    """What an error can carry: text that any answer can hold, of a bounded length."""
    return name[:64].encode(errors="backslashreplace").decode()


def _number(value: float) -> str:
    """A number as an error shows it; Python refuses to write out one of more than 4300 digits."""
    return "out of range" if abs(value) > 1e18 else str(value)
