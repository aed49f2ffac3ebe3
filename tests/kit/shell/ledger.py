"""The calls of a schedule: what each requested, how far it is, and which loads must not succeed.

Derived from the facts that the owner processes and the answers of the machine, independently of
what the owner does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Accept, Command, LeaseGranted, Settle
from orchestrator.machine.facts import (
    CancelRequested,
    Fact,
    LookUpRequested,
    ShutdownRequested,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.runtime.owner import Call
from tests.kit.machine.programs import Action
from tests.kit.machine.world import Status

_ENDABLE: Final = frozenset({"load", "prefetch"})
_ARRIVING: Final = frozenset({Status.CALLED, Status.CALLED_ENDED})
_ENDED: Final = {Status.WAITING: Status.ENDED, Status.CALLED: Status.CALLED_ENDED}


@dataclass(slots=True)
class Caller:
    """One call of a client."""

    action: Action
    status: Status = Status.UNSENT
    call: Call | None = None
    generation: Generation = Generation(0)

    @property
    def ticket(self) -> Ticket:
        return self.call.ticket if self.call else Ticket(0)

    @property
    def is_known(self) -> bool:
        """Whether its load or prefetch has reached the machine."""
        is_call = self.action.verb in _ENDABLE and self.status is not Status.LOST
        return is_call and self.status > Status.CALLED_ENDED

    @property
    def is_settled(self) -> bool:
        """Whether it has its answer or has gone away."""
        return self.call is not None and self.call.settled.done()

    @property
    def answer(self) -> object:
        """Its answer, `gone` if it was withdrawn, or None."""
        if self.call is None or not self.call.settled.done():
            return None
        return "gone" if self.call.settled.cancelled() else self.call.settled.result()

    def leave(self) -> None:
        """Give up a lease."""
        assert self.call is not None
        self.call.leave()
        self.has_left()

    def has_left(self) -> None:
        if self.status is Status.HELD:
            self.status = Status.DONE

    @property
    def known_generation(self) -> int | None:
        """The generation of its load, if the client knows it."""
        accepted = self.call.accepted if self.call else None
        if accepted is None or not accepted.done() or accepted.cancelled():
            return None
        result = accepted.result()
        return None if isinstance(result, Problem) else result

    @property
    def model(self) -> str | None:
        return self.action.request.model_path if self.action.request else None


class Ledger:
    """All calls of a schedule."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self.callers = [Caller(action) for action in actions]
        self.cancelled_ids: set[str] = set()
        self._by_ticket: dict[Ticket, Caller] = {}

    def opened(self, caller: Caller, call: Call) -> None:
        caller.call, caller.status = call, Status.CALLED
        self._by_ticket[call.ticket] = caller

    def entered(self, caller: Caller, call: Call) -> None:
        """A lease has been granted without the machine."""
        self.opened(caller, call)
        caller.status = Status.HELD

    def lose_all(self) -> None:
        """The host is killed, with all calls."""
        for caller in self._by_ticket.values():
            caller.call, caller.status, caller.generation = None, Status.LOST, Generation(0)
        self._by_ticket.clear()
        self.cancelled_ids.clear()

    def caller(self, ticket: Ticket | None) -> Caller | None:
        return self._by_ticket.get(ticket or Ticket(0))

    @property
    def open_calls(self) -> list[Caller]:
        return list(self._by_ticket.values())

    def having(self, *statuses: Status) -> frozenset[Ticket]:
        return frozenset(t for t, caller in self._by_ticket.items() if caller.status in statuses)

    @property
    def was_shut_down(self) -> bool:
        """Whether a shutdown has reached the machine."""
        return any(
            caller.action.verb == "shutdown" and caller.status > Status.CALLED_ENDED
            for caller in self._by_ticket.values()
        )

    # -------------------------------------------------------------------------------- requests

    def process(self, fact: Fact) -> None:
        """Update the calls when the owner processes a fact."""
        caller = self.caller(getattr(fact, "ticket", None))
        match fact:
            case UnloadRequested(ticket, model):
                self._end(
                    lambda c: (
                        c.action.verb == "load" and c.ticket < ticket and model in (None, c.model)
                    )
                )
            case ShutdownRequested():
                self._end(lambda _: True)
            case CancelRequested():
                self._cancel(fact)
            case Withdrawn() if caller and caller.status is not Status.DONE:
                caller.status = Status.GONE
            case _:
                pass
        if caller is not None and caller.status in _ARRIVING:
            is_cancelled = isinstance(fact, LookUpRequested) and (
                caller.action.request_id in self.cancelled_ids
            )
            is_ended = is_cancelled or caller.status is Status.CALLED_ENDED
            caller.status = Status.ENDED if is_ended else Status.WAITING

    def _cancel(self, fact: CancelRequested) -> None:
        """An unknown id may belong to a load that has not arrived."""
        name = fact.request_id
        if name is None:
            self._end(lambda c: c.generation == fact.generation)
        elif any(c.is_known for c in self.callers if c.action.request_id == name):
            self._end(lambda c: c.action.request_id == name and c.is_known)
        else:
            self.cancelled_ids.add(name)
            self._end(lambda c: c.action.request_id == name)

    def _end(self, ends: Callable[[Caller], bool]) -> None:
        """Mark loads that must not succeed any more."""
        for caller in self.callers:
            is_endable = caller.call is not None and caller.action.verb in _ENDABLE
            if is_endable and ends(caller):
                caller.status = _ENDED.get(caller.status, caller.status)

    # --------------------------------------------------------------------------------- answers

    def apply(self, command: Command) -> None:
        """Update a call when the machine answers it."""
        caller = self.caller(getattr(command, "ticket", None))
        if caller is None:
            return
        if isinstance(command, Accept):
            caller.generation = command.generation
        elif isinstance(command, Settle) and caller.status is not Status.GONE:
            is_lease = isinstance(command.answer, LeaseGranted)
            caller.status = Status.HELD if is_lease else Status.DONE
