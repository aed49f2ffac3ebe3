"""Effects that stop at a gate, over an abstract operating system and a virtual clock.

An effect that is started parks at a gate and ends once, when and how the test says; it reports what
is then true in the operating system behind it. A server lives from the moment of its spawn, the
slot is empty if nothing lives in it and its lock is free, and an exit is noticed when the test
says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Download,
    Effect,
    Kill,
    LookUp,
    Probe,
    Resolve,
    Spawn,
    Warm,
    failure_of,
)
from orchestrator.machine.facts import (
    BecameReady,
    Child,
    Completion,
    Emptied,
    Exit,
    Exited,
    Fact,
    Fetched,
    Hung,
    LoadRequested,
    ModelRequested,
    PrefetchRequested,
    Resolved,
    ServerFacts,
    SlotEvidence,
    Spawned,
)
from orchestrator.runtime.ports import Clock, LogPosition, Progress, SlotLock
from tests.kit.machine.invariants import Process
from tests.kit.machine.world import WorkKind, files, resolved, target

ALL_KINDS: Final[frozenset[WorkKind]] = frozenset({"kill", "resolve", "download", "spawn", "probe"})
SpawnPlan = Literal["lives", "fails", "raises"]

_PATIENCE_S: Final = 20.0
KINDS: Final[dict[type, WorkKind]] = {
    Kill: "kill",
    Resolve: "resolve",
    Download: "download",
    Spawn: "spawn",
    Probe: "probe",
}
_PROBLEMS: Final[dict[WorkKind, Problem]] = {
    "resolve": Problem("hub_unreachable", "the Hub does not answer"),
    "kill": Problem("slot_occupied", "the process survived SIGKILL"),
    "download": Problem("hub_unreachable", "the Hub does not answer"),
    "spawn": Problem("server_unavailable", "no such file"),
    "probe": Problem("server_start_failed", "it does not answer", reason="exited"),
}


class VirtualClock:
    """Monotonic seconds that pass only when a test advances them."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class OperatingSystem:
    """What the kernel knows of one slot: who lives in it, and who holds its lock.

    Attributes:
        most_alive: The most servers that were ever alive at once.
        started: Every server ever started, oldest first.
    """

    def __init__(self) -> None:
        self.alive: dict[int, Process] = {}
        self.started: list[Process] = []
        self.most_alive = 0
        self.lock: HeldLock | None = None

    def start(self, generation: Generation, model: str) -> Process:
        process = Process(101 + len(self.started), generation, model)
        self.started.append(process)
        self._add(process)
        return process

    def intrude(self) -> Process:
        """Let an unknown process occupy the slot."""
        stray = Process(7, Generation(0), "?")
        self._add(stray)
        return stray

    def leave(self, server: Process) -> None:
        """Let a child of a dead server go on."""
        self._add(server._replace(pid=server.pid + 1000, is_left=True))

    def end(self, pid: int) -> Process:
        return self.alive.pop(pid)

    def hang(self, pid: int) -> None:
        """Let a server live on that neither answers nor works."""
        self.alive[pid] = self.alive[pid]._replace(is_hung=True)

    def take_lock(self) -> tuple[SlotEvidence, HeldLock | None]:
        if self.alive or self.lock is not None:
            return SlotEvidence(is_empty=False, reason="the slot's lock is held"), None
        self.lock = HeldLock(self)
        return SlotEvidence(is_empty=True), self.lock

    def _add(self, process: Process) -> None:
        self.alive[process.pid] = process
        self.most_alive = max(self.most_alive, len(self.alive))


@dataclass(eq=False, slots=True)
class HeldLock:
    """The slot's lock while the owner holds it."""

    os: OperatingSystem

    def release(self) -> None:
        self.hand_over()

    def hand_over(self) -> None:
        """Let go of the lock: from now on the server holds it."""
        if self.os.lock is self:
            self.os.lock = None


