"""Layer B: the real owner keeps its promises in every schedule.

Each scene is explored completely: calls, cancels, callers that leave, completions, failures, failed
kills, crashes and timers in every order, and two facts in the inbox in both orders. `pytest -s`
prints the sizes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.machine.context import Policy
from orchestrator.machine.recovery import RestartPolicy
from tests.kit.machine.invariants import INVARIANTS
from tests.kit.shell.explorer import explore, wander
from tests.kit.shell.promises import PROMISES
from tests.kit.shell.records import stuck
from tests.kit.shell.scene import (
    ALL_MISHAPS,
    USUAL_MISHAPS,
    WITH_HANG,
    WITH_HOST,
    WITH_KEEPER,
    Scene,
)

CONTINUE = Policy(abandoned_load="continue")
KEEP = Policy(keeps_server=True)
RESTART = Policy(restart=RestartPolicy(limit=1))
IDLE = Policy(idle_ttl_s=1.0)

SCENES = (
    # supersede, join, queue, reject
    Scene("load A | load B | unload"),
    Scene("load A | load B", mishaps=2, pairs=2),
    Scene("load A | load B queue | load A queue", pairs=0),
    Scene("load A | load B queue | unload B", pairs=0),
    Scene("load A | load B reject"),
    Scene("load A", warm="A", mishaps=3, pairs=2),
    # a cancel, and one that arrives before its load
    Scene("load A; cancel", mishaps=2),
    Scene("load A id=x; cancel x | load A id=y"),
    Scene("cancel x | load A slow id=x | load B", pairs=0),
    # callers that leave: waiting, looking up, joined, queued
    Scene("load A; withdraw", mishaps=2),
    Scene("load A slow; withdraw", mishaps=2),
    Scene("load A late; withdraw", mishaps=2),
    Scene("load A; withdraw | load A", mishaps=2, pairs=0),
    Scene("load A; withdraw | load A; withdraw", pairs=0),
    Scene("load A; withdraw | load B queue", policy=CONTINUE),
    Scene("load B | load A queue; withdraw", warm="A", pairs=0),
    Scene("load A | load B queue; cancel | load A queue; withdraw", policy=CONTINUE, mishaps=0),
    # leases, drains, and drains that time out
    Scene("lease; release | load B", warm="A", mishaps=2),
    Scene("lease; withdraw | load B; cancel", warm="A", pairs=0),
    Scene("lease | load A | unload"),
    # a shutdown or a crash at any moment
    Scene("load A | shutdown", mishaps=2),
    Scene("load B | load A queue | shutdown", warm="A", pairs=0),
    Scene("lease | shutdown; load B", warm="A", mishaps=2),
    Scene("unload", warm="A", mishaps=3),
    # prefetches and deadlines
    Scene("load o/B prefetch; cancel", warm="A", mishaps=2),
    Scene("load A slow | load o/B prefetch; withdraw", pairs=0),
    Scene("load o/B prefetch | unload o/B", warm="A", pairs=0),
    Scene("prefetch o/B; withdraw | load o/B; cancel", mishaps=0),
    Scene("prefetch o/B id=x | cancel x | shutdown", pairs=0),
    Scene("load A deadline", mishaps=2),
    Scene("load A deadline | load B queue deadline", mishaps=0),
    # calls that arrive in another order, or not at all
    Scene("load A slow | load B slow | unload A", kinds=USUAL_MISHAPS | {"look-up"}, pairs=0),
    # the previous model is restored, and a crashed server restarted
    Scene("load B restore; withdraw", warm="A", mishaps=2),
    Scene("load B restore deadline | unload A", warm="A", mishaps=2, pairs=0),
    Scene("load B restore | load A queue", warm="A", pairs=0),
    Scene("load A", policy=RESTART, mishaps=3),
    Scene("lease; withdraw | unload", warm="A", policy=RESTART, mishaps=2),
    Scene("load A | shutdown", warm="A", policy=RESTART, mishaps=2, pairs=0),
    # an idle server
    Scene("lease; release | load B", warm="A", policy=IDLE, mishaps=2),
    Scene("lease; withdraw | load A", policy=IDLE, pairs=2),
    # a keeper that is killed at any moment
    Scene("load A | load B queue", kinds=WITH_KEEPER, mishaps=2),
    Scene("load B restore; withdraw", warm="A", kinds=WITH_KEEPER, mishaps=2, pairs=0),
    Scene("load A | shutdown", kinds=WITH_KEEPER, policy=RESTART, mishaps=2, pairs=0),
    # a server that hangs at any moment
    Scene("load A | load B queue ", kinds=WITH_HANG, mishaps=2, pairs=0),
    Scene("lease; release | load B restore", warm="A", kinds=WITH_HANG, policy=RESTART, pairs=0),
    # a host that is killed at any moment, and the next owner
    Scene("load A | load B queue  ", kinds=WITH_HOST, pairs=0),
    Scene("load A | load B; cancel", warm="A", kinds=WITH_HOST, policy=KEEP, mishaps=2, pairs=0),
    Scene("load A; withdraw | unload", warm="A", kinds=WITH_HOST, policy=KEEP),
    Scene("load A | lease | shutdown", warm="A", kinds=WITH_HOST | WITH_HANG, policy=KEEP, pairs=0),
    # a slot with an unknown process
    Scene("load A | unload", kinds=frozenset({"stray", "kill", "spawn"}), mishaps=3),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.program)
def test_owner_keeps_every_promise(scene: Scene) -> None:
    """Every decision of the machine is carried out and published, in any order of facts."""
    report = explore(scene)
    print(f"\n{report}")
    assert report.counterexample is None, report.counterexample.story
    assert report.stages > report.schedules > 1


WALKS = (
    Scene("load A; cancel; load B | load B queue; withdraw | lease; release | unload; load A"),
    Scene(
        "load A id=x | cancel x; load B slow | load A queue; withdraw | unload B | lease; release"
    ),
    Scene("load A force; load A deadline | lease; withdraw; load B | load A queue | shutdown"),
    Scene("load A; load B restore | lease; release; load C restore | unload", policy=RESTART),
)


@pytest.mark.parametrize("walk", WALKS, ids=lambda scene: scene.program)
def test_owner_keeps_every_promise_in_longer_programs(walk: Scene) -> None:
    """Too many schedules to explore: some hundred of them, random but the same in every run."""
    report = wander(replace(walk, mishaps=4, pairs=8, kinds=ALL_MISHAPS), schedules=400)
    print(f"\n{report}")
    assert report.counterexample is None, report.counterexample.story
    assert report.stages > 400


@pytest.mark.parametrize(
    "scene",
    [
        Scene("load A | load B | unload", mishaps=0),
        Scene("lease; release | load B", warm="A"),
        Scene("load A | shutdown", mishaps=2),
        Scene("load A", policy=RESTART, mishaps=2),
    ],
    ids=lambda scene: scene.program,
)
def test_everything_comes_to_rest_with_a_log_writer_that_never_returns(scene: Scene) -> None:
    """The same schedules as with a log that works, to the move."""
    usual, report = explore(scene), explore(scene, log=stuck)
    assert report.counterexample is usual.counterexample is None
    assert (report.schedules, report.stages, report.moves) == (
        usual.schedules,
        usual.stages,
        usual.moves,
    )


def test_pruning_loses_no_stage() -> None:
    """Without pruning the same stages are reached, in many more schedules."""
    for program in ("load A; cancel", "load A | unload"):
        scene = Scene(program, mishaps=0, pairs=1)
        pruned, whole = explore(scene), explore(scene, prune=False)
        assert pruned.counterexample is whole.counterexample is None
        assert pruned.stages == whole.stages
        assert pruned.moves < whole.moves


def test_exploration_is_deterministic() -> None:
    """A counterexample that changes from run to run cannot be discussed."""
    first, second = (explore(Scene("load A | unload")) for _ in range(2))
    assert (first.schedules, first.stages, first.moves) == (
        second.schedules,
        second.stages,
        second.moves,
    )


def test_exploration_raises_at_its_bound() -> None:
    """A bound that cuts off in silence would call an unexplored owner correct."""
    with pytest.raises(MemoryError, match="more than 100 schedules"):
        explore(Scene("load A | load B | unload"), max_schedules=100)


def test_promises_and_invariants_have_different_names() -> None:
    assert not PROMISES & INVARIANTS
