"""Days of virtual time with restarts, idle times, deadlines and drains.

The explorer enumerates short schedules; this plays long random ones on the same stage and checks
every step against the same invariants. Hypothesis draws the seed and the length, and shortens a
history that fails.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from orchestrator.base import log
from orchestrator.machine.context import Policy
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from tests.kit.shell.scene import ALL_MISHAPS, RecordedLifecycle, Scene
from tests.kit.shell.stage import Stage

DAY_S: Final = 86_400.0
CLIENTS: Final = 5
CALLS: Final = 24  # of each client: with restarts, fewer loads than the history holds
POLICY: Final = Policy(
    drain_timeout_s=30.0,
    restart=RestartPolicy(backoff_s=60.0, backoff_max_s=3600.0, limit=3, cool_down_s=7200.0),
    idle_ttl_s=3 * 3600.0,
)
OTHERS: Final = 0.12
"""Probability of a call or a failure while something else can happen by itself."""
LOADS: Final = ("", "", "slow", "queue", "reject", "force", "restore", "deadline", "pinned")


@dataclass
class History:
    """One long schedule.

    Attributes:
        seen: The states it was in.
        fired: The kinds of timers that fired.
    """

    stage: Stage
    dice: random.Random
    seen: set[State]
    fired: set[str]

    def play(self, moves: int) -> None:
        """Make so many moves, then those that happen by themselves."""
        for _ in range(moves):
            self.one_move(only_own=False)
        for _ in range(5_000):
            if not self.one_move(only_own=True):
                break
        self.stage.check_rest()

    def one_move(self, *, only_own: bool) -> bool:
        """Make a move, at once or some time later. Returns False if there is none."""
        stage = self.stage
        found = [move for move in stage.moves() if move.is_own or not only_own]
        if not found:
            return False
        own = [move for move in found if move.is_own]
        others = [move for move in found if not move.is_own]
        rarely = others and (not own or self.dice.random() < OTHERS)
        move = self.dice.choice(others if rarely else own)
        if move.who == "clock":
            self.fired |= {kind for kind, _ in stage.owner._timers if f"the {kind}" in move.text}
        elif not stage.inbox.facts:
            self.let_time_pass()
        stage.do(move)
        self.seen.add(stage.owner.snapshot.state)
        return True

    def let_time_pass(self) -> None:
        """Advance the clock, at most to the next timer."""
        clock, timers = self.stage.clock, self.stage.owner._timers.values()
        later = clock.now + self.dice.choice([0.0, 0.1, 10.0, 600.0, 5 * 3600.0])
        clock.now = max(clock.now, min([later, *timers]))


def program(dice: random.Random) -> str:
    """Return a random program in the notation of `tests.kit.machine.programs`."""

    def client() -> str:
        calls: list[str] = []
        has_lease = False
        for _ in range(CALLS):
            model, option = dice.choice("AABC"), dice.choice(LOADS)
            choices = [f"load {model} {option}".strip()] * 5 + ["unload", f"unload {model}"]
            choices += ["lease"] + ["release"] * has_lease * 2
            choices += ["withdraw"] if calls else []
            choices += ["cancel"] if any(call.startswith("load") for call in calls) else []
            calls.append(dice.choice(choices))
            has_lease = has_lease or calls[-1] == "lease"
        return "; ".join(calls)

    last = ["shutdown"] if dice.random() < 0.2 else []
    return " | ".join([*(client() for _ in range(CLIENTS)), *last])


def history_of(seed: int, machine: RecordedLifecycle) -> History:
    dice = random.Random(seed)
    machine._steps.clear()  # contexts of long histories do not come back
    scene = Scene(
        program(dice),
        mishaps=30,
        kinds=ALL_MISHAPS,
        pairs=1 << 30,
        policy=POLICY,
        machine=machine,
    )

    def choose(names: Sequence[str]) -> int:
        return dice.randrange(len(names))

    stage = Stage(scene, choose)
    stage.is_checking = True
    return History(stage, dice, set(), set())


QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DEEP = settings(QUICK, max_examples=1_000, derandomize=False)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(DEEP, id="deep", marks=[pytest.mark.deep, pytest.mark.timeout(3600)]),
    ],
)
def test_days_of_calls_crashes_and_timers_keep_every_promise(
    profile: settings, failures: list[object]
) -> None:
    """No short schedule has a timer of yesterday, a fifth restart or a lease of hours."""
    machine = RecordedLifecycle()
    seen: set[State] = set()
    fired: set[str] = set()
    longest_s = 0.0

    @profile
    @given(seed=st.integers(0, 1 << 32), moves=st.integers(300, 1_500))
    def play(seed: int, moves: int) -> None:
        nonlocal longest_s
        history = history_of(seed, machine)
        begun = history.stage.clock.now
        try:
            history.play(moves)
        except BaseException:
            for line in history.stage.story[-40:]:
                note(f"{line.who}: {line.text} [{line.before} -> {line.after}]")
            raise
        finally:
            log.flush()
            failures.clear()  # planned ones; anything else is a broken promise
        seen.update(history.seen)
        fired.update(history.fired)
        longest_s = max(longest_s, history.stage.clock.now - begun)

    play()
    assert seen == set(State)
    assert fired == {"drain", "deadline", "restart", "idle"}
    assert longest_s > DAY_S
    print(f"the longest history took {longest_s / DAY_S:.1f} days")
