"""What may happen in a world, and the worlds that follow: programs and faults around the machine.

The operating system is modelled faithfully where it matters. A server lives from its spawn on, and
`Spawned` arrives later. A cancelled effect still ends, perhaps with success. A successful kill
leaves nothing alive. An exit is noticed some time after it happened. The evidence of a fact is
true in the step that processes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine import facts
from orchestrator.machine.commands import Command, Spawn
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import (
    CancelRequested,
    Child,
    Drained,
    Emptied,
    Fact,
    Fetched,
    FetchFailed,
    KillFailed,
    LeaseRequested,
    LookUpRequested,
    NotReady,
    Promoted,
    Resolved,
    ShutdownRequested,
    Spawned,
    SpawnFailed,
    TimerFired,
    UnloadRequested,
    Withdrawn,
)
from orchestrator.machine.states import State
from tests.kit.machine.consequences import Changes
from tests.kit.machine.observed import Process, owed_by
from tests.kit.machine.programs import Action
from tests.kit.machine.world import (
    AT,
    FOUND,
    STRAY,
    Call,
    Core,
    Faults,
    FoundKind,
    Noticed,
    Status,
    Timer,
    Work,
    World,
    became_ready,
    child_is_alive,
    evidence,
    exited,
    files,
    found,
    hung,
    load_requested,
    look_up_failed,
    look_up_requested,
    prefetch_requested,
    resolved,
    sized,
    stale_completions,
    watched,
)


class Move(NamedTuple):
    """Something that may happen next.

    Attributes:
        who: Who does it: `client 2`, `system`, `clock`, `adversary`.
        text: What happens, in words.
        world: The world when the fact is processed.
        fact: The fact for the machine, if there is one.
        ends: The work that ends with it.
        is_own: It happens by itself, without a client or a fault from outside.
        is_good: It is not a failure.
    """

    who: str
    text: str
    world: World
    fact: Fact | None
    ends: Work | None = None
    is_own: bool = True
    is_good: bool = True


@dataclass(frozen=True)
class Scenario:
    """The programs of the clients, the faults and the policy."""

    clients: tuple[tuple[Action, ...], ...]
    faults: Faults
    policy: Policy

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        return tuple(action for client in self.clients for action in client)

    def start(self, core: Core) -> World:
        return World(
            core,
            calls=(Call(),) * len(self.actions),
            progress=(0,) * len(self.clients),
            strays=self.faults.strays,
            keepers=self.faults.keeper,
            hangs=self.faults.hang,
            hosts=self.faults.host,
            stale=self.faults.stale,
        )

    # -------------------------------------------------------------------------------- moves

    def moves(self, world: World) -> Iterator[Move]:
        yield from self.own_moves(world)
        if any(noticed.kind in FOUND for noticed in world.noticed):
            return  # the next owner hears of it before any call
        for number, client in enumerate(self.clients):
            if world.progress[number] < len(client):
                yield from self._client_moves(world, number, client[world.progress[number]])
        yield from self._faults_from_outside(world)

    def own_moves(self, world: World) -> Iterator[Move]:
        """Yield the moves that need no client: effects end, exits are noticed, timers fire."""
        for work in world.work:
            yield from getattr(self, f"_end_{work.kind}")(world, work)
        for noticed in sorted(world.noticed):
            yield self._arrival_of(world, noticed)
        for timer in sorted(world.timers):
            if timer.kind == "idle":
                yield from self._end_idle_time(world, timer)
                continue
            text = f"the {timer.kind} timer of load {timer.generation} fires"
            fact = TimerFired(timer.generation, AT, timer.kind)
            after = world._replace(timers=world.timers - {timer})
            is_good = timer.kind not in {"deadline", "look_up"}
            yield Move("clock", text, after, fact, is_good=is_good)
        for process in watched(world, is_hung=not self.faults.calls_a_worker_hung):
            notice = Noticed("hung", process.generation, process.pid)
            if notice not in world.noticed:
                noticing = world._replace(noticed=world.noticed | {notice})
                text = f"the hang of server {process.pid} is noticed"
                yield Move("system", text, noticing, None, is_good=False)

    def _arrival_of(self, world: World, noticed: Noticed) -> Move:
        after = world._replace(noticed=world.noticed - {noticed})
        match noticed.kind:
            case "exited":
                text = f"the exit of server {noticed.pid} is noticed"
                return Move("system", text, after, exited(noticed.generation, noticed.pid))
            case "sized":
                text = f"server {noticed.pid} has printed its memory"
                return Move("system", text, after, sized(noticed.generation))
            case "hung":
                text = f"the hang of server {noticed.pid} is reported"
                return Move("system", text, after, hung(noticed.generation, noticed.pid))
            case "drained":
                text = f"the last one has left server {noticed.generation}"
                return Move("system", text, after, Drained(noticed.generation, AT))
            case "promote":
                promoted = Promoted(noticed.generation, AT, child_is_alive(world))
                return Move("machine", f"load {noticed.generation} may start", after, promoted)
            case _:
                model = next((p.model for p in world.alive if p.pid == noticed.pid), "Gone")
                models = {"found": model, "found_changed": "Changed"}
                text = f"the next owner finds server {noticed.pid} ({noticed.kind})"
                return Move("system", text, after, found(noticed, models.get(noticed.kind)))

    def _end_idle_time(self, world: World, timer: Timer) -> Iterator[Move]:
        """The gate is asked; a server that was used meanwhile has its idle time once more."""
        text, running = f"the idle timer of load {timer.generation} fires", world.core.ctx.running
        after = world._replace(timers=world.timers - {timer})
        fact = TimerFired(timer.generation, AT, timer.kind)
        is_asked = running is not None and running.generation == timer.generation
        if running is None or not is_asked or running.idle_ttl_s is None or not world.gate.is_open:
            yield Move("clock", text, after, fact)
            return
        if not world.gate.inside:
            closed = after._replace(gate=world.gate._replace(is_open=False, is_held=True))
            yield Move("clock", text, closed, replace(fact, idle_in_s=0.0))
        used = replace(fact, idle_in_s=1.0)
        yield Move("clock", f"{text}, and it has been used", after, used, is_own=False)

    def _end_kill(self, world: World, work: Work) -> Iterator[Move]:
        if world.alive:
            exits = {
                Noticed("exited", p.generation, p.pid)
                for p in world.alive
                if p.generation and not p.is_left
            }
            dead = world._replace(alive=frozenset(), noticed=world.noticed | exits)
            yield Move("system", f"the kill ends {_pids(world)}", dead, None)
        if not world.alive or self.faults.is_empty_too_early:
            yield Move(
                "system", "the slot is verified empty", world, Emptied(work.generation, AT), work
            )
        if self.faults.kill:
            fact = KillFailed(work.generation, AT, Problem("slot_occupied", "it survives"))
            yield Move("system", "the kill fails", world, fact, work, is_good=False)

    def _end_download(self, world: World, work: Work) -> Iterator[Move]:
        fetched = Fetched(work.generation, AT, files(work.model), evidence(world))
        text = f"{work.model} is downloaded"
        yield Move("system", text, world, fetched, work, is_good=not world.alive)
        if self.faults.download:
            fact = FetchFailed(
                work.generation, AT, Problem("hub_unreachable", "the Hub is unreachable")
            )
            yield Move("system", "the download fails", world, fact, work, is_good=False)

    def _end_resolve(self, world: World, work: Work) -> Iterator[Move]:
        fact = Resolved(work.generation, AT, resolved(work.model))
        yield Move("system", f"{work.model} is resolved", world, fact, work)
        yield from self._refused(world, work, "the Hub refuses the model")

    def _end_prefetch(self, world: World, work: Work) -> Iterator[Move]:
        fact = Fetched(work.generation, AT, files(work.model))
        yield Move("system", f"{work.model} is downloaded", world, fact, work)
        yield from self._refused(world, work, "the download fails")

    def _refused(self, world: World, work: Work, text: str) -> Iterator[Move]:
        if self.faults.download:
            fact = FetchFailed(
                work.generation, AT, Problem("hub_unreachable", "the Hub is unreachable")
            )
            yield Move("system", text, world, fact, work, is_good=False)

    def _end_look_up(self, world: World, work: Work) -> Iterator[Move]:
        ticket = Ticket(work.generation)
        action = self._action_of(world, ticket)
        assert action.request is not None
        fact: Fact = prefetch_requested(ticket, action.request)
        if action.verb == "load":
            fact = load_requested(ticket, action.request, child_is_alive(world))
        yield Move("system", f"{action.request.model_path} is found", world, fact, work)
        if action.is_slow and self.faults.look_up:
            text = f"{action.request.model_path} is not found"
            yield Move("system", text, world, look_up_failed(ticket), work, is_good=False)

    def at_once(self, move: Move, after: World) -> Move | None:
        """Return what follows before anything else: the drain of a server that nobody uses, or the
        end of the look-up that a call has begun, unless it is slow.
        """
        for noticed in after.noticed - move.world.noticed:
            if noticed.kind == "drained" and move.fact is not None:
                return self._arrival_of(after, noticed)
        if not isinstance(move.fact, LookUpRequested):
            return None
        ticket = move.fact.ticket
        if self._action_of(after, ticket).is_slow:
            return None
        begun = next((w for w in after.work if w == Work("look_up", Generation(ticket))), None)
        if begun is None:
            return None
        return next(self._end_look_up(after, begun))

    def _action_of(self, world: World, ticket: Ticket) -> Action:
        index = next(i for i, c in enumerate(world.calls) if c.status and c.ticket == ticket)
        return self.actions[index]

    def _end_spawn(self, world: World, work: Work) -> Iterator[Move]:
        if work.pid:
            child = Child(work.generation, work.pid)
            spawned = Spawned(work.generation, AT, child)
            yield Move("system", f"server {work.pid} is handed over", world, spawned, work)
        else:
            fact = SpawnFailed(work.generation, AT, Problem("server_unavailable", "no such file"))
            yield Move("system", "the start fails", world, fact, work, is_good=False)

    def _end_probe(self, world: World, work: Work) -> Iterator[Move]:
        job = world.core.ctx.job
        server = next((p for p in world.alive if p.pid == work.pid), None)
        is_alive = server is not None
        if server is not None and job is not None and job.is_adoption:
            is_unchanged = job.target.request.model_path == server.model
            is_alive = is_unchanged or self.faults.adopts_without_comparing
        is_silent = server is not None and (server.is_hung or not is_alive)
        is_alive = is_alive and not is_silent
        if (self.faults.health and not is_silent) or is_alive:
            ready = became_ready(work.generation, child_is_alive(world))
            text = f"server {work.pid} answers that it is ready"
            yield Move("system", text, world, ready, work, is_good=is_alive)
        if self.faults.health or not is_alive:
            problem = Problem("server_start_failed", "it does not answer")
            fact = NotReady(work.generation, AT, problem)
            yield Move("system", "the health wait fails", world, fact, work, is_good=False)

    def _client_moves(self, world: World, number: int, action: Action) -> Iterator[Move]:
        who, mine = f"client {number + 1}", world.calls[action.index]
        about = world.calls[action.refers]
        if action.verb == "release" and about.status is not Status.HELD:
            return
        if action.verb == "cancel" and action.request_id is None and not about.generation:
            return
        ticket = mine.ticket if mine.status else _next_ticket(world)
        enters = action.verb == "lease" and world.gate.is_open  # there is nothing to wait for
        if action.is_late and mine.status is Status.UNSENT and not enters:
            is_ended = action.request_id in world.cancelled_ids
            status = Status.CALLED_ENDED if is_ended else Status.CALLED
            called = _with_call(world, action.index, Call(status, ticket))
            yield Move(who, f"calls {action.text}", called, None, is_own=False)
            return
        progress = list(world.progress)
        progress[number] += 1
        world = world._replace(progress=tuple(progress))
        yield Move(who, action.text, *self._arrive(world, action, ticket), is_own=False)

    def _enter(self, world: World, action: Action, ticket: Ticket) -> World:
        """A lease of a server whose gate is open is no fact."""
        gate = world.gate._replace(inside=world.gate.inside | {ticket})
        return _with_call(world._replace(gate=gate), action.index, Call(Status.HELD, ticket))

    def _leave(self, world: World, index: int, status: Status) -> World:
        """A lease ends; the last one to leave a closed gate says so."""
        call, gate = world.calls[index], world.gate
        world = _with_call(world, index, call._replace(status=status))
        if call.ticket not in gate.inside:
            return world
        gate = gate._replace(inside=gate.inside - {call.ticket})
        world = world._replace(gate=gate)
        if gate.inside or not gate.drains or self.faults.loses_the_last:
            return world
        notice = Noticed("drained", gate.generation)
        return world._replace(noticed=world.noticed | {notice})

    def _arrive(self, world: World, action: Action, ticket: Ticket) -> tuple[World, Fact | None]:
        """Return the world in which the machine processes the call, and the fact, if it is one."""
        mine, about = world.calls[action.index], world.calls[action.refers]
        gate = world.gate
        is_asked = mine.status is Status.UNSENT
        is_let_in = gate.is_open or (self.faults.lets_in_late and gate.generation > 0)
        if action.verb == "lease" and is_asked and is_let_in:
            return self._enter(world, action, ticket), None
        if action.verb == "release" or (action.verb == "withdraw" and about.status is Status.HELD):
            status = Status.DONE if action.verb == "release" else Status.GONE
            return self._leave(world, action.refers, status), None
        if action.verb == "withdraw":
            gone = about.status in {Status.WAITING, Status.ENDED}
            call = about._replace(status=Status.GONE) if gone else about
            return _with_call(world, action.refers, call), Withdrawn(about.ticket, AT)
        is_ended = mine.status is Status.CALLED_ENDED or (
            action.verb in _ENDABLE and action.request_id in world.cancelled_ids
        )
        called = Call(Status.ENDED if is_ended else Status.WAITING, ticket)
        world = _with_call(world, action.index, called)
        match action.verb:
            case "load" | "prefetch":
                return world, look_up_requested(action, ticket)
            case "lease":
                return world, LeaseRequested(ticket, AT, child_is_alive(world))
            case "unload":
                world = self._end(
                    world, lambda a, _: a.verb == "load" and action.model in (None, _model(a))
                )
                return world, UnloadRequested(ticket, action.model, AT, action.cuts)
            case "shutdown":
                return self._end(world, lambda _, __: True), ShutdownRequested(
                    ticket, AT, can_be_kept=child_is_alive(world)
                )
            case _:
                return self._cancel(world, action, about), CancelRequested(
                    ticket, action.request_id, about.generation or None, AT
                )

    def _cancel(self, world: World, action: Action, about: Call) -> World:
        """Mark the loads that a cancel ends; a load of an unknown id may arrive later."""
        name = action.request_id
        if name is None:
            return self._end(world, lambda _, call: call.generation == about.generation)
        named = [
            call
            for a, call in zip(self.actions, world.calls, strict=True)
            if name == a.request_id and a.verb in _ENDABLE
        ]
        if any(map(_is_known, named)):
            return self._end(world, lambda a, call: a.request_id == name and _is_known(call))
        world = world._replace(cancelled_ids=world.cancelled_ids | {name})
        return self._end(world, lambda a, _: a.request_id == name)

    def _end(self, world: World, ends: Callable[[Action, Call], bool]) -> World:
        """Mark the loads that must not succeed any more."""
        to = {Status.WAITING: Status.ENDED, Status.CALLED: Status.CALLED_ENDED}
        calls = tuple(
            call._replace(status=to.get(call.status, call.status))
            if action.verb in _ENDABLE and ends(action, call)
            else call
            for action, call in zip(self.actions, world.calls, strict=True)
        )
        return world._replace(calls=calls)

    def _faults_from_outside(self, world: World) -> Iterator[Move]:
        if self.faults.crash:
            for process in sorted(world.alive):
                if process.generation and not process.is_left:
                    exit_ = Noticed("exited", process.generation, process.pid)
                    noticed = frozenset() if self.faults.loses_exits else {exit_}
                    dead = world._replace(
                        alive=world.alive - {process}, noticed=world.noticed | noticed
                    )
                    yield Move("system", f"server {process.pid} dies", dead, None, is_own=False)
        yield from self._ends_of_the_keeper(world)
        yield from self._hangs(world)
        yield from self._ends_of_the_host(world)
        if world.strays and world.core.state is State.DOWNLOADING and not world.alive:
            found = world._replace(alive=frozenset({STRAY}), strays=world.strays - 1)
            yield Move("system", "a stray process holds the slot", found, None, is_own=False)

    def _ends_of_the_keeper(self, world: World) -> Iterator[Move]:
        """The keeper is killed: its server dies with it, and is not handed over any more."""
        servers = [p for p in sorted(world.alive) if p.generation and not p.is_left]
        for process in servers if world.keepers else ():
            spawning = next((w for w in world.work if w.pid == process.pid), None)
            exit_ = {Noticed("exited", process.generation, process.pid)}
            is_handed_over = spawning is None or spawning.kind != "spawn"
            dead = world._replace(
                keepers=world.keepers - 1,
                alive=world.alive - {process},
                noticed=world.noticed | (exit_ if is_handed_over else frozenset()),
                work=tuple(
                    w if is_handed_over or w != spawning else w._replace(pid=0) for w in world.work
                ),
            )
            text = f"the keeper is killed, and server {process.pid} with it"
            yield Move("system", text, dead, None, is_own=False)
            left = process._replace(pid=process.pid + 1000, is_left=True)
            beside = dead._replace(alive=dead.alive | {left})
            yield Move("system", f"{text}, but not its child", beside, None, is_own=False)

    def _hangs(self, world: World) -> Iterator[Move]:
        for process in sorted(world.alive) if world.hangs else ():
            if process.generation and not process.is_left and not process.is_hung:
                alive = world.alive - {process} | {process._replace(is_hung=True)}
                hangs = world._replace(alive=alive, hangs=world.hangs - 1)
                yield Move("system", f"server {process.pid} hangs", hangs, None, is_own=False)

    def _ends_of_the_host(self, world: World) -> Iterator[Move]:
        """The host is killed, and with it all calls; the next owner begins with what it finds.

        By then its server may have ended, or may be as it was; its keeper may remember anything.
        """
        if not world.hosts:
            return
        fresh = Core(State.IDLE, Context(policy=self.policy))
        begun = self.start(fresh)._replace(
            calls=tuple(Call(Status.LOST, c.ticket) if c.status else c for c in world.calls),
            progress=world.progress,
            strays=world.strays,
            keepers=world.keepers,
            hangs=world.hangs,
            hosts=world.hosts - 1,
            stale=world.stale,
        )
        text = "the host is killed"
        yield Move("system", f"{text}, and its server with it", begun, None, is_own=False)
        for process in sorted(world.alive):
            is_kept = self.policy.keeps_server and process.generation and not process.is_left
            kinds: Sequence[FoundKind] = sorted(FOUND) if is_kept else ["found_unknown"]
            for kind in kinds:
                notice = Noticed(kind, process.generation, process.pid)
                left = begun._replace(alive=world.alive, noticed=frozenset({notice}))
                yield Move("system", f"{text} ({kind})", left, None, is_own=False)

    def stale_moves(self, world: World) -> Iterator[Move]:
        """Yield completions of what is not in flight: late, or reported twice."""
        if not world.stale:
            return
        reported = world._replace(stale=world.stale - 1)
        owed = owed_by((work.kind, work.generation) for work in world.work)
        for number in range(1, world.core.ctx.generation + 1):
            for fact in stale_completions(
                Generation(number), evidence(world), child_is_alive(world)
            ):
                if (fact.trigger, number) not in owed:
                    text = f"a late {fact.trigger} of load {number} arrives"
                    yield Move("adversary", text, reported, fact, is_own=False)
        if world.core.state is not State.IDLE:
            notice = Noticed("found", Generation(1), pid=99)
            told = found(notice, "Stale")
            yield Move("adversary", "a server is found late", reported, told, is_own=False)
        kinds: tuple[facts.Timer, ...] = ("look_up", "idle", "drain")
        for kind in kinds:  # of the load that warms up
            late = TimerFired(Generation(0), AT, kind)
            yield Move("adversary", f"a late {kind} timer fires", reported, late, is_own=False)

    # ---------------------------------------------------------------------------- commands

    def carry_out(
        self, world: World, ends: Work | None, core: Core, commands: tuple[Command, ...]
    ) -> Iterator[tuple[str, World]]:
        """Yield the worlds after a step: two if a spawn may fail."""
        spawn: Spawn | None = None
        changes = Changes(world, ends, core.ctx.effect)
        for command in commands:
            if isinstance(command, Spawn):
                spawn = command
            else:
                changes.carry_out(command)
        after = changes.world(core)
        if spawn is None:
            yield "", after
            return
        model = spawn.target.request.model_path
        pid = 100 + 10 * spawn.generation + 500 * (self.faults.host - after.hosts)
        while any(process.pid == pid for process in after.alive):
            pid += 1
        born = Process(pid, spawn.generation, model)
        work = Work("spawn", spawn.generation, pid, model)
        printed = {Noticed("sized", spawn.generation, pid)} if self.faults.figures else set()
        yield (
            f"server {pid} of {model} starts",
            after._replace(
                alive=after.alive | {born},
                work=(*after.work, work),
                noticed=after.noticed | printed,
            ),
        )
        if self.faults.spawn:
            work = Work("spawn", spawn.generation)
            yield "it cannot be started", after._replace(work=(*after.work, work))


_ENDABLE = frozenset({"load", "prefetch"})


def _is_known(call: Call) -> bool:
    """Return whether the machine has processed the call."""
    return call.status > Status.CALLED_ENDED


def _next_ticket(world: World) -> Ticket:
    """Return the next ticket in the order of calls, from 1; 0 is the load that warms up."""
    return Ticket(1 + sum(1 for call in world.calls if call.status))


def _with_call(world: World, index: int, call: Call) -> World:
    calls = list(world.calls)
    calls[index] = call
    return world._replace(calls=tuple(calls))


def _model(action: Action) -> str | None:
    return action.request.model_path if action.request else None


def _pids(world: World) -> str:
    return " and ".join(
        "the stray" if p is STRAY else f"server {p.pid}" for p in sorted(world.alive)
    )
