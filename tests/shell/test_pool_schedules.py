"""Layer B of the pool: through its facades, no order of callers, slots, threads and facts breaks a
promise.

The pool's owner, its slots, and the owner of every slot are the real ones, and all is pumped by
hand. `pytest -s` prints the sizes.
"""

from __future__ import annotations

from functools import partial

import pytest

from tests.kit.shell.explorer import explore, wander
from tests.kit.shell.pool_facades import LoopPoolStage, ThreadPoolStage
from tests.kit.shell.pool_scene import PoolScene
from tests.kit.shell.pool_stage import PoolStage

STAGES = pytest.mark.parametrize(
    "stage", [LoopPoolStage, ThreadPoolStage], ids=["asyncio", "threads"]
)


scene = partial(PoolScene, stage=ThreadPoolStage)


SCENES = (
    scene("lease A; withdraw", mishaps=1, pairs=2),
    scene("lease A; release | load B", pairs=1),
    scene("lease A; release | lease B; withdraw", warm="A", pairs=1),
    scene("lease A; withdraw | lease B; release", warm="B", mishaps=1, pairs=0),
    scene("lease A; release | lease A; withdraw", pairs=1),
    scene("lease A; release | lease B; release", warm="A", pairs=1),
    scene("lease A; release | unload A", pairs=1, mishaps=1),
    scene("lease A | cut A", warm="A", pairs=1),
    scene("load A; withdraw | cancel A", pairs=1),
    scene("reload A | lease A; release", warm="A", pairs=1),
    scene("lease A; release | remove A", pairs=2),
    scene("load B | remove A; withdraw", warm="A", pairs=1),
    scene("lease A; withdraw | shutdown", warm="B", pairs=1),
    scene("lease A; release | shutdown", warm="A", mishaps=1, pairs=1),
    scene("lease A | lease B", ticks=1, pairs=0),
    scene("request A; release | request A; withdraw", warm="A", pairs=1),
    scene("request A; release | request A; release | load B", warm="A", pairs=0),
    scene("request A; release | lease A; withdraw | unload A", warm="A", pairs=0),
    scene("lease A; release | load B | load C", sizes=(1, 1, 2), budget=2, pairs=0),
)


@pytest.mark.timeout(600)
@STAGES
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.program)
def test_callers_of_a_pool_get_the_answer_of_its_machine(
    scene: PoolScene, stage: type[PoolStage]
) -> None:
    """Also if an interrupt crosses a grant, an eviction a new lease, or a crash the shutdown."""
    report = explore(scene.on(stage))
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample
    assert report.stages > report.schedules > 1


DEEP = (
    scene("lease A; release | lease B; release | load A; withdraw", pairs=1),
    scene("lease A; withdraw | lease B; release", warm="B", mishaps=1, pairs=1),
    scene("lease A; release | lease B; release", warm="A", ticks=2, pairs=1),
    scene("lease A; release | remove A | lease B; withdraw", pairs=1),
    scene("lease A; release | unload A | reload A", mishaps=1, pairs=1),
    scene("lease A; release | load B | shutdown", mishaps=1, pairs=1),
    scene("lease A; release | lease B; release | lease C; release", sizes=(1, 1, 2), budget=2),
)


@pytest.mark.deep
@pytest.mark.timeout(7200)
@STAGES
@pytest.mark.parametrize("scene", DEEP, ids=lambda scene: scene.program)
def test_callers_of_a_pool_get_the_answer_of_its_machine_in_longer_scenes(
    scene: PoolScene, stage: type[PoolStage]
) -> None:
    report = explore(scene.on(stage), max_schedules=10**7)
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample


@pytest.mark.timeout(600)
@STAGES
@pytest.mark.parametrize("schedules", [100, pytest.param(20_000, marks=pytest.mark.deep)])
def test_scene_too_large_to_exhaust_breaks_no_promise(
    schedules: int, stage: type[PoolStage]
) -> None:
    """Random schedules, the same in every run: four clients, three models, and two failures."""
    program = "lease A; release | lease B; withdraw | load C; unload B | cut A; reload C"
    large = PoolScene(program, stage, sizes=(1, 1, 2), budget=2, mishaps=2, pairs=3, ticks=2)
    report = wander(large, schedules)
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample
