"""Explicit-state checker: every order of events, breadth first, over the real `step`.

`explore` steps the shipped table, or a mutant of it, through every interleaving of a program's
calls, the completions of its effects, failures, crashes, timers and late completions. It checks
every world and every step against `invariants`. The search is breadth first, so a counterexample
is a shortest one; it is printed as a story and as a Mermaid sequence diagram.

Some checks need more than one world. Quiescence is certain: the moves that happen by themselves
form no cycle. A load can succeed from every world at rest. A load in flight succeeds if nothing
fails: no such move takes it from its callers, and at rest all are answered. A late completion
changes nothing.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from orchestrator.base.tokens import Ticket
from orchestrator.machine.commands import Command, DropStale, Loaded, Settle
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import Fact, LoadRequested, LookUpRequested, TimerFired
from orchestrator.machine.rows import Row as AnyRow
from orchestrator.machine.states import State
from orchestrator.machine.step import Lifecycle
from orchestrator.machine.table import TABLE, Row
from tests.kit.machine.invariants import INVARIANTS, Violation, check_edge, check_world
from tests.kit.machine.observed import Edge, answers
from tests.kit.machine.programs import parse
from tests.kit.machine.scenario import Move, Scenario
from tests.kit.machine.story import Counterexample, StoryLine, describe
from tests.kit.machine.world import Call, Core, Faults, Status, View, Work, World, look_up_requested

ALL_FAULTS = Faults()
CANCEL_ABANDONED = Policy()


R = TypeVar("R", bound=AnyRow[Any])


def traced(
    table: Sequence[R], fires: Callable[[int], None]
) -> tuple[list[R], dict[str, Callable[[Any], None]]]:
    """Return the table with one more action in each row, which tells the index, and those."""

    def mark(index: int) -> Callable[[Any], None]:
        return lambda _: fires(index)

    marks = {f"row {index}": mark(index) for index in range(len(table))}
    rows = [replace(row, actions=(f"row {index}", *row.actions)) for index, row in enumerate(table)]
    return rows, marks


class TracedLifecycle(Lifecycle):
    """A lifecycle that records which row fired last, and all that have fired.

    Its table and functions may be mutants.
    """

    def __init__(self, table: Sequence[Row] = TABLE, /, **replaced: Callable[..., Any]) -> None:
        self.fired: int = -1
        self.have_fired: set[int] = set()
        rows, marks = traced(table, self._fires)
        super().__init__(rows, **replaced, **marks)

    def _fires(self, index: int) -> None:
        self.fired = index
        self.have_fired.add(index)


class Fired(NamedTuple):
    """A row of the table, and the state in which it fired."""

    row: int
    state: State


class Taken(NamedTuple):
    """A step, the world in which it was taken first, the row that fired, and the result."""

    world: World
    core: Core
    fact: Fact
    row: int
    after: Core
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an exploration."""

    program: str
    worlds: int
    edges: int
    seconds: float
    counterexample: Counterexample | None
    rows_fired: frozenset[Fired]
    steps: tuple[Taken, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        found = self.counterexample
        return (
            f"{self.program}: {self.worlds} worlds, {self.edges} edges, {self.seconds:.2f} s, "
            f"{len({fired.row for fired in self.rows_fired})} rows"
            + (f"\n{found}" if found else "")
        )


def explore(
    program: str,
    *,
    lifecycle: Lifecycle | None = None,
    faults: Faults = ALL_FAULTS,
    policy: Policy = CANCEL_ABANDONED,
    warm: str | None = None,
    start: World | None = None,
    without: frozenset[str] = frozenset(),
    max_worlds: int = 2_000_000,
) -> Report:
    """Explore a program (see `programs`) to the end, or to the first broken invariant.

    Args:
        warm: A model that is Healthy at the start; None starts in Idle with nothing.
        start: A world of this program to begin in.
        without: Names of invariants to leave out, to see what a fault leads to.
        max_worlds: The largest number of worlds.

    Raises:
        MemoryError: there are more worlds than that.
    """
    assert without <= INVARIANTS | {"a_load_can_succeed"}
    scenario = Scenario(parse(program), faults, policy)
    exploration = _Exploration(program, scenario, lifecycle or TracedLifecycle(), without)
    with without_garbage_collection():
        return exploration.run(warm, start, max_worlds)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Worlds form no reference cycles; searching a million of them costs a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Arrival(NamedTuple):
    """How a world was reached first."""

    before: World
    move: Move
    note: str
    then: tuple[tuple[World, Move], ...] = ()  # what has followed at once


class _BrokenError(Exception):
    def __init__(self, violation: Violation, last: _Arrival) -> None:
        super().__init__(violation)
        self.violation = violation
        self.last = last


class _Exploration:
    def __init__(
        self, program: str, scenario: Scenario, lifecycle: Lifecycle, without: frozenset[str]
    ) -> None:
        self._program = program
        self._scenario = scenario
        self._lifecycle = lifecycle
        self._without = without
        self._cores: dict[tuple[State, Context], Core] = {}
        self._steps: dict[tuple[Core, Fact], tuple[int, Core, tuple[Command, ...]]] = {}
        self._where: dict[tuple[Core, Fact], World] = {}
        self._rows: set[Fired] = set()
        self._reached: dict[World, _Arrival | None] = {}
        self._own_edges: dict[World, list[World]] = {}
        self._edges = 0
        self._probed: set[Core] = set()
        self._harmless: set[tuple[object, ...]] = set()

    def run(self, warm: str | None, start: World | None, max_worlds: int) -> Report:
        started = time.perf_counter()
        found = None
        try:
            first = start or self._first_world(warm)
            self._cores[first.core.state, first.core.ctx] = first.core
            self._explore(first, max_worlds)
            self._check_for_cycles()
        except _BrokenError as broken:
            found = self._counterexample(broken)
        return Report(
            self._program,
            len(self._reached),
            self._edges,
            time.perf_counter() - started,
            found,
            frozenset(self._rows),
            tuple(
                Taken(world, core, fact, *self._steps[core, fact])
                for (core, fact), world in self._where.items()
            ),
        )

    def _first_world(self, warm: str | None) -> World:
        core = self._core(State.IDLE, Context(policy=self._scenario.policy))
        if warm is None:
            return self._scenario.start(core)
        setting = replace(self._scenario, clients=parse(f"load {warm}"))
        world, answer = self._run_happily(setting, setting.start(core), Ticket(0))
        assert isinstance(answer, Loaded), answer
        start = self._scenario.start(world.core)
        return start._replace(
            alive=world.alive,
            concluded=world.concluded,
            reported_ended=world.reported_ended,
            timers=world.timers,
            gate=world.gate,
        )

    def _explore(self, first: World, max_worlds: int) -> None:
        self._reached[first] = None
        queue = deque([first])
        while queue:
            world = queue.popleft()
            if len(self._reached) > max_worlds:
                raise MemoryError(f"more than {max_worlds} worlds in {self._program!r}")
            own: list[World] = []
            for move in self._moves(world):
                for arrival, after in self._apply(world, move):
                    self._edges += 1
                    if move.is_own:
                        own.append(after)
                    if after not in self._reached:
                        self._reached[after] = arrival
                        self._check(after, arrival)
                        queue.append(after)
            self._own_edges[world] = own

    def _moves(self, world: World) -> Iterator[Move]:
        yield from self._scenario.moves(world)
        if world.stale:
            yield from self._accepted_stale(world)

    def _accepted_stale(self, world: World) -> Iterator[Move]:
        """Yield the late completions that change anything; the others lead back to this world."""
        key = (world.core, world.work, bool(world.alive))
        if key in self._harmless:
            return
        stale = list(self._scenario.stale_moves(world))
        accepted = [move for move in stale if move.fact and self._has_effect(world, move.fact)]
        self._edges += len(stale) - len(accepted)
        if not accepted:
            self._harmless.add(key)
        yield from accepted

    def _has_effect(self, world: World, fact: Fact) -> bool:
        try:
            core, commands = self._step(world.core, fact)
        except Exception:  # noqa: BLE001 (a mutant may raise anything; the move will report it)
            return True
        self._where.setdefault((world.core, fact), world)
        return core is not world.core or [type(c) for c in commands] != [DropStale]

    def _apply(self, world: World, move: Move) -> Iterator[tuple[_Arrival, World]]:
        yield from self._go_on(_Arrival(world, move, ""), world, move)

    def _go_on(
        self, arrival: _Arrival, world: World, move: Move
    ) -> Iterator[tuple[_Arrival, World]]:
        try:
            outcomes = list(self._carry_out(world, move))
        except _BrokenError as broken:
            raise _BrokenError(broken.violation, arrival) from broken
        for note, after in outcomes:
            reached = arrival._replace(note=note)
            follows = self._scenario.at_once(move, after)
            if follows is None:
                yield reached, after
            else:
                reached = reached._replace(then=(*arrival.then, (after, follows)))
                yield from self._go_on(reached, after, follows)

    def _carry_out(self, world: World, move: Move) -> Iterator[tuple[str, World]]:
        if move.fact is None:
            after = move.world
            if after.core is not world.core:  # another machine
                after = after._replace(core=self._core(after.core.state, after.core.ctx))
            yield "", after
            return
        try:
            core, commands = self._step(world.core, move.fact)
            self._where.setdefault((world.core, move.fact), world)
            outcomes = list(self._scenario.carry_out(move.world, move.ends, core, commands))
        except Exception as error:
            violation = Violation("step_raised", f"{type(error).__name__}: {error}")
            raise _BrokenError(violation, _Arrival(world, move, "")) from error
        before = View(self._scenario.actions, move.world)
        for note, after in outcomes:
            edge = Edge(before, move.fact, View(self._scenario.actions, after), commands)
            broken = check_edge(edge, self._without)
            is_new = isinstance(move.fact, LoadRequested)  # which may end others
            if broken is None and move.is_own and move.is_good and not is_new:
                broken = _loses_a_load(edge)
            if broken is not None:
                raise _BrokenError(broken, _Arrival(world, move, note))
            yield note, after

    def _check(self, world: World, arrival: _Arrival) -> None:
        view = View(self._scenario.actions, world)
        if violation := check_world(view, self._without):
            raise _BrokenError(violation, arrival)
        if not view.is_quiescent or world.core.ctx.is_shutting_down or world.core in self._probed:
            return
        self._probed.add(world.core)
        if (
            "a_load_can_succeed" not in self._without
            and (answer := self._load_another(world)) is not None
        ):
            raise _BrokenError(Violation("a_load_can_succeed", answer), arrival)

    def _step(self, core: Core, fact: Fact) -> tuple[Core, tuple[Command, ...]]:
        """Step once for equal arguments; `step` is pure, which a test checks."""
        known = self._steps.get((core, fact))
        if known is None:
            stepped = self._lifecycle.step(core.state, core.ctx, fact)
            row = getattr(self._lifecycle, "fired", -1)
            self._rows.add(Fired(row, core.state))
            known = row, self._core(stepped.state, stepped.ctx), stepped.commands
            self._steps[core, fact] = known
        return known[1:]

    def _core(self, state: State, ctx: Context) -> Core:
        """Return the one object for this state and context, without the fields no guard reads."""
        if ctx.last_error is not None or ctx.last_exit is not None:
            ctx = replace(ctx, last_error=None, last_exit=None)
        return self._cores.setdefault((state, ctx), Core(state, ctx))

    # ----------------------------------------------------------------------- several worlds

    def _load_another(self, world: World) -> str | None:
        """Return why a load of another model fails from here although nothing else fails."""
        setting = replace(self._scenario, clients=parse("load Another"))
        fresh = setting.start(world.core)._replace(
            alive=world.alive,
            tokens=world.tokens,
            concluded=world.concluded,
            reported_ended=world.reported_ended,
            gate=world.gate,
        )
        try:
            _, answer = self._run_happily(setting, fresh, Ticket(1000))
        except Exception as error:  # noqa: BLE001 (a mutant may raise anything)
            return f"a load from here raises {type(error).__name__}: {error}"
        return None if isinstance(answer, Loaded) else f"a load from here ends with {answer}"

    def _run_happily(self, setting: Scenario, world: World, ticket: Ticket) -> tuple[World, object]:
        request = setting.actions[0].request
        assert request is not None
        fact: Fact | None = look_up_requested(setting.actions[0], ticket)
        call = Call(Status.WAITING, ticket)
        world = world._replace(calls=(call,), progress=(1,))
        ends: Work | None = None
        answers: list[object] = []
        for _ in range(40):
            if fact is not None:
                core, commands = self._step(world.core, fact)
                answers += [c.answer for c in commands if isinstance(c, Settle)]
                _, world = next(setting.carry_out(world, ends, core, commands))
            move = next(filter(_is_happy, setting.own_moves(world)), None)
            if move is None:
                break
            world, fact, ends = move.world, move.fact, move.ends
        return world, answers[-1] if answers else None

    def _check_for_cycles(self) -> None:
        """Remove worlds without successors until nothing is left; what is left is a cycle."""
        before: dict[World, list[World]] = {}
        open_: dict[World, int] = {}
        for world, nexts in self._own_edges.items():
            open_[world] = len(nexts)
            for after in nexts:
                before.setdefault(after, []).append(world)
        ends = [world for world, count in open_.items() if not count]
        while ends:
            end = ends.pop()
            del open_[end]
            for world in before.get(end, ()):
                open_[world] -= 1
                if not open_[world]:
                    ends.append(world)
        if open_:
            arrivals = (arrival for world in open_ if (arrival := self._reached[world]) is not None)
            first = next(iter(open_))
            nothing = _Arrival(first, Move("system", "nothing changes", first, None), "")
            arrival = next(arrivals, nothing)
            violation = Violation(
                "quiescence_is_certain", "from here the machine may never come to rest"
            )
            raise _BrokenError(violation, arrival)

    # ---------------------------------------------------------------------- counterexamples

    def _counterexample(self, broken: _BrokenError) -> Counterexample:
        arrivals: list[_Arrival] = []
        arrival: _Arrival | None = broken.last
        while arrival is not None:
            arrivals.append(arrival)
            arrival = self._reached.get(arrival.before)
        steps = tuple(line for arrival in reversed(arrivals) for line in self._lines(arrival))
        return Counterexample(broken.violation.invariant, broken.violation.message, steps)

    def _lines(self, arrival: _Arrival) -> Iterator[StoryLine]:
        """Yield what is told of it; a look-up that ends at once is not worth a line."""
        before, move, note, then = arrival
        if then and isinstance(move.fact, LookUpRequested):
            (before, found), *then_ = then
            move, then = found._replace(who=move.who, text=move.text), tuple(then_)
        for at, (world, next_move) in enumerate(((before, move), *then)):
            yield self._line(world, next_move, note if at == len(then) else "")

    def _line(self, before: World, move: Move, note: str) -> StoryLine:
        if move.fact is None:
            return StoryLine(move.who, move.text, before.core.state, before.core.state, ())
        known = self._steps.get((before.core, move.fact))
        if known is None:
            return StoryLine(move.who, move.text, before.core.state, before.core.state, ())
        _, core, commands = known
        outcome = tuple(filter(None, (*map(describe, commands), note)))
        return StoryLine(move.who, move.text, before.core.state, core.state, outcome)


def _is_happy(move: Move) -> bool:
    """It is no failure, and the server is not idle for long enough."""
    return move.is_good and not (isinstance(move.fact, TimerFired) and move.fact.kind == "idle")


def _loses_a_load(edge: Edge) -> Violation | None:
    """If nothing fails, each caller of a load goes on waiting or is answered `loaded`."""
    answered, left = answers(edge), {c.ticket for job in edge.after.ctx.wanted for c in job.callers}
    for job in edge.before.ctx.wanted:
        for caller in job.callers:
            is_loaded = isinstance(answered.get(caller.ticket), Loaded)
            if caller.failure is None and caller.ticket not in left and not is_loaded:
                message = f"nothing fails, and call {caller.ticket} loses load {job.generation}"
                return Violation("a_load_succeeds_if_nothing_fails", message)
    return None