@dataclass(eq=False, slots=True)
class Gate:
    """One effect.

    Attributes:
        child: The server that a spawn has started, if it could.
        fact: Its completion; None while it is in flight.
    """

    effects: GatedEffects
    kind: WorkKind
    effect: Effect
    token: CancelToken
    child: Child | None = None
    fact: Completion | None = None

    @property
    def generation(self) -> Generation:
        return self.effect.generation

    def succeed(self) -> None:
        """Let it succeed: a kill has killed, a server answers."""
        self.effects.end(self, self._success())

    def fail(self, problem: Problem | None = None) -> None:
        """Let it fail; after a failed kill the server is still alive."""
        problem = problem or _PROBLEMS[self.kind]
        self.effects.end(self, failure_of(self.effect, problem, self.effects.clock()))

    def _success(self) -> Completion:
        at = self.effects.clock()
        match self.effect:
            case Kill(generation, child):
                self.effects.kill_everything()
                exits = {e.exit.pid: e.exit for e in self.effects.exits}
                for exited in tuple(self.effects.exits):  # reaping notices the exit
                    self.effects.notice_exit(exited)
                return Emptied(generation, at, exits.get(child.pid) if child else None)
            case Resolve(generation, target):
                return Resolved(generation, at, resolved(target.request.model_path))
            case Download(generation, target):
                return Fetched(generation, at, files(target.request.model_path))
            case Spawn(generation):
                assert self.child is not None, "nothing was started"
                return Spawned(generation, at, self.child)
            case Probe(generation, child):
                url = f"http://127.0.0.1:{child.pid}"
                return BecameReady(generation, at, _facts(url, self.effects))


