"""Checks of the values that only a catalogue has; `settings/checks.py` has the others.

Sizes are whole MiB, rounded up. A size without a unit is refused: it may be meant as bytes or GiB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from orchestrator.errors import InvalidRequest
from orchestrator.settings import checks

AUTO: Final = "auto"
NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
SIZE: Final = r"([0-9]{1,12}(?:\.[0-9]{1,12})?) *([KMGTkmgt][Ii]?[Bb])"
URL: Final = r"https?://[A-Za-z0-9._:\[\]-]+(?:/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?"
"""Without what a URL may have before `@` and after `?`: a password or a key."""

Memory = int | Mapping[str, int]
"""MiB of the first device, or MiB by device."""

_EXPONENTS: Final = {"k": 1, "m": 2, "g": 3, "t": 4}
_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]*)?")

mapping: Final = checks.of_type("a table", Mapping)
_number: Final = checks.of_type("a number", int, float)


def mib_of(field: str, value: object) -> int:
    """Return a size such as "1.5 GiB" or "512 MB" in MiB, rounded up."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = "" if is_number else str(checks.string(field, value)).strip()
    if found := re.fullmatch(SIZE, text):
        base = 1024 if "i" in found[2].lower() else 1000
        unit_bytes: int = base ** _EXPONENTS[found[2][0].lower()]
        return math.ceil(Fraction(found[1]) * unit_bytes / (1 << 20))
    if is_number or _NUMBER.fullmatch(text):
        message = f'{field} has no unit: write the unit, e.g. "12 GiB"'
        raise InvalidRequest.because(message, field=field)
    raise checks.invalid(field, text, 'a size, e.g. "12 GiB"')


def need(field: str, value: object) -> Memory:
    """A size, or a table of sizes by device."""
    if not isinstance(value, Mapping):
        return mib_of(field, value)
    if not value:
        raise InvalidRequest.because(f"{field} is empty: name a device in it", field=field)
    sizes: dict[str, int] = {}
    for device, size in value.items():
        name = checks.line(field, device)
        if name is None or name in sizes:
            raise InvalidRequest.because(f"{field} has a device without a name", field=field)
        if not name.isprintable():
            message = f"{field} has {name[:40]!a}: the name of a device must be printable"
            raise InvalidRequest.because(message, field=field)
        sizes[name] = mib_of(f"{field}.{name[:64]}", size)
    return MappingProxyType(sizes)


def budget(field: str, value: object) -> Memory | Literal["auto"]:
    """The same, or "auto"."""
    return AUTO if value == AUTO else need(field, value)


def seconds_or_zero(field: str, value: object) -> float:
    return checks.checked_seconds(field, checks.number_of_seconds(field, value))


def weight(field: str, value: object) -> float:
    number = _number(field, value)
    try:
        if 0 < (found := float(number)) < math.inf:  # false for NaN
            return found
    except OverflowError:
        pass
    raise checks.invalid(field, value, "a number above 0")


def name(field: str, value: object) -> str:
    """The name of an entry, a preset or a key."""
    text: str = checks.string(field, value)
    if not re.fullmatch(NAME, text):
        shown = ascii(text[:40])
        message = f"{shown} is not a name: use 1 to 64 of A-Z a-z 0-9 . _ - after a letter or digit"
        raise InvalidRequest.because(message, field=field)
    return text


def names(field: str, value: object) -> tuple[str, ...]:
    """A list of printable names."""
    if not isinstance(value, list | tuple):
        raise checks.malformed(field, "a list of strings", value)
    for one in value:
        if not isinstance(one, str):
            raise checks.malformed(field, "a list of strings", one)
        if not (one.strip() and one.isprintable()):
            message = f"{field} has {one[:40]!a}: a name must be printable, and not blank"
            raise InvalidRequest.because(message, field=field)
    return tuple(value)


def some_names(field: str, value: object) -> tuple[str, ...]:
    """A list of names that is not empty: nobody would expect that to mean all."""
    if found := names(field, value):
        return found
    message = f"{field} is empty: name models, or leave it out for all of them"
    raise InvalidRequest.because(message, field=field)


def file(field: str, value: object) -> str:
    if (found := checks.path(field, value)) is None:
        raise InvalidRequest.because(f"{field} is empty: give a file", field=field)
    return found


def base_url(field: str, value: object) -> str:
    """The address of an OpenAI-compatible server, without a slash at its end."""
    url = (checks.line(field, value) or "").rstrip("/")
    try:
        is_usable = re.fullmatch(URL, url) is not None and urlsplit(url).port != 0
    except ValueError:  # a port or a bracket that is none
        is_usable = False
    if not is_usable:
        # the value is not shown: it may have a password
        message = (
            f"{field} must be like http://127.0.0.1:9000/v1, without user, password and query: "
            "a key belongs into api_key_file"
        )
        raise InvalidRequest.because(message, field=field)
    return url


def by_device(memory: Any) -> Mapping[str, int]:
    """Return MiB by device; "" is the first device, which only the machine knows."""
    if isinstance(memory, Mapping):
        return memory
    return {} if memory in {None, AUTO} else {"": memory}
