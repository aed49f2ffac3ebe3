"""Explicit-state checker of the pool: every order of callers, slots, reports, clock and failures.

`explore` steps the shipped table, or a mutant of it, breadth first through every world of a
scenario, and checks every step and every world against `invariants`. The policy may choose any set
of victims that makes room, not only the cheapest, so what holds here does not depend on sizes and
times of use. At last it looks for cycles: in which somebody waits for ever although every slot goes
on and the clock ticks, and in which servers come and go although nobody asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from orchestrator.pool import step as pool_step
from orchestrator.pool.commands import (
    AnswerEmptied,
    Command,
    DropStale,
    Grant,
    Measure,
    Refuse,
    SetTimer,
    Start,
    Stop,
)
from orchestrator.pool.context import Context
from orchestrator.pool.facts import Fact
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.policy import Candidate
from orchestrator.pool.states import State
from orchestrator.pool.step import PoolMachine, Stepped, state_for
from orchestrator.pool.table import TABLE, Row
from tests.kit.machine.checker import traced, without_garbage_collection
from tests.kit.pool.fairness import Link, fair_cycle
from tests.kit.pool.invariants import (
    CONTEXT_INVARIANTS,
    INVARIANTS,
    STEP_INVARIANTS,
    WORLD_INVARIANTS,
    Edge,
    Violation,
)
from tests.kit.pool.moves import Move, Moves
from tests.kit.pool.slots import after_grant, after_start, after_stop
from tests.kit.pool.world import (
    FAULTS,
    Core,
    Key,
    Scenario,
    Slot,
    World,
    admitted,
    amounts,
    canonical,
    fact_of,
    gates_of,
    name_of,
)


class TracedPool:
    """A pool that records which row fired last, and all that have fired.

    Its table and functions may be mutants.
    `module` is `step`, or a copy of it with a seeded fault.
    """

    def __init__(
        self,
        table: Sequence[Row] = TABLE,
        module: ModuleType = pool_step,
        /,
        **replaced: Callable[..., Any],
    ) -> None:
        self.module = module
        self.fired: int = -1
        self.have_fired: set[int] = set()
        rows, marks = traced(table, self._fires)
        self._machine: PoolMachine = module.PoolMachine(rows, **replaced, **marks)

    def step(self, ctx: Context, fact: Fact) -> Stepped:
        return self._machine.step(ctx, fact)

    def _fires(self, index: int) -> None:
        self.fired = index
        self.have_fired.add(index)


class AnySet:
    """Any of the smallest sets that make the room, in place of the cheapest: number `pick`."""

    def __init__(self) -> None:
        self.pick = 0
        self.alternatives = 1

    def __call__(self, lack: Amounts, candidates: Sequence[Candidate]) -> tuple[str, ...] | None:
        found: list[tuple[str, ...]] = []
        for size in range(len(candidates) + 1):
            for some in combinations(candidates, size):
                names = tuple(one.name for one in some)
                is_minimal = not any(set(other) <= set(names) for other in found)
                if is_minimal and lack.fits(Amounts.total(one.frees for one in some)):
                    found.append(names)
        if not found:
            return None
        self.alternatives = max(self.alternatives, len(found))
        return found[self.pick % len(found)]


class Taken(NamedTuple):
    """One step of the machine for a key."""

    core: Core
    commands: tuple[Command, ...]
    row: int
    broken: Violation | None


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an exploration."""

    name: str
    worlds: int
    edges: int
    seconds: float
    violation: Violation | None
    story: tuple[str, ...]
    rows_fired: frozenset[tuple[int, State]]
    steps: dict[tuple[Core, Key], tuple[Taken, ...]] = field(repr=False)

    def __str__(self) -> str:
        size = f"{self.name}: {self.worlds} worlds, {self.edges} edges, {self.seconds:.1f} s"
        if self.violation is None:
            return size
        lines = [f"{number:3}. {text}" for number, text in enumerate(self.story, 1)]
        return "\n".join([size, f"{self.violation.invariant}: {self.violation.message}", *lines])


class BrokenError(Exception):
    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.violation = Violation(invariant, message)


def explore(
    scenario: Scenario,
    *,
    name: str = "",
    machine: TracedPool | None = None,
    without: frozenset[str] = frozenset(),
    max_worlds: int = 1_500_000,
) -> Report:
    """Explore a scenario to the end, or to the first broken invariant.

    Args:
        without: Names of invariants to leave out, to see what a fault leads to.

    Raises:
        MemoryError: there are more worlds than `max_worlds`.
    """
    assert without <= INVARIANTS, without - INVARIANTS
    assert set(scenario.faults) <= set(FAULTS), scenario.faults
    machine = machine or TracedPool()
    exploration = Exploration(name, scenario, machine, without)
    with (
        without_garbage_collection(),
        mock.patch.object(machine.module, "cheapest", exploration.any_set),
    ):
        return exploration.run(max_worlds)


