"""Requests, tokens and memory over the last hour, in steps of some seconds, for plots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from orchestrator.base.record import Record
from orchestrator.http.activity.store import Served

STEP_S: Final = 5.0
_MOST: Final = 720
_Whose = tuple[str | None, str | None]
OfWhom = Callable[[str | None, str | None], bool]
"""Whether requests for a model, with a key, are meant."""


class Moment(NamedTuple):
    """One model now. `memory_mib` is what it holds, None if that is not known."""

    in_flight: int
    waiting: int
    memory_mib: int | None


@dataclass(frozen=True, slots=True)
class Point(Record):
    """One step.

    Attributes:
        at: Its begin, Unix seconds.
        requests: Those that have ended.
        tokens_per_s: Of all answers together, as they came.
        prompt_tokens_per_s: Of prompts, without what was cached.
        first_byte_s: Mean time to the first byte of the requests that have ended; None without one.
        in_flight: Requests at servers at the end of the step; so for the rest.
        waiting: Requests that wait for a model.
        memory_mib: What models hold, by the budget of a pool, or by the server's own figure.
        free_mib: What is free on the host.
    """

    at: float
    requests: int
    tokens_per_s: float
    prompt_tokens_per_s: float
    first_byte_s: float | None
    in_flight: int
    waiting: int
    memory_mib: int | None
    free_mib: int | None


@dataclass(frozen=True, slots=True)
class Usage(Record):
    """The last minutes, oldest step first; the last one is not over yet."""

    step_s: float
    points: list[Point]


@dataclass(slots=True)
class _Count:
    requests: int = 0
    prompt: float = 0.0
    completion: float = 0.0
    first_byte_s: float = 0.0
    first_bytes: int = 0


@dataclass(slots=True)
class _Step:
    number: int
    counts: dict[_Whose, _Count] = field(default_factory=dict)
    moments: Mapping[str, Moment] = field(default_factory=dict)
    free_mib: int | None = None

    def count(self, whose: _Whose) -> _Count:
        return self.counts.setdefault(whose, _Count())


class Meter:
    """Counts as requests go on.

    Args:
        clock: Returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps: deque[_Step] = deque(maxlen=_MOST)

    def tokens(self, whose: _Whose, count: int) -> None:
        """Count tokens of an answer that is on its way."""
        self._now().count(whose).completion += count

    def ended(self, served: Served, counted: int) -> None:
        """Count a request that has ended.

        Args:
            counted: How many of its tokens have been counted on their way.
        """
        count = self._now().count((served.model, served.key))
        count.requests += 1
        count.prompt += max(0, (served.prompt_tokens or 0) - (served.cached_tokens or 0))
        if served.first_byte_s is not None:
            count.first_byte_s += served.first_byte_s
            count.first_bytes += 1
        if served.completion_tokens is None:
            return
        rest = served.completion_tokens - counted
        if counted:
            count.completion += rest
        else:
            took_s = served.completion_tokens / served.tokens_per_s if served.tokens_per_s else 0.0
            self._spread((served.model, served.key), rest, took_s)

    def sample(self, moments: Mapping[str, Moment], free_mib: int | None) -> None:
        """Note what is now."""
        step = self._now()
        step.moments, step.free_mib = moments, free_mib

    def usage(self, of_whom: OfWhom, of_model: Callable[[str], bool], minutes: float) -> Usage:
        """Return the last minutes of the requests and the models that are meant."""
        self._now()
        first = self._number() - int(minutes * 60 / STEP_S)
        points = [_point(step, of_whom, of_model) for step in self._steps if step.number > first]
        return Usage(STEP_S, points)

    def _spread(self, whose: _Whose, tokens: int, took_s: float) -> None:
        """Count the tokens of an answer that came as a whole over the time that they took."""
        steps = [step for step in self._steps if step.number > self._number() - took_s / STEP_S - 1]
        for step in steps:
            step.count(whose).completion += tokens / len(steps)

    def _number(self) -> int:
        return int(self._clock() / STEP_S)

    def _now(self) -> _Step:
        """Return the present step. Steps without anything are there too, so that a plot shows them;
        those of a longer pause are left out.
        """
        number = self._number()
        if not self._steps or self._steps[-1].number < number:
            newest = self._steps[-1].number if self._steps else number - 1
            for missing in range(max(newest + 1, number - _MOST), number + 1):
                step = _Step(missing)
                if self._steps:
                    step.moments, step.free_mib = self._steps[-1].moments, self._steps[-1].free_mib
                self._steps.append(step)
        return self._steps[-1]


def _point(step: _Step, of_whom: OfWhom, of_model: Callable[[str], bool]) -> Point:
    counts = [count for whose, count in step.counts.items() if of_whom(*whose)]
    moments = [moment for model, moment in step.moments.items() if of_model(model)]
    memory = [moment.memory_mib for moment in moments if moment.memory_mib is not None]
    first_bytes = sum(count.first_bytes for count in counts)
    mean_s = sum(count.first_byte_s for count in counts) / first_bytes if first_bytes else None
    return Point(
        at=step.number * STEP_S,
        requests=sum(count.requests for count in counts),
        tokens_per_s=_rate(sum(count.completion for count in counts)),
        prompt_tokens_per_s=_rate(sum(count.prompt for count in counts)),
        first_byte_s=None if mean_s is None else round(mean_s, 4),
        in_flight=sum(moment.in_flight for moment in moments),
        waiting=sum(moment.waiting for moment in moments),
        memory_mib=sum(memory) if memory else None,
        free_mib=step.free_mib,
    )


def _rate(count: float) -> float:
    return round(max(0.0, count) / STEP_S, 2)
