"""One schedule of a pool: its real owner, slots and facade, and the real owner of every slot.

All of them are pumped by hand: what would run on a thread of its own goes on when a move says so,
and stops where it would wait. What happens by itself at once (a fact is taken up, a thread wakes)
comes in a fixed order, but for `pairs` exceptions. What takes time (a health check, a kill, a
client, a crash) comes at any moment. After every move the stage is compared with the invariants of
the pool's machine (`tests.kit.pool.invariants`) and the promises of the shell (`pool_promises`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from orchestrator.base.tokens import Ticket
from orchestrator.machine import facts as slot_facts
from orchestrator.machine.commands import LookUp, Probe
from orchestrator.machine.states import State
from orchestrator.pool import facts
from orchestrator.pool.calls import PoolFacade
from orchestrator.pool.commands import Stop
from orchestrator.pool.context import Context
from orchestrator.pool.owner import PoolCall, PoolOwner
from orchestrator.pool.step import Stepped
from orchestrator.runtime.effects import looked_up
from orchestrator.runtime.owner import Owner
from orchestrator.runtime.parts import Parts
from orchestrator.server.devices import Device
from orchestrator.settings.memory import HOST
from tests.kit.machine.invariants import Violation
from tests.kit.machine.story import StoryLine
from tests.kit.machine.world import files
from tests.kit.shell import pool_promises
from tests.kit.shell.facade_stage import OverError, Puppet
from tests.kit.shell.fakes import FakeSlot, fake_parts
from tests.kit.shell.gates import Gate, GatedEffects, OperatingSystem, VirtualClock
from tests.kit.shell.pool_parts import Emptied, Inbox, SlotEffects, StagedMachine
from tests.kit.shell.pool_scene import Action, Mishap, PoolScene
from tests.kit.shell.scene import SHIPPED
from tests.kit.shell.stage import BrokenError, Choose, Move

__all__ = ["Choose", "PoolStage"]
Taken = tuple[Context, facts.Fact, Stepped]
_AT_ONCE: Final = frozenset({"resolve", "download", "spawn"})


class PoolStage:
    """One schedule, as far as it has got.

    Attributes:
        story: The moves so far.
        last: The last step of the pool: context, fact with its evidence, and result.
        calls: The call of each client's action.
        holding: The actions whose lease is being used, by model.
        ended: The actions that were interrupted.
        systems: What the kernel knows of each slot.
        owners: The present owner of each slot.
        lives: How often a slot was claimed, less how often it was released.
    """

    facade: type[PoolFacade[Any]]

    def __init__(self, scene: PoolScene, choose: Choose) -> None:
        self.scene = scene
        self.choose = choose
        self.clock = VirtualClock(0.0)
        self.story: list[StoryLine] = []
        self.is_checking = False
        self.mishaps = self.pairs = self.ticks = 0
        self.progress = [0] * len(scene.clients)
        self.calls: dict[int, PoolCall] = {}
        self.holding: dict[int, str] = {}
        self.given_back: set[int] = set()
        self.ended: set[int] = set()
        self.was_shut_down = False
        self.closing: Puppet | None = None
        self.systems = {name: OperatingSystem() for name in scene.names}
        self.owners: dict[str, Owner] = {}
        self.puppets: list[tuple[str, Puppet]] = []
        self.lives: dict[str, int] = {}
        self.last: Taken | None = None
        self.answers: dict[Ticket, str] = {}
        self.watch = pool_promises.Watch(self)
        self._begin()

    def _begin(self) -> None:
        scene = self.scene
        models = {
            name: {"model_path": f"/{name}", "memory": {"D0": f"{size} MiB"}}
            for name, size in zip(scene.names, scene.sizes, strict=True)
        }
        settings = {"memory": {"D0": f"{scene.budget} MiB"}, "min_resident_s": 0, "idle_ttl_s": 0}
        parts = self._parts()
        self.pool: Any = self.facade(
            {"pool": settings, "models": models}, llama_server="/llama", parts=parts
        )
        self.pool._make_owner = self._make_pool_owner
        self.pool._started()
        slots = self.pool._slots
        vars(slots)["rest"] = self._rest
        for name in scene.names:
            facade = slots.facade(name)
            slots._slots[name] = scene.slot(
                name, facade, self.owner.post, slots._workers, self.clock
            )
        for name in scene.warm:
            call = self.owner.call(name, "load")
            self.owner.post(facts.Wanted(name, call.ticket, "load", self.clock()))
            while own := list(self._at_once()) or list(self._in_time()):
                own[0].act()
        self.story.clear()
        self.mishaps, self.pairs, self.ticks = scene.mishaps, scene.pairs, scene.ticks

    def _parts(self) -> Parts:
        stage = self

        class Slot(FakeSlot):
            record_path = FakeSlot.directory / "record"

            def claim(self) -> None:
                stage.lives[self.name] = stage.lives.get(self.name, 0) + 1

            def release(self) -> None:
                stage.lives[self.name] -= 1

        return fake_parts(
            look_up=lambda request: files(Path(request.model_path).name),
            clock=self.clock,
            workers=lambda: self,
            slot=Slot,
            devices=lambda _: [Device(HOST, 9999, 9999)],
            effects=self._make_effects,
            owner=self._make_slot_owner,
            wait=self.wait,
        )

    # ------------------------------------------------------------------------------------- parts

    def _make_effects(self, slot: Any, post: Callable[[Any], None], *others: Any) -> GatedEffects:
        def look_up(command: LookUp) -> None:
            post(looked_up(command, others[-1]))

        made = SlotEffects(
            post,
            self.clock,
            self.systems[slot.name.rpartition(".")[2]],
            cast("Any", _AT_ONCE),
            notices_exits=False,
            look_ups=look_up,
            total_slots=self.scene.places,
        )
        made.slot = slot
        return made

    def _make_slot_owner(self, make: Callable[..., Any], **settings: Any) -> Owner:
        made = Owner(make, machine=SHIPPED, **settings)
        name = cast("SlotEffects", made.effects).name
        made._inbox = cast("Any", Inbox())
        stop = partial(self._stop, f"the owner of {name}", made, made.stop)
        vars(made).update(start=lambda _: None, stop=stop)
        self.owners[name] = made
        return made

    def _make_pool_owner(self, *given: Any) -> PoolOwner:
        self.machine = StagedMachine(self._decided)
        made = self.owner = self.scene.owner(*given, machine=self.machine)
        made._inbox = cast("Any", Inbox())
        made.is_empty = Emptied(self.pause)
        open_call = made.call

        def call(*given: Any) -> PoolCall:
            opened = open_call(*given)
            if (who := self._who()) is not None:
                self.calls[who] = opened
            return opened

        stop = partial(self._stop, "the pool", made, made.stop)
        vars(made).update(call=call, start=lambda _: None, until_done=self._until_done, stop=stop)
        return made

    @property
    def inbox(self) -> Inbox:
        return _inbox_of(self.owner)

    def _until_done(self) -> None:
        if self._puppet() is None:  # the start of the pool
            while self.inbox.facts:
                self._pump_pool()
            return
        last = self.inbox.taken + len(self.inbox.facts)
        self.pause("what it has posted", lambda: self.inbox.taken >= last)

    def _stop(self, what: str, owner: Any, stop: Callable[[], None]) -> None:
        """What is in the inbox is processed before an owner ends."""
        inbox = _inbox_of(owner)
        self.pause(f"the end of {what}", lambda: not (inbox.facts or _at_once_of(owner)))
        stop()

    def _rest(self) -> None:
        done = [slot.done() for slot in self.pool._slots._slots.values()]
        self.pause("the rest of all slots", lambda: all(one.done() for one in done))

    def submit(self, work: Callable[[], object]) -> Future[object]:
        """Stand for the worker threads."""
        owner = getattr(work, "__self__", None)
        self.puppets.append((f"the worker of {getattr(owner, 'name', '')}", Puppet(work)))
        return Future()

    def wait(self, future: Future[Any]) -> Any:
        self.pause("its answer", future.done)
        return future.result(0)

    def pause(self, waits_for: str, is_ready: Callable[[], bool]) -> None:
        if (puppet := self._puppet()) is not None:
            puppet.pause(waits_for, is_ready)

    def _puppet(self) -> Puppet | None:
        me = threading.current_thread()
        mine = (p for _, p in self.puppets if p.thread is me and not p.has_ended)
        return next(mine, None)

    # ------------------------------------------------------------------------- what may happen

    def moves(self) -> list[Move]:
        """Return the moves that may come next; those that happen by themselves come first."""
        at_once = list(self._at_once())
        if at_once and not self.pairs:
            return at_once[:1]
        found = at_once + list(self._in_time())
        if (timer := self._next_timer()) is not None and (self.ticks or not found):
            self_fires = partial(self._fire, *timer, is_early=bool(found))
            found.append(Move("clock", f"the timer of {timer[1]} fires", self_fires))
        for number, client in enumerate(self.scene.clients):
            if self.progress[number] < len(client):
                found += self._client_moves(number, client[self.progress[number]])
        return found + list(self._mishaps())

    def do(self, move: Move) -> None:
        """Carry out a move; one that comes before what would come at once uses up a pair."""
        first = next(self._at_once(), None)
        lines = len(self.story)
        move.act()
        self.pairs -= first is not None and first.label != move.label
        if len(self.story) == lines:
            self._tell(move.who, move.text)
        self.watch.note_gates()
        if self.is_checking:
            _raise(self.watch.check())

    def _at_once(self) -> Iterator[Move]:
        """What would happen at once: a fact is taken up, a thread goes on."""
        if self.inbox.facts and not self.owner.has_ended:
            text = f"takes up {_named(self.inbox.facts[0])}"
            yield Move("pool", text, self._pump_pool)
        for name, owner in self.owners.items():
            inbox = _inbox_of(owner)
            if _at_once_of(owner) or (inbox.facts and not owner.has_ended):
                first = (*_at_once_of(owner), *inbox.facts)[0]
                text = f"works from {first.trigger}"
                yield Move(f"slot {name}", text, partial(self._pump_slot, owner, inbox))
        for label, puppet in self.puppets:
            if not puppet.has_ended and puppet.is_ready():
                yield Move(label, f"goes on from {puppet.waits_for}", puppet.go)

    def _in_time(self) -> Iterator[Move]:
        """What happens by itself, and takes time."""
        for name in self.owners:
            effects = self.effects(name)
            for gate in effects.parked:
                yield from self._ends_of(name, gate)
            for exited in effects.exits:
                notice = partial(effects.notice_exit, exited)
                yield Move(f"system {name}", "an exit is noticed", notice)

    def _ends_of(self, name: str, gate: Gate) -> Iterator[Move]:
        alive = self.systems[name].alive
        who, what = f"system {name}", f"the {gate.kind}"
        fails = Move(who, f"{what} fails", gate.fail)
        effect = gate.effect
        if isinstance(effect, Probe) and (gate.token.is_set() or effect.child.pid not in alive):
            yield fails
            return
        yield Move(who, f"{what} succeeds", gate.succeed)
        if gate.kind in ("probe", "kill") and self._may(cast("Mishap", gate.kind)):
            yield Move(who, f"{what} fails", partial(self._mishap, gate.fail), is_own=False)

    def _next_timer(self) -> tuple[float, str] | None:
        timers = [(at, name) for name, owner in self.owners.items() for at in _drains_of(owner)]
        if (at := self.owner._timer_at) is not None:
            timers.append((at, "the pool"))
        return min(timers, default=None)

    def _fire(self, at: float, name: str, *, is_early: bool) -> None:
        self.clock.now = max(self.clock.now, at)
        self.ticks -= is_early
        if name == "the pool":
            self.owner._timer_at = None
            self._pump(facts.Looked(self.clock()))
            return
        owner = self.owners[name]
        key = min((k for k in owner._timers if k[0] == "drain"), key=owner._timers.__getitem__)
        del owner._timers[key]
        owner.pump(slot_facts.TimerFired(key[1], self.clock(), key[0]))

    def _mishaps(self) -> Iterator[Move]:
        for name in self.owners:
            for pid in self.systems[name].alive if self._may("crash") else ():
                crash = partial(self._mishap, partial(self.effects(name).crash, pid))
                yield Move(f"system {name}", "the server dies", crash, is_own=False)

    def _may(self, kind: Mishap) -> bool:
        return self.mishaps > 0 and kind in self.scene.kinds

    def _mishap(self, what: Callable[[], object]) -> None:
        self.mishaps -= 1
        what()

    def effects(self, name: str) -> SlotEffects:
        return cast("SlotEffects", self.owners[name].effects)

    # ---------------------------------------------------------------------------------- owners

    def _pump_pool(self) -> None:
        self._pump(self.inbox.take())

    def _pump(self, fact: facts.Fact) -> None:
        self.last = None
        self.owner.pump(fact)
        last = self._last()
        outcome = tuple(str(command) for command in last[2].commands) if last else ()
        self._tell("pool", f"takes up {_named(fact)}", outcome)
        if last is not None:
            self.watch.stepped(last[2])
            if self.is_checking:
                _raise(self.watch.check_step(*last))

    def _last(self) -> Taken | None:
        return self.last

    def _pump_slot(self, owner: Owner, inbox: Inbox) -> None:
        """All that is in its inbox: what comes between is the matter of the slot's own layer B."""
        name, before, taken = cast("SlotEffects", owner.effects).name, owner.snapshot.state, []
        while owner._at_once or inbox.facts:
            fact = owner._at_once.popleft() if owner._at_once else inbox.take()
            taken.append(fact.trigger)
            owner.pump(fact)
        text = f"takes up {', '.join(taken)}: {before} -> {owner.snapshot.state}"
        self._tell(f"slot {name}", text)

    def _decided(self, ctx: Context, fact: facts.Fact, stepped: Stepped) -> None:
        """Between the decision and its execution somebody may enter what is to be closed."""
        self.last = (ctx, fact, stepped)
        self.watch.note_gates()
        going = {c.name for c in stepped.commands if isinstance(c, Stop) and c.if_idle}
        if not going or not self.pairs:
            return
        nothing = Move("pool", "goes on", lambda: None)
        moves = [nothing]
        for number, client in enumerate(self.scene.clients):
            if self.progress[number] < len(client):
                action = client[self.progress[number]]
                if action.verb in ("lease", "request") and action.model in going:
                    moves += self._client_moves(number, action)
        taken = moves[self.choose([f"meanwhile {move.label}" for move in moves])]
        if taken is not nothing:
            self.pairs -= 1
            self._tell(taken.who, f"meanwhile: {taken.text}")
            taken.act()
            self._run_clients()

    def _run_clients(self) -> None:
        """Let the code of clients run up to their next waits, while the pool is in a step."""

    def _tell(self, who: str, text: str, outcome: tuple[str, ...] = ()) -> None:
        self.story.append(StoryLine(who, text, State.IDLE, State.IDLE, outcome))

    # ---------------------------------------------------------------------------------- clients

    def _client_moves(self, number: int, action: Action) -> Iterator[Move]:
        is_possible = True
        if action.verb == "withdraw":
            is_possible = self._can_withdraw(action.refers)
        elif action.verb == "release":
            is_possible = action.refers in self.holding
        if is_possible:
            act = partial(self._act, number, action)
            yield Move(f"client {number + 1}", action.text, act, is_own=False)

    def _act(self, number: int, action: Action) -> None:
        self.progress[number] += 1
        match action.verb:
            case "withdraw":
                self._interrupt(action.refers)
            case "release":
                self._release(action.refers)
            case "shutdown":
                self.was_shut_down = True
                puppet = Puppet(self.pool._close_all)
                self.puppets.append(("the one that closes", puppet))
                self.closing = puppet
                puppet.go()
            case _:
                self._call(action)

    def _can_withdraw(self, index: int) -> bool:
        raise NotImplementedError

    def _interrupt(self, index: int) -> None:
        raise NotImplementedError

    def _release(self, index: int) -> None:
        raise NotImplementedError

    def _call(self, action: Action) -> None:
        raise NotImplementedError

    def _who(self) -> int | None:
        """Return the action whose code is running."""
        raise NotImplementedError

    def result_of(self, index: int) -> tuple[bool, object]:
        """Return whether the code of an action has ended, and its result or exception."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------- looking

    @property
    def is_calm(self) -> bool:
        """Nothing would happen at once."""
        return next(self._at_once(), None) is None

    @property
    def is_at_rest(self) -> bool:
        """Nothing more happens by itself."""
        has_more = next(self._in_time(), None) is not None or self._next_timer() is not None
        return self.is_calm and not has_more

    def check_rest(self) -> None:
        """Check what must be true when nothing more happens by itself."""
        if self.is_at_rest:
            _raise(self.watch.check())
            _raise(self.watch.check_rest())

    def key(self) -> tuple[object, ...]:
        """Return all that the future depends on: equal keys have equal futures."""
        pool, owners = self.owner, self.owners
        return (
            pool.ctx,
            tuple(self.inbox.facts),
            (pool._timer_at, pool._is_looking, frozenset(pool._calls), pool.has_ended),
            tuple((name, tuple(some)) for name, some in sorted(pool._evicted.items())),
            tuple(self._key_of(name) for name in owners),
            tuple((p.waits_for, p.has_ended) for _, p in self.puppets),
            tuple(self.progress),
            tuple(self.holding),
            frozenset(self.given_back),
            frozenset(self.ended),
            tuple((i, self.answers.get(call.ticket)) for i, call in self.calls.items()),
            tuple(call.settled.done() for call in self.calls.values()),
            tuple(self.lives.items()),
            (self.mishaps, self.pairs, self.ticks, self.clock.now),
        )

    def _key_of(self, name: str) -> tuple[object, ...]:
        owner, os, slot = self.owners[name], self.systems[name], self.pool._slots.slot(name)
        ctx, gate, effects = owner.snapshot.ctx, owner.gate, self.effects(name)
        return (
            owner.snapshot.state,
            (ctx.job, ctx.child, ctx.effect, ctx.running, ctx.generation, ctx.wanted),
            (tuple(_inbox_of(owner).facts), tuple(owner._at_once), owner.has_ended),
            tuple((g.kind, g.generation, g.child, g.token.is_set()) for g in effects.parked),
            (tuple(effects.exits), frozenset(os.alive.values()), len(os.started)),
            frozenset(owner._timers.items()),
            (gate._is_open, gate._is_held, gate._drains, gate._used_at, gate.server),
            frozenset(who if isinstance(who, tuple) else "" for who in gate._inside),
            (len(gate._inside), len(gate._admitted), frozenset(owner._calls)),
            (slot._generation, slot._order, slot._problem is None, slot._is_working),
            len(slot._todo),
            slot._call is not None and slot._call.settled.done(),
        )

    def close(self) -> None:
        """End this schedule, in any state."""
        for _, puppet in self.puppets:
            while not puppet.has_ended:
                puppet.go(OverError())
        self.owner.has_ended = True  # nothing is left to warn of
        for owner in self.owners.values():
            owner.has_ended = True


def _raise(violation: Violation | None) -> None:
    if violation is not None:
        raise BrokenError(violation)


def _named(fact: facts.Fact) -> str:
    about = [str(getattr(fact, name)) for name in ("name", "ticket") if hasattr(fact, name)]
    return " ".join([fact.trigger, *about])


def _inbox_of(owner: Any) -> Inbox:
    return cast("Inbox", owner._inbox)


def _at_once_of(owner: Any) -> Sequence[Any]:
    return tuple(getattr(owner, "_at_once", ()))


def _drains_of(owner: Owner) -> list[float]:
    return [at for (kind, _), at in owner._timers.items() if kind == "drain"]
