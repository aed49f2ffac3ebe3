"""What the paths are called that an orchestrator could tell of, where strangers see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orchestrator.base.paths import PathNames
from orchestrator.errors import Problem
from orchestrator.machine.commands import Loaded
from orchestrator.machine.context import Context
from orchestrator.runtime.history import History, LoadRecord
from orchestrator.settings.target import ReloadReason, Target


class KnownNames:
    """The names of one orchestrator's places, and of what it loads and has loaded.

    Args:
        places: Of its own folders.
    """

    def __init__(self, places: tuple[PathNames, ...]) -> None:
        self._places = places
        self._last: tuple[tuple[object, ...], tuple[PathNames, ...]] | None = None

    def now(self, ctx: Context, history: History) -> tuple[PathNames, ...]:
        """Return all of them; the same tuple as before as long as none can have changed."""
        having = (
            *(ctx.job, ctx.running, ctx.queue, ctx.prefetches, ctx.ending, ctx.previous),
            *(ctx.recovery, ctx.last_error, history.newest),
        )
        last = self._last
        if last is None or any(a is not b for a, b in zip(last[0], having, strict=True)):
            records = tuple(history.records.values())  # copied in one go
            known = (*self._places, *_of_context(ctx), *_of_records(records))
            last = self._last = having, known
        return last[1]


def _of_context(ctx: Context) -> Iterator[PathNames]:
    """What waits, what runs, and what may come back."""
    for job in (*ctx.queue, *ctx.prefetches, ctx.job, ctx.running):
        if job is not None:
            yield from _of(job.target, *job.reload_reasons)
    for load in (*ctx.ending, ctx.recovery):
        if load is not None:
            yield from _of(load.target)
    if ctx.previous is not None:
        yield from _of(ctx.previous)
    if ctx.last_error is not None:
        yield from _of(ctx.last_error)


def _of_records(records: Iterable[LoadRecord]) -> Iterator[PathNames]:
    """What has ended."""
    for record in records:
        yield from _of(record.target)
        match record.answer:
            case Problem() as problem:
                yield from _of(problem)
            case Loaded(reload_reasons=reasons):
                yield from _of(*reasons)


def _of(*having: Target | ReloadReason | Problem) -> Iterator[PathNames]:
    return (one.names for one in having if one.names)
