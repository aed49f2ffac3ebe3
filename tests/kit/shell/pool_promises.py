"""What the shell of a pool promises beside the invariants of its machine, and their world.

`Watch` looks at a stage after every move, after every step of the pool, and at rest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, get_args

from orchestrator.errors import OrchestratorError, Problem
from orchestrator.machine.states import State as SlotState
from orchestrator.pool import facts
from orchestrator.pool.commands import (
    AnswerCancelled,
    AnswerEmptied,
    Grant,
    Refuse,
    SetTimer,
    Stop,
)
from orchestrator.pool.context import Context
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.states import State
from orchestrator.pool.step import Stepped, step
from orchestrator.runtime.gate import Gate
from tests.kit.machine.invariants import Violation
from tests.kit.pool.invariants import (
    CONTEXT_INVARIANTS,
    STEP_INVARIANTS,
    WORLD_INVARIANTS,
    Edge,
)
from tests.kit.pool.world import Core, Report, Slot, World, amounts
from tests.kit.shell.records import logged

if TYPE_CHECKING:
    from tests.kit.shell.pool_stage import PoolStage

_BEFORE_A_CALL: Final = {"model_not_found", "shutting_down", "invalid_request", "name_taken"}
"""What a call raises before it has asked the owner."""


class Watch:
    """Looks at one stage."""

    def __init__(self, stage: PoolStage) -> None:
        self._stage = stage
        self._gates: dict[str, list[Gate]] = {name: [] for name in stage.scene.names}
        self._let_in: dict[int, frozenset[object]] = {}  # into a gate, when it was open last
        self._answered: Counter[int] = Counter()

    # ----------------------------------------------------------------------------- after a step

    def stepped(self, stepped: Stepped) -> None:
        """Note the answers of a step."""
        for command in stepped.commands:
            if isinstance(command, Refuse):
                self._stage.answers[command.ticket] = command.problem.category
            elif isinstance(command, Grant | AnswerEmptied | AnswerCancelled):
                self._stage.answers[command.ticket] = "done"

    def check_step(self, ctx: Context, fact: facts.Fact, stepped: Stepped) -> Violation | None:
        if isinstance(fact, facts.BecameHealthy) and fact.has_entered:  # its gate is open, too
            fact = replace(fact, uses=(*fact.uses, facts.Use(fact.name, False, None)))
        edge = Edge(ctx, fact, stepped.ctx, stepped.commands)
        for invariant in STEP_INVARIANTS:
            if (why := invariant(edge)) is not None:
                return Violation(invariant.__name__, why)
        if self._stage.owner.ctx is not stepped.ctx:
            return Violation("promise_every_step_is_taken", "its result was not published")
        for command in stepped.commands:
            why = None
            if isinstance(command, Grant):
                why = self._unleased(command)
            elif isinstance(command, Stop):
                why = self._left_open(command)
            if why is not None:
                return Violation("promise_commands_are_carried_out", why)
        return None

    def _unleased(self, grant: Grant) -> str | None:
        """A grant of a lease is a place in the open gate of the server that is there."""
        stage = self._stage
        call = next((c for c in stage.calls.values() if c.ticket == grant.ticket), None)
        if call is None or call.kind in ("load", "end") or call.settled.cancelled():
            return None
        if not call.settled.done() or isinstance(call.settled.result(), Problem):
            return f"call {grant.ticket} was granted, and is told {call.settled}"
        lease, owner = call.settled.result().lease, stage.owners[grant.name]
        if lease is None or lease.who not in lease.gate._inside:
            return f"call {grant.ticket} was granted, and is not inside"
        if lease.gate is not owner.gate:
            return f"call {grant.ticket} was let into the gate of an earlier server"
        return None

    def _left_open(self, stop: Stop) -> str | None:
        gate = self._stage.owners[stop.name].gate if stop.name in self._stage.owners else None
        if gate is None:
            return None
        if gate.is_open:
            return f"{stop.name} is stopped ({stop.reason}), and its gate is open"
        if stop.if_idle and gate.inside:
            return f"{stop.name} is stopped because it is idle, and somebody is inside"
        return None

    # ----------------------------------------------------------------------------- after a move

    def check(self) -> Violation | None:
        """Check the world as it is now."""
        scenario, world = self._stage.scene.scenario, self._world()
        for keeps in CONTEXT_INVARIANTS:
            if (why := keeps(world.core.ctx, scenario)) is not None:
                return Violation(keeps.__name__, why)
        for invariant in WORLD_INVARIANTS:
            if (why := invariant(world, scenario)) is not None:
                return Violation(invariant.__name__, why)
        for promise in (
            self._several_servers,
            self._still_claimed,
            self._entered_late,
            self._admitted_too_many,
            self._leaves_for_later,
            self._waits_for_nobody,
        ):
            if (why := promise()) is not None:
                return Violation(f"promise_never{promise.__name__}", why)
        return None

    def _several_servers(self) -> str | None:
        several = [name for name, os in self._stage.systems.items() if os.most_alive > 1]
        return f"in the slots {several}" if several else None

    def _still_claimed(self) -> str | None:
        """After a close the slots can be claimed by the next pool, unless one is stuck."""
        stage = self._stage
        is_closed = stage.closing is not None and stage.closing.has_ended
        is_stuck = any(entry.state is State.STUCK for entry in stage.owner.ctx.entries)
        is_left = is_closed and not is_stuck and any(stage.lives.values())
        return f"slots are claimed {stage.lives} times" if is_left else None

    def _entered_late(self) -> str | None:
        self.note_gates()
        for name, gates in self._gates.items():
            if any(frozenset(gate._inside) - self._let_in[id(gate)] for gate in gates):
                return f"somebody has entered the closed gate of {name}"
        return None

    def _admitted_too_many(self) -> str | None:
        full = [
            name
            for name, gates in self._gates.items()
            if any(gate.places is not None and len(gate._admitted) > gate.places for gate in gates)
        ]
        return f"more requests than places at {full}" if full else None

    def _leaves_for_later(self) -> str | None:
        """What could be decided now waits for no timer."""
        stage, timer_at = self._stage, self._stage.owner._timer_at
        is_due = timer_at is not None and timer_at <= stage.clock()
        if is_due or not stage.is_calm:
            return None
        residents = [e for e in stage.owner.ctx.entries if e.state is State.RESIDENT]
        for entry in residents:
            waiters = stage.owner.ctx.waiters_of(entry.name)
            is_waited_for = any(waiter.kind == "request" for waiter in waiters)
            if is_waited_for and stage.owners[entry.name].gate.has_free_place:
                return f"a place of {entry.name} is free, and a request waits"
        used_at = {e.name: stage.owners[e.name].gate.used_at for e in residents}
        uses = tuple(facts.Use(name, at is None, at) for name, at in used_at.items())
        looked = step(stage.owner.ctx, facts.Looked(stage.clock(), uses=uses))
        does = [one for one in looked.commands if not isinstance(one, SetTimer)]
        return f"looking again does {does}" if does else None

    def _waits_for_nobody(self) -> str | None:
        """Whoever has gone away is forgotten, and what was loaded for nobody else is ended."""
        stage = self._stage
        tickets = {one.ticket for one in stage.owner.ctx.waiting} - {None}
        gone = {call.ticket for call in stage.calls.values() if call.settled.cancelled()}
        is_wrong = stage.is_calm and bool(tickets & gone)
        return f"calls {tickets & gone} are gone, and wait" if is_wrong else None

    def note_gates(self) -> None:
        """Note who is inside of each gate while it is open."""
        for name, owner in self._stage.owners.items():
            gate = owner.gate
            if not any(gate is known for known in self._gates[name]):
                self._gates[name].append(gate)
                self._let_in[id(gate)] = frozenset()
            if gate.is_open:
                self._let_in[id(gate)] = frozenset(gate._inside)

    def _world(self) -> World:
        names = self._stage.scene.names
        core = Core(self._stage.owner.ctx, len(names))
        return World(core, tuple(self._slot(name) for name in names), 0, ())

    def _slot(self, name: str) -> Slot:
        stage = self._stage
        owner, is_alive = stage.owners.get(name), bool(stage.systems[name].alive)
        if owner is None:
            return Slot()
        entry, gate = stage.owner.ctx.find(name), owner.gate
        reports = tuple(
            Report(fact.trigger)
            for fact in stage.inbox.facts
            if isinstance(fact, get_args(facts.OfStart))
            and (fact.name, fact.generation) == (name, entry.generation if entry else None)
        )
        size = stage.scene.sizes[stage.scene.names.index(name)]
        return Slot(
            "up" if is_alive else "none",
            "open" if gate.is_open else "shut",
            gate.inside,
            reports,
            takes=amounts((size,)) if is_alive else Amounts(),
        )

    # ---------------------------------------------------------------------------------- at rest

    def check_rest(self) -> Violation | None:
        """Check what must be true when nothing more happens by itself."""
        for check in (
            self._somebody_waits,
            self._somebody_is_misled,
            self._something_goes_on,
            self._something_is_left,
            self._a_lease_is_lost,
            self._something_was_logged,
        ):
            if (why := check()) is not None:
                return Violation(f"promise_at_rest{check.__name__}", why)
        return None

    def _somebody_waits(self) -> str | None:
        stage = self._stage
        if stage.owner.ctx.waiting:
            return f"{stage.owner.ctx.waiting}"
        if stage.owner._calls:
            return f"calls are open: {set(stage.owner._calls)}"
        waits = [label for label, p in stage.puppets if not p.has_ended]
        waits = [one for one in waits if not one.startswith(("lease", "request"))]
        return f"{waits} still wait" if waits else None

    def _somebody_is_misled(self) -> str | None:
        for action in self._stage.scene.actions:
            has_begun = action.refers == action.index and self._has_begun(action.index)
            if has_begun and (why := self._misled(action.index)) is not None:
                return f"{action.text}: {why}"
        return None

    def _has_begun(self, index: int) -> bool:
        stage = self._stage
        done = {a.index for n, c in enumerate(stage.scene.clients) for a in c[: stage.progress[n]]}
        return index in done and stage.scene.actions[index].verb != "shutdown"

    def _misled(self, index: int) -> str | None:
        """Return how what the facade did differs from the answer of the machine."""
        stage = self._stage
        has_ended, result = stage.result_of(index)
        call = stage.calls.get(index)
        answer = stage.answers.get(call.ticket) if call is not None else None
        if not has_ended:
            return None if index in stage.holding else f"it still waits, and its answer is {answer}"
        if isinstance(result, KeyboardInterrupt | asyncio.CancelledError):
            return None if index in stage.ended else "it ended without a cause"
        if isinstance(result, OrchestratorError):
            category = result.problem.category
            if call is None:
                return None if category in _BEFORE_A_CALL else f"it raises {result!r}"
            is_gone = category == "server_exited" and answer == "done"
            is_closed = category == "shutting_down" and stage.was_shut_down
            return None if category == answer or is_gone or is_closed else f"{result!r}, {answer}"
        if isinstance(result, BaseException):
            return f"it raises {result!r}"
        return None if answer in ("done", None) else f"it returns, and was told {answer}"

    def _something_goes_on(self) -> str | None:
        for entry in self._stage.owner.ctx.entries:
            if entry.state in (State.STARTING, State.STOPPING) or entry.emptying:
                return f"{entry.name} is {entry.state} for ever"
        return None

    def _something_is_left(self) -> str | None:
        """What is Absent has neither a server nor a claimed slot; what is Resident is usable."""
        stage = self._stage
        for name, owner in stage.owners.items():
            entry = stage.owner.ctx.find(name)
            state = State.ABSENT if entry is None else entry.state
            lives = stage.lives.get(f"default.{name}", 0)
            if state is State.ABSENT and (stage.systems[name].alive or lives):
                return f"{name} is Absent, and its slot is claimed {lives} times"
            is_up = owner.snapshot.state is SlotState.HEALTHY and owner.gate.is_open
            if state is State.RESIDENT and not (is_up and lives == 1):
                return f"{name} is Resident, and nobody can use it"
        if stage.owner.has_ended and any(stage.lives.values()):
            stuck = [e.name for e in stage.owner.ctx.entries if e.state is State.STUCK]
            return None if stuck else f"the pool is closed, and slots are claimed: {stage.lives}"
        return None

    def _a_lease_is_lost(self) -> str | None:
        holding = Counter(self._stage.holding.values())
        for name, gates in self._gates.items():
            inside = sum(gate.inside for gate in gates)
            if inside != holding[name]:
                return f"{name} counts {inside} leases, and {holding[name]} are held"
        return None

    def _something_was_logged(self) -> str | None:
        failed: list[Any] = [one for one in logged() if "exception" in one]
        return str(failed[0]) if failed else None