@dataclass(eq=False)
class GatedEffects:
    """Effects of one owner (`ports.Effects`), each behind a gate. Thread-safe.

    Args:
        open_gates: Kinds of effects that succeed at once, in the call that starts them.
        notices_exits: Report an exit at once; otherwise it waits in `exits` for `notice_exit`.
        watch: Called before an effect is started; may raise what a start may raise.
        plan_spawn: Decides the result of a spawn.
        total_slots: How many requests a server computes at a time, if it says so.
        look_ups: Does a look-up and posts its answer; None = every model is found at once.
    """

    post: Callable[[Fact], None]
    clock: Clock = field(default_factory=VirtualClock)
    os: OperatingSystem = field(default_factory=OperatingSystem)
    open_gates: frozenset[WorkKind] = frozenset()
    notices_exits: bool = True
    watch: Callable[[Effect, CancelToken], None] = lambda _, __: None
    plan_spawn: Callable[[Spawn], SpawnPlan] = lambda _: "lives"
    look_ups: Callable[[LookUp], object] | None = None
    total_slots: int | None = None
    gates: list[Gate] = field(default_factory=list)
    exits: list[Exited] = field(default_factory=list)
    is_closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    # -------------------------------------------------------------------------------- for the owner

    def take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        return self.os.take_lock()

    def child_is_alive(self, child: Child) -> bool:
        return child.pid in self.os.alive

    def can_be_kept(self, child: Child) -> bool:
        return self.child_is_alive(child)

    def start(self, effect: Effect, token: CancelToken, lock: SlotLock | None) -> None:
        self.watch(effect, token)
        gate = Gate(self, KINDS[type(effect)], effect, token)
        if isinstance(effect, Spawn):
            self._spawn(gate, effect, lock)
        with self._changed:
            self.gates.append(gate)
            is_open = gate.kind in self.open_gates
            self._changed.notify_all()
        if is_open:
            gate.succeed()

    prompts = None

    def warm(self, command: Warm, token: CancelToken) -> None:
        """It changes nothing."""

    def look_up(self, command: LookUp) -> None:
        if self.look_ups is None:
            self.post(found(command, self.clock()))
        else:
            self.look_ups(command)

    def progress(self, generation: Generation) -> Progress | None:
        return None

    def log_since(self, position: LogPosition) -> tuple[LogPosition, tuple[str, ...]]:
        return position, ()

    def log_tail(self, count: int) -> tuple[str, ...]:
        return ("the server says hello",)[:count]

    def close(self, *, keep: bool = False) -> None:
        self.is_closed = True

    def _spawn(self, gate: Gate, spawn: Spawn, lock: SlotLock | None) -> None:
        if not isinstance(lock, HeldLock) or self.os.lock is not lock:
            raise TypeError("a spawn needs the lock of its slot")
        plan = self.plan_spawn(spawn)
        if plan == "raises":
            raise OSError(12, "Cannot allocate memory")
        lock.hand_over()
        if plan == "lives":
            process = self.os.start(spawn.generation, spawn.target.request.model_path)
            gate.child = Child(spawn.generation, process.pid)

    # ----------------------------------------------------------------------------------- for tests

    @property
    def parked(self) -> list[Gate]:
        """The effects in flight, oldest first."""
        return [gate for gate in self.gates if gate.fact is None]

    def wait_for(self, kind: WorkKind, generation: int | None = None) -> Gate:
        """Wait for an effect of this kind to be in flight, and return the oldest."""

        def found() -> Gate | None:
            return next(
                (g for g in self.parked if g.kind == kind and generation in (None, g.generation)),
                None,
            )

        with self._changed:
            gate = self._changed.wait_for(found, _PATIENCE_S)
        assert gate, f"no {kind} of load {generation} was started; parked: {self.parked}"
        return gate

    def let_through(self, *kinds: WorkKind) -> None:
        """Let the next effect of each of these kinds succeed, in this order."""
        for kind in kinds:
            self.wait_for(kind).succeed()

    def open(self, kinds: Iterable[WorkKind] = ALL_KINDS) -> None:
        """Let every effect of these kinds succeed, those in flight and all later ones."""
        with self._changed:
            self.open_gates = frozenset(kinds)
            parked = self.parked
        for gate in parked:
            if gate.kind in self.open_gates:
                gate.succeed()

    def crash(self, pid: int) -> None:
        """Let a server exit by itself."""
        self._note_exit(self.os.end(pid), -11)

    def lose_keeper(self, pid: int, *, leaves_child: bool) -> None:
        """Let a server end with its keeper, which hands it over no more; its child may go on."""
        process = self.os.end(pid)
        spawning = next((g for g in self.parked if g.child and g.child.pid == pid), None)
        if spawning is None:
            self._note_exit(process, None)
        else:
            spawning.child = None
        if leaves_child:
            self.os.leave(process)

    def notice_exit(self, exited: Exited) -> None:
        self.exits.remove(exited)
        self.post(exited)

    def notice_hang(self, child: Child) -> None:
        exit_ = Exit(child.pid, None, reason="hung")
        self.post(Hung(child.generation, self.clock(), exit_, silent_s=60.0))

    def kill_everything(self) -> None:
        for pid in sorted(self.os.alive):
            self._note_exit(self.os.end(pid), -15)

    def end(self, gate: Gate, fact: Completion) -> None:
        with self._changed:
            assert gate.fact is None, f"the {gate.kind} of load {gate.generation} ends twice"
            gate.fact = fact
        self.post(fact)

    def _note_exit(self, process: Process, returncode: int | None) -> None:
        exit_ = Exit(process.pid, returncode)
        if process.generation and not process.is_left:
            exited = Exited(process.generation, self.clock(), exit_)
            self.exits.append(exited)
            if self.notices_exits:
                self.notice_exit(exited)


def _facts(url: str, effects: GatedEffects) -> ServerFacts:
    return ServerFacts(url, context_length=4096, total_slots=effects.total_slots)


def found(command: LookUp, at: float) -> ModelRequested:
    """Return the answer to a look-up that succeeds."""
    wanted = target(command.request)
    if command.purpose == "load":
        return LoadRequested(command.ticket, wanted, at)
    return PrefetchRequested(command.ticket, wanted, at)
