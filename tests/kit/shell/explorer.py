"""Schedule explorer: all schedules of a scene over the real owner, depth first.

A schedule is a list of decisions: which of the moves of a stage (`stage.py`) comes next, and
whether a server can be started. `explore` takes the first alternative everywhere, then goes back to
the last decision that has another one, replays what led to it and continues from there. Two facts
may be in the inbox at once, in both orders; how often, and how many failures there are, is limited
by the scene. A stage that was reached before is not explored again.

A broken invariant is searched for in simpler scenes. Then its schedule is shortened until no move
can be left out, and reported as a story.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tests.kit.machine.invariants import Violation
from tests.kit.machine.story import Counterexample, StoryLine
from tests.kit.shell.records import logged, only_failures
from tests.kit.shell.stage import BrokenError, Choose, Move

MAX_SCHEDULES = 100_000
_MOVES = 200
_SIMPLER_SCHEDULES = 3000


class Stage(Protocol):
    """One schedule, as far as it has got; see `stage.Stage`."""

    story: list[StoryLine]
    is_checking: bool

    def moves(self) -> list[Move]: ...
    def do(self, move: Move) -> None: ...
    def key(self) -> tuple[object, ...]: ...
    def check_rest(self) -> None: ...
    def close(self) -> None: ...


class Scene(Protocol):
    """What is the same in all schedules; see `scene.Scene`."""

    @property
    def program(self) -> str: ...
    def begin(self, choose: Choose) -> Stage: ...
    def simpler(self) -> Iterator[Scene]: ...


@dataclass(frozen=True, slots=True)
class Report:
    """The size and the result of an exploration.

    Attributes:
        schedules: Number of schedules.
        stages: Number of different stages that were reached.
        moves: Number of moves, replays included.
    """

    scene: Scene
    schedules: int
    stages: int
    moves: int
    seconds: float
    counterexample: Counterexample | None

    def __str__(self) -> str:
        found = self.counterexample
        return (
            f"{self.scene.program}: {self.schedules} schedules, {self.stages} stages, "
            f"{self.moves} moves, {self.seconds:.2f} s" + (f"\n{found.story}" if found else "")
        )


@dataclass(slots=True)
class _Decision:
    label: str
    taken: int
    count: int


class _KnownError(Exception):
    """A stage that was reached before."""


def explore(
    scene: Scene,
    *,
    prune: bool = True,
    max_schedules: int = MAX_SCHEDULES,
    log: Callable[[], AbstractContextManager[object]] = only_failures,
) -> Report:
    """Explore a scene to the end, or to the first broken invariant.

    Args:
        prune: Stop at a stage that was reached before.
        log: What becomes of log records meanwhile.

    Raises:
        MemoryError: there are more than `max_schedules`.
    """
    with log():
        return _Exploration(scene, prune=prune).run(max_schedules)


def wander(scene: Scene, schedules: int) -> Report:
    """Explore some schedules of a scene that has too many: random ones, the same in every run."""
    with only_failures():
        return _Exploration(scene, prune=False).wander(schedules)


class _Exploration:
    def __init__(self, scene: Scene, *, prune: bool = True) -> None:
        self._scene = scene
        self._prune = prune
        self._seen: set[tuple[object, ...]] = set()
        self._schedules = 0
        self._moves = 0

    def run(self, max_schedules: int) -> Report:
        started = time.perf_counter()
        prefix: list[_Decision] = []
        found = None
        while found is None:
            if self._schedules == max_schedules:
                raise MemoryError(f"more than {max_schedules} schedules of {self._scene.program!r}")
            run = _Run(prefix)
            found = self._search(run)
            if (prefix := run.next_prefix()) == []:
                break
        return self._report(started, found)

    def wander(self, schedules: int) -> Report:
        started = time.perf_counter()
        found = None
        while found is None and self._schedules < schedules:
            chance = random.Random(self._schedules)
            found = self._search(_Run((), chance))
        return self._report(started, found)

    def _report(self, started: float, found: Counterexample | None) -> Report:
        seconds = time.perf_counter() - started
        return Report(self._scene, self._schedules, len(self._seen), self._moves, seconds, found)

    def _search(self, run: _Run) -> Counterexample | None:
        self._schedules += 1
        broken = self._play(run)
        if broken is None:
            return None
        labels = [decision.label for decision in run.decisions]
        return self._simplest(broken.violation) or self._tell(
            broken.violation, self._shorten(labels, broken.violation)
        )

    def _play(self, run: _Run) -> BrokenError | None:
        logged().clear()
        stage = self._scene.begin(run.choose)
        try:
            for _ in range(_MOVES):
                if run.is_new:
                    self._arrive(stage)
                moves = stage.moves()
                if not moves:
                    return None
                move = moves[run.choose([move.label for move in moves])]
                stage.is_checking = run.is_at_the_end
                stage.do(move)
            raise AssertionError(f"no end after {_MOVES} moves")
        except _KnownError:
            return None
        except BrokenError as broken:
            return broken
        finally:
            self._moves += len(stage.story)
            stage.close()

    def _arrive(self, stage: Stage) -> None:
        key = stage.key()
        if key in self._seen and self._prune:
            raise _KnownError
        self._seen.add(key)
        stage.check_rest()

    # --------------------------------------------------------------------------------- stories

    def _simplest(self, violation: Violation) -> Counterexample | None:
        """Try to break the same invariant with fewer clients, mishaps or pairs."""
        for scene in self._scene.simpler():
            logged().clear()
            with contextlib.suppress(MemoryError):
                found = _Exploration(scene).run(_SIMPLER_SCHEDULES).counterexample
                if found is not None and found.invariant == violation.invariant:
                    return found
        return None

    def _shorten(self, labels: list[str], violation: Violation) -> list[str]:
        """Leave out every move that is not needed to break the same invariant."""
        at = len(labels) - 1
        while at >= 0:
            fewer = labels[:at] + labels[at + 1 :]
            _, broken = self._replay(fewer)
            if broken is not None and broken.violation.invariant == violation.invariant:
                labels, violation = fewer, broken.violation
                at = len(labels)
            at -= 1
        return labels

    def _replay(self, labels: Sequence[str]) -> tuple[Stage, BrokenError | None]:
        """Play these moves as far as they are possible, then let everything succeed."""
        script = list(labels)

        def choose(options: Sequence[str]) -> int:
            for label in script:
                if label in options:
                    script.remove(label)
                    return options.index(label)
            return 0

        logged().clear()
        stage = self._scene.begin(choose)
        stage.is_checking = True
        try:
            for _ in range(_MOVES):
                stage.check_rest()
                moves = stage.moves()
                wanted = [m for m in moves if m.is_own or m.label in script]
                if not wanted:
                    break
                stage.do(wanted[choose([move.label for move in wanted])])
        except BrokenError as broken:
            return stage, broken
        finally:
            stage.close()
        return stage, None

    def _tell(self, violation: Violation, labels: list[str]) -> Counterexample:
        stage, broken = self._replay(labels)
        if broken is not None:
            violation = broken.violation
        return Counterexample(violation.invariant, violation.message, tuple(stage.story))


class _Run:
    """Takes a prefix of decisions, then the first alternative or a random one, and records all."""

    def __init__(self, prefix: Sequence[_Decision], chance: random.Random | None = None) -> None:
        self._prefix = prefix
        self._chance = chance
        self.decisions: list[_Decision] = []

    @property
    def is_new(self) -> bool:
        """Whether the last decision of the prefix has been taken."""
        return len(self.decisions) >= len(self._prefix)

    @property
    def is_at_the_end(self) -> bool:
        """Whether the next decision is the last of the prefix, which is new, or comes later."""
        return len(self.decisions) + 1 >= len(self._prefix)

    def choose(self, options: Sequence[str]) -> int:
        at = len(self.decisions)
        taken = self._prefix[at].taken if at < len(self._prefix) else self._first(len(options))
        self.decisions.append(_Decision(options[taken], taken, len(options)))
        return taken

    def _first(self, count: int) -> int:
        return self._chance.randrange(count) if self._chance else 0

    def next_prefix(self) -> list[_Decision]:
        decisions = list(self.decisions)
        while decisions and decisions[-1].taken + 1 == decisions[-1].count:
            decisions.pop()
        if decisions:
            last = decisions.pop()
            decisions.append(_Decision("", last.taken + 1, last.count))
        return decisions
