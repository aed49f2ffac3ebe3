"""A real owner without a thread: its facts are processed when a test says so."""

from __future__ import annotations

from typing import Any, cast

from orchestrator.machine.facts import CancelRequested, Fact, LookUpRequested, UnloadRequested
from orchestrator.machine.states import State
from orchestrator.runtime.owner import Call, Owner
from orchestrator.settings.request import LoadRequest
from tests.kit.machine.world import WorkKind
from tests.kit.shell.gates import GatedEffects


class Inbox:
    """The owner's inbox, open to view."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def put(self, fact: Fact) -> None:
        self.facts.append(fact)


class PumpedOwner:
    """An owner whose inbox a test pumps.

    Args:
        owner: Has not been started; its effects are gated.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.effects = cast("GatedEffects", owner.effects)
        self.inbox = Inbox()
        owner._inbox = cast("Any", self.inbox)

    @property
    def state(self) -> State:
        return self.owner.snapshot.state

    def pump(self, fact: Fact) -> None:
        self.owner.pump(fact)
        while self.owner._at_once:
            self.owner.pump(self.owner._at_once.popleft())

    def pump_next(self) -> None:
        self.pump(self.inbox.facts.pop(0))

    def process(self) -> None:
        """Process everything in the inbox."""
        while self.inbox.facts:
            self.pump_next()

    def let_through(self, *kinds: WorkKind) -> None:
        """Let the next effect of each of these kinds succeed, in this order."""
        for kind in kinds:
            self.effects.let_through(kind)
            self.process()

    def settle(self) -> None:
        """Let every effect succeed until nothing is in flight."""
        self.process()
        while self.effects.parked:
            self.effects.parked[0].succeed()
            self.process()

    # --------------------------------------------------------------------------------- callers

    def load(self, model: str, **fields: Any) -> Call:
        call = self.owner.call()
        request = LoadRequest(model_path=model, **fields)
        now = self.owner.clock()
        return self._ask(call, LookUpRequested(call.ticket, request, "load", now))

    def cancel(self, generation: int) -> Call:
        call = self.owner.call()
        fact = CancelRequested(call.ticket, None, generation, self.owner.clock())
        return self._ask(call, fact)

    def unload(self) -> Call:
        call = self.owner.call()
        return self._ask(call, UnloadRequested(call.ticket, None, self.owner.clock()))

    def _ask(self, call: Call, fact: Any) -> Call:
        self.owner.ask(call, fact)
        self.process()
        return call
