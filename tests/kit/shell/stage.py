"""One schedule: a real owner, pumped by hand, and clients that follow a program.

A stage lists the moves that may come next, and the explorer chooses. Before and after every fact
it checks the machine, the operating system and the callers against the invariants of the machine
(`tests.kit.machine.invariants`) and the promises of the owner (`promises`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

from orchestrator.base.tokens import CancelToken, Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    CloseGate,
    Effect,
    LeaseGranted,
    LookUp,
    Probe,
    ServerEnded,
    Spawn,
)
from orchestrator.machine.context import Context, EffectInFlight, EffectKind
from orchestrator.machine.facts import (
    CancelRequested,
    Child,
    Completion,
    Drained,
    Fact,
    Found,
    Hung,
    LeaseRequested,
    LoadRequested,
    LookedUp,
    LookUpFailed,
    LookUpRequested,
    Request,
    ShutdownRequested,
    Timer,
    TimerFired,
    UnloadRequested,
)
from orchestrator.machine.states import State
from orchestrator.machine.step import Stepped
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.owner import Call, Owner
from orchestrator.runtime.snapshot import Snapshot
from orchestrator.settings.target import Target
from tests.kit.machine.invariants import Edge, Process, Violation, check_edge, check_world
from tests.kit.machine.programs import Action, parse
from tests.kit.machine.story import StoryLine, describe
from tests.kit.machine.world import FOUND, Noticed, Status, target
from tests.kit.machine.world import found as tell_found
from tests.kit.shell import promises
from tests.kit.shell.gates import (
    KINDS,
    Gate,
    GatedEffects,
    OperatingSystem,
    SpawnPlan,
    VirtualClock,
    found,
)
from tests.kit.shell.ledger import Caller, Ledger
from tests.kit.shell.pumped import PumpedOwner
from tests.kit.shell.records import outcomes
from tests.kit.shell.scene import Mishap, Scene

Choose = Callable[[Sequence[str]], int]
"""Returns the index of one of several alternatives, given by name."""


@dataclass(frozen=True, slots=True)
class Move:
    """Something that may happen next.

    Attributes:
        is_own: It happens by itself: no client has to act, and nothing fails.
    """

    who: str
    text: str
    act: Callable[[], object]
    is_own: bool = True

    @property
    def label(self) -> str:
        return f"{self.who}: {self.text}"


@dataclass(frozen=True)
class Instant:
    """The state of a stage as the invariants read it: a `tests.kit.machine.observed.World`."""

    state: State
    ctx: Context
    alive: frozenset[Process]
    in_flight: tuple[EffectInFlight, ...]
    beside: frozenset[tuple[str, Generation]]
    concluded: frozenset[Generation]
    reported_ended: frozenset[int]
    tokens: frozenset[Generation]
    unanswered: frozenset[Ticket]
    ended: frozenset[Ticket]
    accepted: Mapping[Ticket, Generation]
    asked: Mapping[Ticket, Target]
    holding: frozenset[Ticket]
    inside: frozenset[Ticket]
    let_in: frozenset[Ticket]
    is_open: bool
    is_told_drained: bool
    is_found: bool
    was_shut_down: bool
    is_quiescent: bool


class BrokenError(Exception):
    """An invariant does not hold."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(f"{violation.invariant}: {violation.message}")
        self.violation = violation


