"""Layer B through the facades: no order of callbacks, threads and facts breaks a promise.

The scenes of `test_explorer.py` call the owner; here real tasks and real threads do, through
`AsyncOrchestrator` and `Orchestrator`. `pytest -s` shows the sizes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.context import Policy
from tests.shell.explorer import explore
from tests.shell.fronts import FacadeStage, LoopStage, ThreadStage
from tests.shell.scene import Scene

CONTINUE = Policy(abandoned_load="continue")

SCENES = (
    Scene("load A; withdraw", mishaps=1, pairs=1),
    Scene("load A; withdraw | load A", mishaps=0, pairs=1),
    Scene("load A; withdraw", policy=CONTINUE, mishaps=0, pairs=1),
    Scene("load A | load B", mishaps=0, pairs=1),
    Scene("load A id=x; withdraw | cancel x", mishaps=0, pairs=1),
    Scene("load A | unload", mishaps=1, pairs=0),
    Scene("unload; withdraw | load A", mishaps=0, pairs=1),
    Scene("lease; withdraw", warm="A", mishaps=1, pairs=1),
    Scene("lease; release | load B; withdraw", warm="A", mishaps=0, pairs=0),
    Scene("lease; withdraw | load A; withdraw", mishaps=0, pairs=1),
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", [LoopStage, ThreadStage], ids=["asyncio", "threads"])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.program)
def test_whoever_calls_hears_what_the_machine_says(scene: Scene, stage: type[FacadeStage]) -> None:
    """A cancel that crosses an answer, a grant that crosses an interrupt: nothing is lost."""
    report = explore(replace(scene, stage=stage))
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample
    assert report.stages > report.schedules > 1
