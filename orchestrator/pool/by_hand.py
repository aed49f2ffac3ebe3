"""What a caller may say with a load of one model by hand: all else is in the catalogue."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, Self, TypedDict

from orchestrator.settings.checks import unknown_field
from orchestrator.settings.fields import SETTINGS

_REMEMBERED_S: Final = 60.0
_MOST: Final = 256


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
    """Fields of a load request, in normal form; see docs/settings.md.

    Attributes:
        stall_timeout_s: None if it is not given: then that of the catalogue counts.
    """

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
        made = {name: SETTINGS[name].normal(name, value) for name, value in made.items()}
        if given.get("stall_timeout_s") is None:
            made["stall_timeout_s"] = None
        return cls(**made)


class EarlyCancels:
    """Cancels by `load_request_id` that came before their load, and the ids that have been seen.

    A key is the name of a model, and the id.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of the two
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._cancelled: OrderedDict[tuple[str, str], float] = OrderedDict()

    def arrives(self, key: tuple[str, str], now: float) -> bool:
        """A load has this id: return whether its cancel came first. Monotonic seconds."""
        with self._guard:
            self._seen[key] = None
            _trim(self._seen)
            at = self._cancelled.get(key)
        return at is not None and now - at <= _REMEMBERED_S

    def remember(self, key: tuple[str, str], now: float) -> None:
        """There is nothing to cancel: a load of an unknown id may come later."""
        with self._guard:
            if key not in self._seen:
                self._cancelled[key] = now
                _trim(self._cancelled)


def _trim(kept: OrderedDict[tuple[str, str], Any]) -> None:
    while len(kept) > _MOST:
        kept.popitem(last=False)
