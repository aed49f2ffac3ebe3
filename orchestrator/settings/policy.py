"""Checks of the settings of an orchestrator, as opposed to those of a load."""

from __future__ import annotations

from orchestrator.errors import InvalidRequest
from orchestrator.settings.request import MAX_SECONDS


def checked_seconds(field: str, value: object, *, zero: bool = True) -> float:
    """Return a setting in seconds, or say what is wrong with it.

    Raises:
        InvalidRequest: not a number, negative, or more than a clock can wait (field as given).
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 <= value <= MAX_SECONDS or (value == 0 and not zero):  # type: ignore[operator]
        least = "0" if zero else "more than 0"
        message = f"{field} is no time to wait: use {least} to {MAX_SECONDS:.0f} seconds"
        raise InvalidRequest.because(message, field=field)
    return float(value)  # type: ignore[arg-type]
