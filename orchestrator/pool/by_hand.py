"""What a caller may say with a load of one model by hand: all else is in the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypedDict

from orchestrator.settings.checks import unknown_field
from orchestrator.settings.fields import SETTINGS


class HandFields(TypedDict, total=False):
    """The fields of `ByHand` by name, for type checkers and editors."""

    force_reload: bool
    on_busy: Literal["supersede", "queue", "reject"]
    load_request_id: str | None
    prefetch: bool
    stall_timeout_s: float | None
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class ByHand:
    """Fields of a load request, in normal form; see docs/settings.md."""

    force_reload: bool
    on_busy: Literal["supersede", "queue", "reject"]
    load_request_id: str | None
    prefetch: bool
    stall_timeout_s: float | None
    deadline_s: float | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Check what a caller has given.

        Raises:
            MalformedRequest: a field is unknown, or has the wrong type.
            InvalidRequest: a value is not usable.
        """
        names = tuple(one.name for one in fields(cls))
        for name in given:
            if name not in names:
                raise unknown_field(name, names)
        made = {name: given.get(name, SETTINGS[name].default) for name in names}
        return cls(**{name: SETTINGS[name].normal(name, value) for name, value in made.items()})