class Stage(PumpedOwner):
    """One schedule, as far as it has got.

    Attributes:
        story: The moves so far.
        published: The snapshots that were published when a call was answered or an effect started.
        tokens: The tokens of the effects that were started.
        healthy: The loads that became Healthy.
        is_checking: Check every step; not needed for steps that were checked before.
    """

    def __init__(self, scene: Scene, choose: Choose) -> None:
        self.scene = scene
        self.choose = choose
        self.clock = VirtualClock()
        self.at_once: list[LookUp] = []
        self.machine = scene.machine
        self.os = OperatingSystem()
        self._begin()
        self.ledger = Ledger(scene.actions)
        self.progress = [0] * len(scene.clients)
        self.story: list[StoryLine] = []
        self.is_checking = False
        self.mishaps = self.pairs = 0
        if scene.warm is not None:
            self._warm_up(scene.warm)
        self.mishaps, self.pairs = scene.mishaps, scene.pairs

    def _begin(self) -> None:
        """Begin with a new owner, and whatever is in the slot."""
        super().__init__(self._make_owner())
        self.late: list[Caller] = []
        self.looking: list[LookUp] = []
        self.owed: list[EffectInFlight] = []
        self.beside: set[tuple[str, Generation]] = set()
        self.reported_ended: set[int] = set()
        self.let_in: frozenset[Ticket] = frozenset()
        self.tokens: list[tuple[Generation, CancelToken]] = []
        self.published: list[Snapshot] = []
        self.healthy: set[Generation] = set()
        self.transitions = 0
        self.first_generation = 1

    def _make_owner(self) -> Owner:
        return self.scene.owner(
            self._make_effects,
            policy=self.scene.policy,
            clock=self.clock,
            machine=self.machine,
            jitter=lambda: 1.0,
        )

    def _make_effects(self, post: Callable[[Fact], None]) -> GatedEffects:
        return GatedEffects(
            post,
            clock=self.clock,
            os=self.os,
            notices_exits=False,
            watch=self._watch,
            plan_spawn=self._plan_spawn,
            look_ups=self._begin_look_up,
        )

    def _warm_up(self, model: str) -> None:
        """Make a model Healthy, and start from there."""
        caller = Caller(parse(f"load {model}")[0][0])
        self._open(caller)
        self._send(caller)
        self.settle()
        while self.looking:
            self._end_look_up(self.looking[0])
            self.settle()
        assert self.state is State.HEALTHY, self.owner.snapshot
        self.story.clear()

    def close(self) -> None:
        """End this schedule, in any state."""

    # -------------------------------------------------------------------------- what may happen

    def moves(self) -> list[Move]:
        """Return the moves that may come next; those that happen by themselves come first."""
        found: list[Move] = []
        if self.inbox.facts:
            text = f"takes up {_named(self.inbox.facts[0])}"
            found.append(Move("owner", text, self.pump_next))
            if not self.pairs:
                return found
        found += self._own_moves()
        for number, client in enumerate(self.scene.clients):
            if self.progress[number] < len(client):
                found += self._client_moves(number, client[self.progress[number]])
        found += self._mishaps_from_outside()
        return found

    def do(self, move: Move) -> None:
        """Carry out a move. One that happens while the inbox holds a fact uses up a pair."""
        is_pair = bool(self.inbox.facts) and move.who != "owner"
        before, lines = self.owner.snapshot.state, len(self.story)
        move.act()
        self.pairs -= is_pair
        if len(self.story) == lines:
            self.story.append(StoryLine(move.who, move.text, before, before, ()))

    def _own_moves(self) -> Iterator[Move]:
        for gate in self.effects.parked:
            yield from self._ends_of(gate)
        for exited in self.effects.exits:
            text = f"the exit of server {exited.exit.pid} is noticed"
            yield Move("system", text, partial(self.effects.notice_exit, exited))
        for caller in self.late:
            text = f"call {caller.ticket} arrives"
            yield Move("threads", text, partial(self._arrive, caller))
        for look_up in self.looking:
            text = f"the look-up of call {look_up.ticket} ends"
            yield Move("system", text, partial(self._end_look_up, look_up))
        if (hung := self._hung_child()) is not None:
            text = f"the hang of server {hung.pid} is noticed"
            yield Move("system", text, partial(self.effects.notice_hang, hung))
        if self.timers:
            kind, generation = min(self.timers, key=self.timers.__getitem__)
            text = f"the {kind} timer of load {generation} fires"
            yield Move("clock", text, self._fire_timer)

    def _ends_of(self, gate: Gate) -> Iterator[Move]:
        """Yield how an effect may end: it succeeds, fails, or was cancelled."""
        what = f"the {gate.kind} of load {gate.generation}"
        effect, alive = gate.effect, self.effects.os.alive
        is_dead = isinstance(effect, Probe) and not self._may_answer(alive.get(effect.child.pid))
        never_lived = isinstance(effect, Spawn) and gate.child is None
        fails = Move("system", f"{what} fails", gate.fail)
        if is_dead or never_lived:
            yield fails
            return
        yield Move("system", f"{what} succeeds", gate.succeed)
        kind = "download" if gate.kind == "resolve" else gate.kind  # both fail alike
        if gate.token.is_set() and kind in ("download", "probe"):
            yield fails
        elif kind != "spawn" and self._may(cast("Mishap", kind)):
            yield replace(fails, act=partial(self._mishap, gate.fail), is_own=False)

    def _may_answer(self, process: Process | None) -> bool:
        """Whether it answers a probe; one that is adopted must be as its keeper remembers it."""
        job = self.owner.snapshot.ctx.job
        if process is None or process.is_hung or job is None:
            return False
        return not job.is_adoption or job.target.request.model_path == process.model

    def _hung_child(self) -> Child | None:
        """The server that is watched, if it hangs and nobody has said so."""
        ctx, told = self.owner.snapshot.ctx, any(isinstance(f, Hung) for f in self.inbox.facts)
        process = self.os.alive.get(ctx.child.pid) if ctx.child else None
        is_watched = self.state is State.HEALTHY and not told
        return ctx.child if process and process.is_hung and is_watched else None

    def _client_moves(self, number: int, action: Action) -> Iterator[Move]:
        about = self.ledger.callers[action.refers]
        is_possible = True
        match action.verb:
            case "withdraw":
                is_possible = about.call is not None
            case "release":
                is_possible = isinstance(about.answer, LeaseGranted)
            case "cancel" if action.request_id is None:
                is_possible = about.known_generation is not None
        if is_possible:
            act = partial(self._act, number, action)
            yield Move(f"client {number + 1}", action.text, act, is_own=False)

    def _mishaps_from_outside(self) -> Iterator[Move]:
        os = self.effects.os
        if self._may("crash"):
            for process in os.alive.values():
                if process.generation and not process.is_left:
                    crash = partial(self._mishap, partial(self.effects.crash, process.pid))
                    yield Move("system", f"server {process.pid} dies", crash, is_own=False)
        if self._may("keeper"):
            yield from self._ends_of_the_keeper()
        if self._may("hang"):
            yield from self._hangs()
        if self._may("host"):
            yield from self._ends_of_the_host()
        if self._may("stray") and not os.alive:
            intrude = partial(self._mishap, os.intrude)
            yield Move("system", "a stray process holds the slot", intrude, is_own=False)
        if self._may("look-up"):
            for look_up in self.looking:
                text = f"the look-up of call {look_up.ticket} fails"
                refuse = partial(self._mishap, partial(self._refuse, look_up))
                yield Move("system", text, refuse, is_own=False)

    def _hangs(self) -> Iterator[Move]:
        for process in self.os.alive.values():
            if process.generation and not process.is_left and not process.is_hung:
                hang = partial(self._mishap, partial(self.os.hang, process.pid))
                yield Move("system", f"server {process.pid} hangs", hang, is_own=False)

    def _ends_of_the_host(self) -> Iterator[Move]:
        """Its server may end with it, or be found by the next owner, with any memory of it."""
        lose = partial(self._mishap, partial(self._lose_host, None, None))
        text = "the host is killed"
        yield Move("system", f"{text}, and its server with it", lose, is_own=False)
        for process in self.os.alive.values():
            for kind in sorted(FOUND) if self.scene.policy.keeps_server else ["found_unknown"]:
                model = {"found": process.model, "found_changed": "Changed"}.get(kind)
                lose = partial(self._mishap, partial(self._lose_host, process, model))
                yield Move("system", f"{text} ({kind})", lose, is_own=False)

    def _lose_host(self, left: Process | None, model: str | None) -> None:
        """The host is killed, and the next owner begins with what it finds."""
        self.ledger.lose_all()
        self.os.lock = None
        if left is None:
            self.os.alive.clear()
        self._begin()
        if left is not None:
            notice = Noticed("found", left.generation, left.pid)
            self.first_generation = max(1, left.generation)
            self.owner.post(replace(tell_found(notice, model), at=self.clock()))

    def _ends_of_the_keeper(self) -> Iterator[Move]:
        for process in self.effects.os.alive.values():
            for leaves in (False, True) if process.generation and not process.is_left else ():
                lose = partial(self.effects.lose_keeper, process.pid, leaves_child=leaves)
                text = f"server {process.pid} dies with its keeper"
                text += ", but not its child" if leaves else ""
                yield Move("system", text, partial(self._mishap, lose), is_own=False)

    def _may(self, kind: Mishap) -> bool:
        return self.mishaps > 0 and kind in self.scene.kinds

    def _mishap(self, what: Callable[[], object]) -> None:
        self.mishaps -= 1
        what()

    # --------------------------------------------------------------------------------- clients

    def _act(self, number: int, action: Action) -> None:
        self.progress[number] += 1
        caller, about = self.ledger.callers[action.index], self.ledger.callers[action.refers]
        match action.verb:
            case "withdraw":
                assert about.call is not None
                if about.action.verb == "lease":  # as the facades do: it may have been granted
                    about.leave()
                about.call.settled.cancel()
            case "release":
                about.leave()
            case "lease" if (call := self._enter(Ticket(-1 - action.index))) is not None:
                self.ledger.entered(caller, call)
            case "load" if action.is_late:
                self._open(caller)
                self.late.append(caller)
            case _:
                self._open(caller)
                self._send(caller, about)
        if self.is_checking and "lease" in {action.verb, about.action.verb}:  # maybe no fact
            _raise(check_world(self._instant()))

    def _enter(self, who: Ticket) -> Call | None:
        """Enter the gate, if it is open; this is no call of the owner, and has no ticket of its."""
        return self._inside_of(who) if self.owner.gate.enter(who) is not None else None

    def _inside_of(self, who: Ticket) -> Call:
        """Return what stands for a lease that has been granted without the machine."""
        running = self.owner.snapshot.ctx.running
        if running is None:
            message = "a caller was let in when the server was gone"
            raise BrokenError(Violation("inv_nobody_is_let_in_late", message))
        call = Call(who, gate=self.owner.gate)
        call.settled.set_result(LeaseGranted(running.target, running.child, running.server))
        return call

    def has_left(self, caller: Caller) -> bool:
        """Whether a caller has given up its lease, which may have been granted."""
        return False

    @property
    def counted(self) -> frozenset[Ticket]:
        """The leases that the gate counts."""
        return frozenset(cast("set[Ticket]", self.owner.gate._inside))

    def _open(self, caller: Caller) -> None:
        self._record_call(caller, self.owner.call())

    def _record_call(self, caller: Caller, call: Call) -> None:
        self.ledger.opened(caller, call)
        call.settled.add_done_callback(
            lambda done: None if done.cancelled() else self.published.append(self.owner.snapshot)
        )

    def _arrive(self, caller: Caller) -> None:
        self.late.remove(caller)
        self._send(caller)

    def _begin_look_up(self, command: LookUp) -> None:
        """It ends in the same move, unless it is slow."""
        self.looking.append(command)
        caller = self.ledger.caller(command.ticket)
        if caller is None or not caller.action.is_slow:
            self.at_once.append(command)

    def _end_look_up(self, command: LookUp) -> None:
        self.looking.remove(command)
        self.owner.post(found(command, self.clock()))

    def _refuse(self, command: LookUp) -> None:
        self.looking.remove(command)
        problem = Problem("model_not_found", "no such file")
        self.owner.post(LookUpFailed(command.ticket, problem, self.clock()))

    def _send(self, caller: Caller, about: Caller | None = None) -> None:
        action, ticket, now = caller.action, caller.ticket, self.clock()
        fact: Request
        match action.verb:
            case "load" | "prefetch":
                assert action.request is not None
                fact = LookUpRequested(ticket, action.request, action.verb, now)
            case "unload":
                fact = UnloadRequested(ticket, action.model, now, action.cuts)
            case "lease":
                fact = LeaseRequested(ticket, now)
            case "shutdown":
                fact = ShutdownRequested(ticket, now)
            case _:
                known = about.known_generation if about and action.request_id is None else None
                fact = CancelRequested(ticket, action.request_id, known, now)
        assert caller.call is not None
        self.owner.ask(caller.call, fact)

    # ---------------------------------------------------------------------------------- effects

    def _watch(self, effect: Effect, token: CancelToken) -> None:
        self.published.append(self.owner.snapshot)
        self.tokens.append((effect.generation, token))
        kind, generation = KINDS[type(effect)], effect.generation
        last = self.machine.last
        ctx = last.ctx if last is not None else self.owner.snapshot.ctx
        if ctx.effect == EffectInFlight(cast("EffectKind", kind), generation):
            self.owed.append(EffectInFlight(cast("EffectKind", kind), generation))
        else:
            self.beside.add(("resolve" if kind == "resolve" else "prefetch", generation))

    def _plan_spawn(self, spawn: Spawn) -> SpawnPlan:
        if not self._may("spawn"):
            return "lives"
        plans: tuple[SpawnPlan, ...] = ("lives", "fails", "raises")
        what = f"the spawn of load {spawn.generation}"
        plan = plans[self.choose([f"system: {what} {plan}" for plan in plans])]
        self.mishaps -= plan != "lives"
        return plan

    # --------------------------------------------------------------------------------- the owner

    def _fire_timer(self) -> None:
        kind, generation = min(self.timers, key=self.timers.__getitem__)
        self.clock.now = max(self.clock.now, self.owner._timers.pop((kind, generation)))
        self.pump(TimerFired(generation, self.clock.now, kind))

    @property
    def timers(self) -> dict[tuple[Timer, Generation], float]:
        """The timers of the owner, without those of look-ups that have ten minutes, and without
        the idle time of a server in use.
        """
        patient = {
            Generation(look_up.ticket)
            for look_up in self.owner.snapshot.ctx.look_ups
            if look_up.request.deadline_s is None
        }
        left_out = {("look_up", generation) for generation in patient}
        if self.owner.gate.inside and (running := self.owner.snapshot.ctx.running) is not None:
            left_out.add(("idle", running.generation))  # it would only start over
        return {key: at for key, at in self.owner._timers.items() if key not in left_out}

    def pump(self, fact: Fact) -> None:
        self._process(fact)
        while self.owner._at_once or self.at_once:  # nothing can come between
            if self.owner._at_once:
                self._process(self.owner._at_once.popleft())
                continue
            command = self.at_once.pop()
            self.looking.remove(command)
            self._process(found(command, self.clock()))

    def _process(self, fact: Fact) -> None:
        self.ledger.process(fact)
        before, state = self._instant() if self.is_checking else None, self.owner.snapshot.state
        if isinstance(fact, get_args(Completion)):
            ended = EffectInFlight(cast("EffectKind", fact.effect), fact.generation)
            if ended in self.owed:
                self.owed.remove(ended)
            else:
                self.beside -= {(kind, ended.generation) for kind in ("resolve", "prefetch")}
        self.published.clear()
        self.machine.take_last()
        self.owner.pump(fact)
        stepped = self.machine.take_last()
        if stepped is not None:
            self._note(stepped, state)
        outcome = tuple(filter(None, map(describe, stepped.commands if stepped else ())))
        now = self.owner.snapshot.state
        self.story.append(StoryLine("owner", f"takes up {_named(fact)}", state, now, outcome))
        if before is not None:
            self._check(before, fact, stepped)

    def _note(self, stepped: Stepped, before: State) -> None:
        self.transitions += stepped.state is not before
        if stepped.state is State.HEALTHY and stepped.ctx.running is not None:
            self.healthy.add(stepped.ctx.running.generation)
        for command in stepped.commands:
            self.ledger.apply(command)
            if isinstance(command, CloseGate):
                self.let_in = self.counted
            if isinstance(command, ServerEnded):
                self.reported_ended.add(command.pid)

    # --------------------------------------------------------------------------------- looking

    @property
    def is_quiescent(self) -> bool:
        """Nothing more happens by itself."""
        return not (
            self.inbox.facts
            or self.effects.parked
            or self.effects.exits
            or self.late
            or self.looking
            or self.timers
            or self._hung_child()
        )

    def _instant(self) -> Instant:
        snapshot, calls = self.owner.snapshot, self.ledger.open_calls
        return Instant(
            snapshot.state,
            snapshot.ctx,
            frozenset(self.effects.os.alive.values()),
            tuple(self.owed),
            frozenset(self.beside | self._look_ups()),
            frozenset(load.generation for load in snapshot.history),
            self._told_of_child(),
            frozenset(g for g, token in self.owner._tokens.items() if token.is_set()),
            self.ledger.having(Status.WAITING, Status.ENDED),
            self.ledger.having(Status.ENDED, Status.GONE),
            {caller.ticket: caller.generation for caller in calls if caller.generation},
            {caller.ticket: target(c) for caller in calls if (c := caller.action.request)},
            self.ledger.having(Status.HELD),
            self.counted,
            self.counted if self.owner.gate._is_open else self.let_in,
            self.owner.gate._is_open,
            any(isinstance(fact, Drained) for fact in (*self.inbox.facts, *self.owner._at_once)),
            any(isinstance(fact, Found) for fact in self.inbox.facts),
            self.ledger.was_shut_down,
            self.is_quiescent,
        )

    def _look_ups(self) -> set[tuple[str, Generation]]:
        """The look-ups in progress: an answer that waits in the inbox is owed too."""
        answered = [f for f in self.inbox.facts if isinstance(f, get_args(LookedUp))]
        tickets = [c.ticket for c in self.looking] + [cast("LookedUp", f).ticket for f in answered]
        return {("look_up", Generation(ticket)) for ticket in tickets}

    def _told_of_child(self) -> frozenset[int]:
        child = self.owner.snapshot.ctx.child
        return frozenset(self.reported_ended & {child.pid} if child is not None else ())

    def key(self) -> tuple[object, ...]:
        """Return all that the future depends on: equal keys have equal futures."""
        owner, os, callers = self.owner, self.effects.os, self.ledger.callers
        return (
            owner.snapshot.state,
            replace(owner.snapshot.ctx, last_error=None, last_exit=None),  # no guard reads them
            tuple(self.inbox.facts),
            tuple((g.kind, g.generation, g.child, g.token.is_set()) for g in self.effects.parked),
            tuple(self.effects.exits),
            frozenset(os.alive.values()),
            len(os.started),
            os.lock is None,
            tuple(self.progress),
            tuple((c.status, c.ticket, c.generation, c.is_settled) for c in callers),
            tuple(caller.ticket for caller in self.late),
            tuple(look_up.ticket for look_up in self.looking),
            frozenset(owner._timers.items()),
            frozenset((g, token.is_set()) for g, token in owner._tokens.items()),
            tuple((g, isinstance(o, LoadOutcome)) for g, o in outcomes(owner).items()),
            frozenset(self.beside),
            self._told_of_child(),
            (
                self.counted,
                owner.gate._is_open,
                owner.gate._drains,
                owner.gate._used_at,
                owner.gate.server,
            ),
            self.let_in,
            frozenset(owner._calls),
            frozenset(self.ledger.cancelled_ids),
            self.clock.now,
            self.mishaps,
            self.pairs,
            self.first_generation,
        )

    # -------------------------------------------------------------------------------- checking

    def _check(self, before: Instant, fact: Fact, stepped: Stepped | None) -> None:
        after = self._instant()
        if stepped is not None:
            _raise(check_edge(Edge(before, fact, after, stepped.commands)))
            _raise(check_world(after))
        _raise(promises.check_step(self, fact, stepped))

    def check_rest(self) -> None:
        """Check what must be true when nothing more happens by itself."""
        if self.is_quiescent:
            _raise(check_world(self._instant()))
            _raise(promises.check_rest(self))


def _raise(violation: Violation | None) -> None:
    if violation is not None:
        raise BrokenError(violation)


def _named(fact: Fact) -> str:
    match fact:
        case LookUpRequested():
            return f"call {fact.ticket}: look up {fact.request.model_path}"
        case LoadRequested():
            return f"call {fact.ticket}: load {fact.target.request.model_path}"
        case CancelRequested():
            return f"call {fact.ticket}: cancel {fact.request_id or f'load {fact.generation}'}"
        case _ if hasattr(fact, "ticket"):
            return f"call {fact.ticket}: {fact.trigger}"
        case _:
            return f"{fact.trigger} of load {cast('Any', fact).generation}"
