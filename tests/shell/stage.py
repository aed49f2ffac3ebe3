"""One run: a real owner pumped by hand, clients that follow a program, and everything that may
happen to them.

A stage offers its moves; somebody else chooses. Before and after every fact the owner processes it
looks at the machine, the operating system and the callers, and holds them to the invariants of the
machine (`tests.core.invariants`) and of the owner (`tests.shell.promises`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

from orchestrator import actions, guards
from orchestrator.context import Context, EffectInFlight, Policy
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.machine import Lifecycle, Stepped
from orchestrator.messages import (
    Accept,
    CancelRequested,
    Command,
    Effect,
    Fact,
    LeaseGranted,
    LeaseReleased,
    LeaseRequested,
    Loaded,
    LoadRequested,
    Settle,
    ShutdownRequested,
    Spawn,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.owner import Call, Owner, Snapshot
from orchestrator.request import Target
from orchestrator.states import State
from orchestrator.table import TABLE, Row
from orchestrator.tokens import CancelToken, Generation, Ticket
from tests.core.invariants import Edge, Process, Violation, check_edge, check_world
from tests.core.programs import Action, parse
from tests.core.story import Told, describe
from tests.core.world import Status, target
from tests.shell import promises
from tests.shell.gates import Gate, GatedEffects, SpawnPlan, VirtualClock

Choose = Callable[[Sequence[str]], int]
Mishap = Literal["kill", "download", "spawn", "probe", "crash", "stray", "look-up"]

ALL_MISHAPS: frozenset[Mishap] = frozenset({"kill", "download", "spawn", "probe", "crash"})


class RecordedLifecycle(Lifecycle):
    """A machine that remembers its last step, and every step: it is pure, so each is taken once."""

    def __init__(self, table: Sequence[Row] = TABLE, **names: Callable[..., Any]) -> None:
        super().__init__(
            table, guard_names={**vars(guards), **names}, action_names={**vars(actions), **names}
        )
        self.last: Stepped | None = None
        self._steps: dict[tuple[State, Context, Fact], Stepped] = {}

    def step(self, state: State, ctx: Context, fact: Fact) -> Stepped:
        key = (state, ctx, fact)
        self.last = self._steps.get(key)
        if self.last is None:
            self.last = self._steps[key] = super().step(state, ctx, fact)
        return self.last


SHIPPED = RecordedLifecycle()


@dataclass(frozen=True)
class Scene:
    """What never changes from run to run.

    Attributes:
        program: What the clients do (see `tests.core.programs`).
        warm: A model that is Healthy at the start.
        mishaps: How many things may go wrong in one schedule.
        kinds: Which.
        pairs: How often a fact may arrive while another is still unread in the inbox.
        owner: The owner under test; a seeded fault is a subclass.
        machine: The machine it steps; a seeded fault is another table, guard or action.
    """

    program: str
    warm: str | None = None
    mishaps: int = 1
    kinds: frozenset[Mishap] = ALL_MISHAPS
    pairs: int = 1
    policy: Policy = field(default_factory=Policy)
    owner: type[Owner] = Owner
    machine: RecordedLifecycle = SHIPPED

    def simpler(self) -> Iterator[Scene]:
        """Scenes with one thing less in them, to find a shorter story in."""
        texts = self.program.split("|")
        if len(texts) > 1:
            for left_out in range(len(texts)):
                rest = "|".join(text for n, text in enumerate(texts) if n != left_out).strip()
                yield replace(self, program=rest)
        if self.mishaps:
            yield replace(self, mishaps=self.mishaps - 1)
        if self.pairs:
            yield replace(self, pairs=self.pairs - 1)

    @cached_property
    def clients(self) -> tuple[tuple[Action, ...], ...]:
        return parse(self.program)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        return tuple(action for client in self.clients for action in client)


@dataclass(frozen=True, slots=True)
class Move:
    """Something that may happen next; `is_own` when nobody has to want it and nothing goes wrong."""

    who: str
    text: str
    act: Callable[[], None]
    is_own: bool = True

    @property
    def label(self) -> str:
        return f"{self.who}: {self.text}"


@dataclass(slots=True)
class Caller:
    """One call of a client, as far as the machine has got with it."""

    action: Action
    status: Status = Status.UNSENT
    call: Call | None = None
    generation: Generation = Generation(0)

    @property
    def ticket(self) -> Ticket:
        return self.call.ticket if self.call else Ticket(0)

    @property
    def answer(self) -> object:
        """What the caller has been told: an answer, `gone`, or None."""
        future = self.call.settled if self.call else Future()
        if future.cancelled():
            return "gone"
        return future.result() if future.done() else None

    @property
    def is_told(self) -> bool:
        return self.call is not None and self.call.settled.done()


@dataclass(frozen=True)
class Instant:
    """One instant as the invariants want to see it."""

    state: State
    ctx: Context
    alive: frozenset[Process]
    in_flight: tuple[EffectInFlight, ...]
    tokens: frozenset[Generation]
    unanswered: frozenset[Ticket]
    ended: frozenset[Ticket]
    accepted: Mapping[Ticket, Generation]
    asked: Mapping[Ticket, Target]
    holding: frozenset[Ticket]
    was_shut_down: bool
    is_quiescent: bool


class BrokenError(Exception):
    """An invariant does not hold."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(f"{violation.invariant}: {violation.message}")
        self.violation = violation