class Exploration:
    """One exploration; `Moves` says what can happen, this carries it out."""

    def __init__(
        self, name: str, scenario: Scenario, machine: TracedPool, without: frozenset[str]
    ) -> None:
        self.any_set = AnySet()
        self._name = name
        self._scenario = scenario
        self._machine = machine
        self._without = without
        self._moves = Moves(scenario, self.core, self.feed)
        self._cores: dict[Context, Core] = {}
        self._steps: dict[tuple[Core, Key], tuple[Taken, ...]] = {}
        self._kept: set[Core] = set()  # cores whose context has been checked
        self._rows: set[tuple[int, State]] = set()
        self._worlds: list[World] = []
        self._came: list[tuple[int, str] | None] = []
        self._links: list[list[Link]] = []
        self._edges = 0

    # ---------------------------------------------------------------------------- the search
    def run(self, max_worlds: int) -> Report:
        started = time.perf_counter()
        violation: Violation | None = None
        story: tuple[str, ...] = ()
        try:
            self._search(max_worlds)
            at, violation = self._for_ever() or (0, None)
            story = self._story(at, "and so on, for ever") if violation else ()
        except _FoundError as found:
            violation, story = found.violation, found.story
        return Report(
            self._name,
            len(self._worlds),
            self._edges,
            time.perf_counter() - started,
            violation,
            story,
            frozenset(self._rows),
            self._steps,
        )

    def _search(self, max_worlds: int) -> None:
        numbers: dict[World, int] = {}
        first = self._first()
        numbers[first] = 0
        self._worlds.append(first)
        self._came.append(None)
        at = 0
        while at < len(self._worlds):
            links = []
            for move in self._moves.of(self._worlds[at]):
                try:
                    reached = list(self._go(move))
                    for after in reached:
                        self._edges += 1
                        number = numbers.get(after)
                        if number is None:
                            number = numbers[after] = len(self._worlds)
                            self._check(after)
                            self._worlds.append(after)
                            self._came.append((at, move.text))
                        links.append(Link(move.cause, number))
                except BrokenError as broken:
                    raise _FoundError(broken.violation, self._story(at, move.text)) from broken
            self._links.append(links)
            at += 1
            if len(self._worlds) > max_worlds:
                raise MemoryError(f"more than {max_worlds} worlds in {self._name!r}")

    def _go(self, move: Move) -> Iterator[World]:
        """Yield what a move leads to; where reports are not slow, they are heard in it."""
        yield from self._heard(move.go())

    def _heard(self, worlds: Iterator[World] | list[World]) -> Iterator[World]:
        for world in worlds:
            talks = (
                (number for number, slot in enumerate(world.slots) if slot.reports)
                if not self._scenario.is_slow
                else iter(())
            )
            number = next(talks, None)
            if number is None:
                yield world
            else:
                yield from self._heard(list(self._moves.hear(world, number)))

    def _story(self, at: int, last: str) -> tuple[str, ...]:
        story = [last]
        came = self._came[at] if self._came else None
        while came is not None:
            at, text = came
            story.append(text)
            came = self._came[at]
        return tuple(reversed(story))

    def _first(self) -> World:
        scenario = self._scenario
        world = World(
            self.core(Context()),
            tuple(Slot() for _ in scenario.models),
            scenario.clients,
            tuple(scenario.faults.get(fault, 0) for fault in FAULTS),
        )
        keys = [Key("configured", number=0)]
        keys += [Key("defined", m, flag=True, number=0) for m in range(len(scenario.models))]
        for number in scenario.adopted:
            takes = amounts(scenario.models[number].truth(0))
            world = world.with_slot(number, Slot("up", "open", figure=takes, takes=takes))
            keys.append(Key("adopted", number, has_entered=True))
        keys += [Key("preload", number) for number in scenario.preload]
        try:
            for key in keys:
                world = next(self.feed(world, key))
        except BrokenError as broken:
            raise _FoundError(broken.violation, (key.trigger,)) from broken
        return world

    # ------------------------------------------------------------------------------ one fact
    def core(self, ctx: Context) -> Core:
        """Return the one object for equal contexts, which are canonical."""
        known = self._cores.get(ctx)
        if known is None:
            known = self._cores[ctx] = Core(ctx, len(self._scenario.models))
        return known

    def feed(self, world: World, key: Key) -> Iterator[World]:
        """Yield the worlds after a fact; several, where several sets of victims make room."""
        key = self._with_evidence(world, key)
        for taken in self._step(world.core, key):
            if taken.broken is not None:
                self._hold(*taken.broken)
            yield self._carry_out(world, key, taken)

    def _with_evidence(self, world: World, key: Key) -> Key:
        """Add how the gates are used, and who has got a place in them."""
        numbers: list[int] = []
        if key.trigger in ("healthy", "adopted") and key.has_entered:
            numbers = [key.model]
        elif key.trigger == "look":
            states = map(world.core.state, range(len(world.slots)))
            numbers = [n for n, state in enumerate(states) if state is State.RESIDENT]
        found = [ticket for n in numbers for ticket in admitted(self._scenario, world, n)]
        return key._replace(gates=gates_of(world.slots), admitted=tuple(found))

    def _step(self, core: Core, key: Key) -> tuple[Taken, ...]:
        """Step once for equal arguments, as often as there are sets to choose from."""
        known = self._steps.get((core, key))
        if known is None:
            found, pick, alternatives = [], 0, 1
            while pick < alternatives:
                self.any_set.pick, self.any_set.alternatives = pick, 1
                try:
                    found.append(self._take(core, key))
                except BrokenError:
                    raise
                except Exception as error:
                    raise BrokenError("step_raised", f"{type(error).__name__}: {error}") from error
                alternatives = max(alternatives, self.any_set.alternatives)
                pick += 1
            known = self._steps[core, key] = tuple(found)
        return known

    def _take(self, core: Core, key: Key) -> Taken:
        fact = fact_of(self._scenario, key)
        stepped = self._machine.step(core.ctx, fact)
        row = self._machine.fired
        self._rows.add((row, state_for(core.ctx, getattr(fact, "name", None))))
        edge = Edge(core.ctx, fact, stepped.ctx, stepped.commands)
        broken = next(
            (
                Violation(invariant.__name__, why)
                for invariant in STEP_INVARIANTS
                if invariant.__name__ not in self._without and (why := invariant(edge))
            ),
            None,
        )
        return Taken(self.core(canonical(stepped.ctx)), stepped.commands, row, broken)

    def _hold(self, invariant: str, why: str | None) -> None:
        if why is not None and invariant not in self._without:
            raise BrokenError(invariant, why)

    # ------------------------------------------------------------------------------ commands
    def _carry_out(self, world: World, key: Key, taken: Taken) -> World:
        after = world._replace(core=taken.core)
        kinds = self._kinds(world.core.ctx, key)
        for command in taken.commands:
            if (other := getattr(command, "carry_out", None)) is not None:
                after = other(after)  # a command of a test
                continue
            match command:
                case Grant(ticket, name):
                    after = self._grant(after, int(ticket), name, kinds[ticket], key)
                case Refuse(ticket):
                    after = after._replace(idle=after.idle + (ticket in kinds))
                case AnswerEmptied(_, name) if after.slots[_number(name)].has_server:
                    self._hold("an_empty_slot_is_empty", f"{name} is answered too early")
                case Start():
                    after = self._start(after, command)
                case Stop():
                    after = self._stop(after, command)
                case Measure(name, edition):
                    ask = (_number(name), edition)
                    after = after._replace(measures=(*after.measures, ask))
        return after

    def _kinds(self, ctx: Context, key: Key) -> dict[int, str]:
        """Return what each caller waits for; calls for an empty slot are not among them."""
        kinds = {int(w.ticket): w.kind for w in ctx.waiting if w.ticket is not None}
        if key.trigger == "wanted":
            asks = self._scenario.models[key.model].asks
            kinds[key.ticket] = "load" if key.why == "load" else asks
        return {ticket: str(kind) for ticket, kind in kinds.items()}

    def _grant(self, world: World, ticket: int, name: str, kind: str, key: Key) -> World:
        number = _number(name)
        slot = world.slots[number]
        has_entered = key.has_entered and key.model == number
        if kind == "request" and key.trigger != "wanted":
            has_entered = ticket in key.admitted
        if slot.gate != "open" or not has_entered:
            self._hold("a_grant_enters_an_open_gate", f"of {name}, which is {slot.phase}")
        if world.core.state(number) not in (State.RESIDENT, State.STOPPING):
            self._hold("a_grant_enters_an_open_gate", f"{name} is not Resident")
        if kind == "load":
            return world._replace(idle=world.idle + 1)
        return world.with_slot(number, after_grant(self._scenario, slot))

    def _start(self, world: World, start: Start) -> World:
        number = _number(start.name)
        slot = world.slots[number]
        if slot.has_server or slot.reports:
            self._hold("one_model_one_slot", f"start of {start.name}, whose slot is {slot.phase}")
        entry = world.core.by_model[number]
        variant = entry.definition.size_bytes if entry is not None else 0
        model = self._scenario.models[number]
        return world.with_slot(number, after_start(model, amounts(model.truth(variant)), start))

    def _stop(self, world: World, stop: Stop) -> World:
        number = _number(stop.name)
        slot = world.slots[number]
        if not slot.has_server and not slot.reports:
            self._hold("a_stop_has_a_server", f"stop of {stop.name}, whose slot is empty")
        left = slot.inside if stop.cut and slot.phase in ("up", "drain") else 0
        return world.with_slot(number, after_stop(slot, stop))._replace(idle=world.idle + left)

    # ------------------------------------------------------------------------- several worlds
    def _check(self, world: World) -> None:
        if world.core not in self._kept:
            self._kept.add(world.core)
            for keeps in CONTEXT_INVARIANTS:
                self._hold(keeps.__name__, keeps(world.core.ctx, self._scenario))
        for invariant in WORLD_INVARIANTS:
            if invariant.__name__ not in self._without:
                self._hold(invariant.__name__, invariant(world, self._scenario))
        if not any(slot.reports for slot in world.slots):
            self._look_again(world)
        if self._scenario.has_late:
            self._hear_late(world)

    def _look_again(self, world: World) -> None:
        """A step decides everything that can be decided, and leaves nothing for the next one."""
        for taken in self._step(world.core, self._with_evidence(world, Key("look"))):
            does = [one for one in taken.commands if not isinstance(one, SetTimer)]
            if does or taken.core is not world.core:
                self._hold("looking_again_does_nothing", f"looking again does {does}")

    def _hear_late(self, world: World) -> None:
        """A report of an earlier start changes nothing."""
        gates = gates_of(world.slots)
        for number in range(len(world.slots)):
            for trigger in ("sized", "healthy", "leaving", "emptied", "stuck"):
                key = Key(trigger, number, why="D0=1", number=-1, has_entered=True, gates=gates)
                for taken in self._step(world.core, key):
                    does = [c for c in taken.commands if not isinstance(c, DropStale | SetTimer)]
                    if does or taken.core is not world.core:
                        name = name_of(number)
                        self._hold(
                            "late_reports_are_dropped", f"{trigger} of {name} does something"
                        )

    def _for_ever(self) -> tuple[int, Violation] | None:
        """Return a world from which something waits for ever, and what."""
        checks = [("everything_comes_to_rest", *self._busy_for_ever())]
        for number in range(len(self._scenario.models)):
            name = name_of(number)
            waits = [
                name in world.core.waited_for and world.core.state(number) is not State.RESIDENT
                for world in self._worlds
            ]
            leaves = frozenset({("withdraw", number)})
            checks.append(("nobody_starves", f"a waiter of {name}", waits, leaves))
            for state in (State.STARTING, State.STOPPING):
                there = [world.core.state(number) is state for world in self._worlds]
                text = f"{name} is {state}"
                checks.append(("everything_comes_to_rest", text, there, frozenset()))
            asked = [
                (entry := world.core.by_model[number]) is not None and bool(entry.emptying)
                for world in self._worlds
            ]
            checks.append(("everything_comes_to_rest", f"an unload of {name}", asked, frozenset()))
        for invariant, text, holds, without in checks:
            if invariant in self._without:
                continue
            at = fair_cycle(self._links, holds, without)
            if at is not None:
                return at, Violation(invariant, f"{text}, for ever")
        return None

    def _busy_for_ever(self) -> tuple[str, list[bool], frozenset[tuple[str, int]]]:
        """Something happens in slots although nobody asks for anything any more."""
        calm = ("slot", "report", "tick", "leave", "done", "mercy")
        asks = {link.cause for links in self._links for link in links} - {
            link.cause for links in self._links for link in links if link.cause[0] in calm
        }
        busy = [any(slot.is_at_work for slot in world.slots) for world in self._worlds]
        return "servers come and go although nobody asks", busy, frozenset(asks)


class _FoundError(Exception):
    def __init__(self, violation: Violation, story: tuple[str, ...]) -> None:
        super().__init__(violation)
        self.violation = violation
        self.story = story


def _number(name: str) -> int:
    return "ABCDEFGH".index(name)
