"""The requests that the remote facades send, and what the answers to them mean."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, TypeVar
from urllib.parse import quote

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.runtime.answers import LoadOutcome, PastLoad
from orchestrator.runtime.events import Event
from orchestrator.runtime.service import Json, Lines, Service

_T = TypeVar("_T")
_Ended = LoadOutcome | Problem | None
_QUICK_S: Final = 10.0
_WAIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ask(Generic[_T]):
    """A request, and what its answer means."""

    method: str
    path: str
    parse: Callable[[Json], _T]
    body: Json | None = None
    timeout_s: float | None = None


def quick(path: str, parse: Callable[[Json], _T]) -> Ask[_T]:
    """Return a query that a service answers in milliseconds."""
    return Ask("GET", path, parse, timeout_s=_QUICK_S)


def load_state(generation: int, wait_s: float = 0.0) -> Ask[_Ended]:
    path = f"/loads/{quote(str(generation))}?wait_s={wait_s:.3f}"
    return Ask("GET", path, _outcome, timeout_s=wait_s + _QUICK_S)


def waits(generation: int, timeout_s: float | None) -> Iterator[Ask[_Ended]]:
    """Yield the requests that wait for a load, one after the other."""
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    left_s = _WAIT_S
    while left_s > 0:
        left_s = _WAIT_S if ends is None else min(_WAIT_S, max(0.0, ends - time.monotonic()))
        yield load_state(generation, left_s)


def _outcome(answer: Json) -> LoadOutcome | Problem | None:
    if (found := answer.get("outcome")) is None:
        return None
    return Problem.from_dict(found) if "category" in found else LoadOutcome.from_dict(found)


def generation_in(answer: Json) -> Generation:
    return Generation(int(answer["generation"]))


def past_loads(answer: Json) -> list[PastLoad]:
    return [PastLoad.from_dict(one) for one in answer["loads"]]


def strings_in(name: str) -> Callable[[Json], tuple[str, ...]]:
    def strings(answer: Json) -> tuple[str, ...]:
        if not all(isinstance(one, str) for one in answer[name]):
            raise TypeError
        return tuple(answer[name])

    return strings


def events_of(
    service: Service, lines: Lines, *, has_progress: bool
) -> Generator[Event, None, None]:
    """Yield the events of a stream of server-sent events."""
    members: dict[str, str] = {}
    with contextlib.closing(lines):
        for line in lines:
            name, _, value = line.partition(": ")
            if line:
                members[name] = value
            elif "data" in members:
                event = service.understood(partial(_event, members), members["data"])
                members = {}
                if has_progress or event.kind != "progress":
                    yield event


def _event(members: Mapping[str, str], data: Json) -> Event:
    return Event.from_dict({**data, "id": int(members["id"]), "kind": members["event"]})