class Inbox:
    """The owner's inbox, open to view."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def put(self, fact: Fact) -> None:
        self.facts.append(fact)


class Stage:
    """Attributes:
    told: What has happened so far, for the story.
    heard: The snapshot in the moment somebody was answered or something was started.
    given: The token every effect was started with.
    """

    def __init__(self, scene: Scene, choose: Choose) -> None:
        self.scene = scene
        self.choose = choose
        self.clock = VirtualClock()
        self.machine = scene.machine
        self.owner = scene.owner(
            self._make_effects, policy=scene.policy, clock=self.clock, machine=self.machine
        )
        self.effects = cast("GatedEffects", self.owner.effects)
        self.inbox = Inbox()
        self.owner._inbox = cast("Any", self.inbox)
        self.callers = [Caller(action) for action in scene.actions]
        self.progress = [0] * len(scene.clients)
        self.looking: list[Caller] = []
        self.mishaps = 0
        self.pairs = scene.pairs
        self.owed: list[Gate | EffectInFlight] = []
        self.given: list[tuple[Generation, CancelToken]] = []
        self.heard: list[Snapshot] = []
        self.held: set[Generation] = set()
        self.cancelled_ids: set[str] = set()
        self.transitions = 0
        self.told: list[Told] = []
        self.is_checking = False
        self._by_ticket: dict[Ticket, Caller] = {}
        if scene.warm is not None:
            self._warm_up(scene.warm)
        self.mishaps = scene.mishaps

    def _make_effects(self, post: Callable[[Fact], None]) -> GatedEffects:
        return GatedEffects(
            post,
            clock=self.clock,
            notices_exits=False,
            watch=self._watch,
            plan_spawn=self._plan_spawn,
        )

    def _warm_up(self, model: str) -> None:
        """Make a model Healthy, and start to count from there."""
        caller = Caller(parse(f"load {model}")[0][0])
        self._open(caller)
        self._ask(caller)
        for _ in range(20):
            if self.inbox.facts:
                self._pump_next()
            elif self.effects.parked:
                self._succeed(self.effects.parked[0])
        assert self.owner.snapshot.state is State.HEALTHY, self.owner.snapshot
        self.told.clear()

    # -------------------------------------------------------------------------- what may happen

    def moves(self) -> list[Move]:
        """Everything that may happen next; what happens by itself comes first."""
        found: list[Move] = []
        if self.inbox.facts:
            fact = self.inbox.facts[0]
            found.append(Move("owner", f"takes up {_named(fact)}", self._pump_next))
            if not self.pairs:
                return found
        found += self._own_moves()
        for number, client in enumerate(self.scene.clients):
            if self.progress[number] < len(client):
                found += self._client_moves(number, client[self.progress[number]])
        found += self._more_mishaps()
        return found

    def _own_moves(self) -> Iterator[Move]:
        for gate in self.effects.parked:
            yield from self._end_moves(gate)
        for exited in self.effects.exits:
            text = f"the exit of server {exited.exit.pid} is noticed"
            yield Move("system", text, lambda e=exited: self.effects.notice_exit(e))  # type: ignore[misc]
        for caller in self.looking:
            text = f"the look-up of call {caller.ticket} ends"
            yield Move("system", text, lambda c=caller: self._end_look_up(c))  # type: ignore[misc]
        if self.owner._timers:
            due = self.owner._timers[0][2]
            text = f"the {due.kind} timer of load {due.generation} fires"
            yield Move("clock", text, self._fire_timer)

    def _end_moves(self, gate: Gate) -> Iterator[Move]:
        is_cancelled = gate.token.is_set()
        dead = gate.kind == "probe" and gate.effect.child.pid not in self.effects.os.alive  # type: ignore[union-attr]
        what = f"the {gate.kind} of load {gate.generation}"
        fail = Move("system", f"{what} fails", lambda: self._fail(gate))
        if (gate.kind == "spawn" and gate.child is None) or dead:
            yield fail
            return
        yield Move("system", f"{what} ends well", lambda: self._succeed(gate))
        if is_cancelled and gate.kind in ("download", "probe"):
            yield fail
        elif gate.kind != "spawn" and self._may(gate.kind):
            yield Move("system", f"{what} fails", lambda: self._mishap(lambda: self._fail(gate)), False)

    def _client_moves(self, number: int, action: Action) -> Iterator[Move]:
        about = self.callers[action.refers]
        if action.verb in ("withdraw", "release") and about.call is None:
            return
        if action.verb == "release" and not isinstance(about.answer, LeaseGranted):
            return
        if action.verb == "cancel" and action.request_id is None and not _known(about):
            return
        yield Move(
            f"client {number + 1}", action.text, lambda: self._act(number, action), is_own=False
        )

    def _more_mishaps(self) -> Iterator[Move]:
        os = self.effects.os
        if self._may("crash"):
            for pid in sorted(os.alive):
                if os.alive[pid].generation:
                    crash = lambda p=pid: self._mishap(lambda: self.effects.crash(p))  # noqa: E731
                    yield Move("system", f"server {pid} dies", crash, is_own=False)
        if self._may("stray") and not os.alive:
            stray = lambda: self._mishap(lambda: os.intrude() and None)  # noqa: E731
            yield Move("system", "a stray process holds the slot", stray, is_own=False)
        if self._may("look-up"):
            for caller in self.looking:
                text = f"the look-up of call {caller.ticket} fails"
                fail = lambda c=caller: self._mishap(lambda: self._refuse(c))  # noqa: E731
                yield Move("system", text, fail, is_own=False)

    def _may(self, kind: Mishap) -> bool:
        return self.mishaps > 0 and kind in self.scene.kinds

    def do(self, move: Move) -> None:
        """Let it happen; a fact that arrives behind an unread one costs a pair."""
        waiting = bool(self.inbox.facts) and move.act != self._pump_next
        before, told = self.owner.snapshot.state, len(self.told)
        move.act()
        if waiting:
            self.pairs -= 1
        if len(self.told) == told:
            self.told.append(Told(move.who, move.text, before, before, ()))

    # ------------------------------------------------------------------------------- the moves

    def _mishap(self, what: Callable[[], None]) -> None:
        self.mishaps -= 1
        what()

    def _succeed(self, gate: Gate) -> None:
        gate.succeed()

    def _fail(self, gate: Gate) -> None:
        gate.fail()

    def _fire_timer(self) -> None:
        self.clock.now = max(self.clock.now, self.owner._timers[0][0])
        fact = self.owner._due_timer()
        assert fact is not None
        self._pump(fact)

    def _act(self, number: int, action: Action) -> None:
        self.progress[number] += 1
        caller, about = self.callers[action.index], self.callers[action.refers]
        match action.verb:
            case "withdraw":
                assert about.call is not None
                about.call.settled.cancel()
                if about.action.verb == "lease":  # as the facades do: it may just be granted
                    self.owner.post(LeaseReleased(about.ticket, self.clock()))
            case "release":
                self.owner.post(LeaseReleased(about.ticket, self.clock()))
            case "load" if action.is_slow:
                self._open(caller)
                self.looking.append(caller)
            case _:
                self._open(caller)
                self._ask(caller, about)

    def _open(self, caller: Caller) -> None:
        caller.call = self.owner.call()
        caller.status = Status.LOOKING
        self._by_ticket[caller.ticket] = caller
        caller.call.settled.add_done_callback(
            lambda done: None if done.cancelled() else self.heard.append(self.owner.snapshot)
        )

    def _end_look_up(self, caller: Caller) -> None:
        self.looking.remove(caller)
        self._ask(caller)

    def _refuse(self, caller: Caller) -> None:
        self.looking.remove(caller)
        assert caller.call is not None
        self.owner.refuse(caller.call, Problem("model_not_found", "no such file"))
        self.heard.clear()
        caller.status = Status.DONE

    def _ask(self, caller: Caller, about: Caller | None = None) -> None:
        assert caller.call is not None
        action, ticket, now = caller.action, caller.ticket, self.clock()
        fact: Any
        match action.verb:
            case "load":
                assert action.request is not None
                fact = LoadRequested(ticket, target(action.request), now)
            case "unload":
                fact = UnloadRequested(ticket, action.model, now)
            case "lease":
                fact = LeaseRequested(ticket, now)
            case "shutdown":
                fact = ShutdownRequested(ticket, now)
            case _:
                generation = None if action.request_id else _known(about)
                fact = CancelRequested(ticket, action.request_id, generation, now)
        self.owner.ask(caller.call, fact)

    # ------------------------------------------------------------------------------- the effects

    def _watch(self, effect: Effect, token: CancelToken) -> None:
        self.heard.append(self.owner.snapshot)
        kind = {"Kill": "kill", "Download": "download", "Spawn": "spawn", "Probe": "probe"}
        own = cast("Any", kind[type(effect).__name__])
        self.owed.append(EffectInFlight(own, effect.generation))
        self.given.append((effect.generation, token))

    def _plan_spawn(self, spawn: Spawn) -> SpawnPlan:
        if not self._may("spawn"):
            return "lives"
        plans: tuple[SpawnPlan, ...] = ("lives", "fails", "raises")
        texts = [f"the spawn of load {spawn.generation}: {plan}" for plan in plans]
        plan = plans[self.choose(texts)]
        if plan != "lives":
            self.mishaps -= 1
        return plan

    # --------------------------------------------------------------------------------- the owner

    def _pump_next(self) -> None:
        self._pump(self.inbox.facts.pop(0))

    def _pump(self, fact: Fact) -> None:
        told = self._hear(fact)
        before = self._instant() if self.is_checking else None
        state = self.owner.snapshot.state
        self.heard.clear()
        self.machine.last = None
        self._forget_owed(fact)
        self.owner.pump(fact)
        stepped = self.machine.last
        commands = stepped.commands if stepped else ()
        if stepped is not None:
            self.transitions += stepped.state is not state
            if stepped.state is State.HEALTHY and stepped.ctx.running is not None:
                self.held.add(stepped.ctx.running.generation)
        for command in commands:
            self._note(command)
        outcome = tuple(filter(None, map(describe, commands)))
        self.told.append(Told("owner", told, state, self.owner.snapshot.state, outcome))
        if before is not None:
            self._check(before, fact, stepped)

    def _forget_owed(self, fact: Fact) -> None:
        kind, generation = getattr(fact, "effect", None), getattr(fact, "generation", None)
        for owed in self.owed:
            if isinstance(owed, EffectInFlight) and (owed.kind, owed.generation) == (kind, generation):
                self.owed.remove(owed)
                return

    def _note(self, command: Command) -> None:
        match command:
            case Accept(ticket, generation) if ticket in self._by_ticket:
                self._by_ticket[ticket].generation = generation
            case Settle(ticket, answer) if ticket in self._by_ticket:
                caller = self._by_ticket[ticket]
                if caller.status is not Status.GONE:
                    held = isinstance(answer, LeaseGranted)
                    caller.status = Status.HELD if held else Status.DONE

    # ------------------------------------------------- what the callers have done to each other

    def _hear(self, fact: Fact) -> str:
        """Note what a request means for other calls in the step that processes it."""
        caller = self._by_ticket.get(getattr(fact, "ticket", Ticket(0)))
        match fact:
            case Withdrawn():
                if caller is not None and caller.status is not Status.DONE:
                    caller.status = Status.GONE
            case LeaseReleased():
                if caller is not None and caller.status is Status.HELD:
                    caller.status = Status.DONE
            case UnloadRequested():
                self._end(
                    lambda c: c.ticket < fact.ticket and fact.model in (None, _model(c.action))
                )
            case ShutdownRequested():
                self._end(lambda _: True)
            case CancelRequested():
                self._cancel(fact)
            case _:
                pass
        if caller is not None and caller.status in (Status.LOOKING, Status.LOOKING_ENDED):
            ended = caller.status is Status.LOOKING_ENDED or (
                isinstance(fact, LoadRequested) and caller.action.request_id in self.cancelled_ids
            )
            if isinstance(fact, Withdrawn):
                caller.status = Status.GONE
            else:
                caller.status = Status.ENDED if ended else Status.WAITING
        return f"takes up {_named(fact)}"

    def _cancel(self, fact: CancelRequested) -> None:
        if fact.request_id is None:
            self._end(lambda c: c.generation == fact.generation)
            return
        named = [c for c in self.callers if c.action.request_id == fact.request_id]
        named = [c for c in named if c.action.verb == "load"]
        if any(c.generation for c in named):
            self._end(lambda c: c in named and c.generation > 0)
        else:
            self.cancelled_ids.add(fact.request_id)
            self._end(lambda c: c in named)

    def _end(self, ends: Callable[[Caller], bool]) -> None:
        to = {Status.WAITING: Status.ENDED, Status.LOOKING: Status.LOOKING_ENDED}
        for caller in self.callers:
            if caller.call is not None and caller.action.verb == "load" and ends(caller):
                caller.status = to.get(caller.status, caller.status)

    # --------------------------------------------------------------------------------- looking

    def caller(self, ticket: Ticket | None) -> Caller | None:
        return self._by_ticket.get(ticket or Ticket(0))

    @property
    def is_quiescent(self) -> bool:
        """Nothing more happens by itself."""
        return not (
            self.inbox.facts
            or self.effects.parked
            or self.effects.exits
            or self.looking
            or self.owner._timers
        )

    def _instant(self) -> Instant:
        snapshot, calls = self.owner.snapshot, [c for c in self._by_ticket.values()]
        arrived = {Status.WAITING, Status.ENDED}
        return Instant(
            snapshot.state,
            snapshot.ctx,
            frozenset(self.effects.os.alive.values()),
            tuple(owed for owed in self.owed if isinstance(owed, EffectInFlight)),
            frozenset(g for g, token in self.owner._tokens.items() if token.is_set()),
            frozenset(c.ticket for c in calls if c.status in arrived),
            frozenset(c.ticket for c in calls if c.status in (Status.ENDED, Status.GONE)),
            {c.ticket: c.generation for c in calls if c.generation},
            {c.ticket: target(c.action.request) for c in calls if c.action.request},
            frozenset(c.ticket for c in calls if c.status is Status.HELD),
            any(c.action.verb == "shutdown" and c.status > Status.LOOKING_ENDED for c in calls),
            self.is_quiescent,
        )

    def key(self) -> tuple[object, ...]:
        """Everything the future depends on; equal keys have equal futures."""
        snapshot, os, owner = self.owner.snapshot, self.effects.os, self.owner
        return (
            snapshot.state,
            replace(snapshot.ctx, last_error=None, last_exit=None),  # no guard reads them
            tuple(self.inbox.facts),
            tuple((g.kind, g.generation, g.child) for g in self.effects.parked),
            tuple(self.effects.exits),
            frozenset(os.alive.values()),
            len(os.started),
            os.lock is None,
            tuple(self.progress),
            tuple((c.status, c.ticket, c.generation, c.is_told) for c in self.callers),
            tuple(c.ticket for c in self.looking),
            tuple((due, fired) for due, _, fired in sorted(owner._timers)),
            frozenset((g, token.is_set()) for g, token in owner._tokens.items()),
            tuple((g, isinstance(answer, Loaded)) for g, answer in owner.outcomes.items()),
            frozenset(owner._calls),
            frozenset(self.cancelled_ids),
            self.clock.now,
            self.mishaps,
            self.pairs,
        )

    # -------------------------------------------------------------------------------- checking

    def _check(self, before: Instant, fact: Fact, stepped: Stepped | None) -> None:
        after = self._instant()
        if stepped is not None:
            _raise(check_edge(Edge(before, fact, after, stepped.commands)))
            _raise(check_world(after))
        _raise(promises.check_step(self, fact, stepped))

    def check_rest(self) -> None:
        """Hold the stage to what must be true when nothing more happens by itself."""
        if self.is_quiescent:
            _raise(check_world(self._instant()))
            _raise(promises.check_rest(self))


def _raise(violation: Violation | None) -> None:
    if violation is not None:
        raise BrokenError(violation)


def _known(about: Caller | None) -> int | None:
    """The generation a client knows its load by."""
    if about is None or about.call is None:
        return None
    future = about.call.accepted
    if not future.done() or future.cancelled():
        return None
    found = future.result()
    return None if isinstance(found, Problem) else found


def _model(action: Action) -> str | None:
    return action.request.model_path if action.request else None


def _named(fact: Fact) -> str:
    match fact:
        case LoadRequested():
            return f"call {fact.ticket}: load {fact.target.request.model_path}"
        case CancelRequested():
            return f"call {fact.ticket}: cancel {fact.request_id or f'load {fact.generation}'}"
        case _ if hasattr(fact, "ticket"):
            return f"call {fact.ticket}: {fact.trigger}"
        case _:
            return f"{fact.trigger} of load {cast('Any', fact).generation}"
