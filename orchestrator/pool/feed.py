"""What the slots of a pool report, by model: every step, and the transitions as one log of events.

Slots claim and give back as their servers come and go. A reader of this log neither claims one nor
keeps one from coming to rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from orchestrator.runtime.calls import Facade
from orchestrator.runtime.events import MAX_EVENTS, EventLog
from orchestrator.runtime.owner import transition
from orchestrator.runtime.snapshot import StepReport

Observer = Callable[[str, StepReport], None]
"""Gets the name of a model and a step of its slot, on the thread of that slot's owner."""

_MOST: Final = 8 * MAX_EVENTS  # of all models


class Feed:
    """The reports of all slots of one pool.

    Attributes:
        events: Transitions since the last start; numbers go on from start to start.
    """

    def __init__(self) -> None:
        self.events: EventLog = EventLog(most=_MOST)
        self._observers: list[Observer] = []

    def begin(self) -> None:
        """Open a new log, after the first one has been closed."""
        if self.events.is_closed:
            self.events = EventLog(self.events.last_id, most=_MOST)

    def attach(self, name: str, facade: Facade) -> None:
        """Report the steps of a slot from now on."""
        facade.observe(partial(self._step, name))

    def observe(self, observer: Observer) -> None:
        """Call `observer` after every step of every slot. It must not block or call back."""
        self._observers.append(observer)

    def _step(self, name: str, report: StepReport) -> None:
        before, after = report.before, report.after
        if before.state is not after.state and not _gives_back(report):
            data = transition(report.fact, before, after)
            self.events.append("transition", {"model": name, **data})
        for observer in tuple(self._observers):
            observer(name, report)


def _gives_back(report: StepReport) -> bool:
    """Whether the slot only comes to rest: it is empty already."""
    return (
        report.after.ctx.is_shutting_down
        and report.before.ctx.child is None
        and report.after.ctx.child is None
    )
