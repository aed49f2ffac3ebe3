"""Layer B through the facades: no order of callbacks, threads and facts breaks a promise.

In the scenes of `test_explorer.py` clients call the owner; here they are real tasks and threads
that call `AsyncOrchestrator` and `Orchestrator`. `pytest -s` prints the sizes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Unpack, cast

import pytest

from orchestrator.machine.context import Policy
from orchestrator.runtime import answers
from orchestrator.runtime.answers import LeasedServer, LoadOutcome
from orchestrator.runtime.calls import RequestLike, unwrap
from orchestrator.runtime.orchestrator import AsyncOrchestrator, Orchestrator
from orchestrator.settings.fields import LoadFields
from tests.kit.shell.explorer import explore, wander
from tests.kit.shell.facade_stage import FacadeStage, LoopStage, ThreadStage
from tests.kit.shell.scene import Scene

CONTINUE = Policy(abandoned_load="continue")

SCENES = (
    Scene("load A; withdraw", mishaps=1, pairs=1),
    Scene("load A; withdraw | load A", mishaps=0, pairs=0),
    Scene("load A; withdraw", policy=CONTINUE, mishaps=0, pairs=1),
    Scene("load A | load B", mishaps=0, pairs=0),
    Scene("load A id=x; withdraw | cancel x", mishaps=0, pairs=0),
    Scene("load A | unload", mishaps=1, pairs=0),
    Scene("unload; withdraw | load A", mishaps=0, pairs=0),
    Scene("lease; withdraw", warm="A", mishaps=1, pairs=1),
    Scene("lease; release | load B; withdraw", warm="A", mishaps=0, pairs=0),
    Scene("lease; withdraw | load A", mishaps=0, pairs=0),
    Scene("load o/B prefetch; withdraw", warm="A", mishaps=1, pairs=0),
    Scene("prefetch o/B id=x; withdraw | cancel x", mishaps=0, pairs=0),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [LoopStage, ThreadStage], ids=["asyncio", "threads"])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.program)
def test_callers_get_the_answer_of_the_machine(scene: Scene, stage: type[FacadeStage]) -> None:
    """Also if a cancel crosses an answer, or an interrupt crosses a grant."""
    report = explore(replace(scene, stage=stage))
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample
    assert report.stages > report.schedules > 1


DEEP = (
    Scene("load A; withdraw | load A; withdraw", mishaps=0, pairs=1),
    Scene("load A; withdraw | load B", mishaps=1, pairs=1),
    Scene("lease; withdraw | load B; withdraw", warm="A", mishaps=1, pairs=1),
    Scene("lease; release | lease; withdraw | unload", warm="A", mishaps=0, pairs=0),
    Scene("load A | load o/B prefetch | unload o/B", mishaps=0, pairs=0),
)


@pytest.mark.deep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [LoopStage, ThreadStage], ids=["asyncio", "threads"])
@pytest.mark.parametrize("scene", DEEP, ids=lambda scene: scene.program)
def test_callers_get_the_answer_of_the_machine_in_longer_scenes(
    scene: Scene, stage: type[FacadeStage]
) -> None:
    """Two callers that leave at any moment, while a third one stops everything."""
    report = explore(replace(scene, stage=stage), max_schedules=10**7)
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample


@pytest.mark.deep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [LoopStage, ThreadStage], ids=["asyncio", "threads"])
def test_callers_get_the_answer_of_the_machine_in_a_scene_too_large_to_exhaust(
    stage: type[FacadeStage],
) -> None:
    """All of its schedules take over half an hour: these are chosen at random, but are the same
    in every run.
    """
    scene = Scene("load A; withdraw | load B queue; withdraw | unload", mishaps=0, pairs=0)
    report = wander(replace(scene, stage=stage), schedules=10_000)
    print(f"\n{stage.facade.__name__}: {report}")
    assert report.counterexample is None, report.counterexample


# --------------------------------------------------------------------------------- seeded faults


class KeepsLeases(AsyncOrchestrator):
    """Releases a lease only if it noticed the grant."""

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedServer]:
        call = await self._ask(self._lease_fact)
        granted = unwrap(await asyncio.wrap_future(call.settled))
        try:
            yield answers.leased_server(granted)
        finally:
            call.leave()


class KeepsLeasesInThreads(Orchestrator):
    """The same for threads."""

    @contextlib.contextmanager
    def lease(self) -> Iterator[LeasedServer]:
        call = self._ask(self._lease_fact)
        granted = unwrap(self._wait(call, call.settled))
        try:
            yield answers.leased_server(granted)
        finally:
            call.leave()


class Swallows(AsyncOrchestrator):
    """Takes a cancelled wait for a failed one."""

    async def load(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        try:
            return await super().load(request, **fields)
        except asyncio.CancelledError:
            return cast("LoadOutcome", None)


@pytest.mark.parametrize(
    ("stage", "facade", "scene"),
    [
        (LoopStage, KeepsLeases, "lease; withdraw"),
        (ThreadStage, KeepsLeasesInThreads, "lease; withdraw"),
        (LoopStage, Swallows, "load B; withdraw"),
    ],
)
def test_explorer_finds_a_facade_that_loses_an_answer(
    stage: type[FacadeStage], facade: type[Any], scene: str
) -> None:
    faulty = type("Faulty", (stage,), {"facade": facade})
    report = explore(Scene(scene, warm="A", mishaps=0, stage=faulty))
    print(f"\n{report}")
    assert report.counterexample is not None
    assert report.counterexample.invariant == "promise_callers_get_their_answer"
