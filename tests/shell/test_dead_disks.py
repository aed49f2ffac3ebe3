"""B73: a disk that never answers costs the call that reads it, and no other."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator import Cancelled, TimedOut
from tests.kit.shell.harness import PATIENCE_S, Harness, error_of

DEAD = "dead"


@pytest.fixture(autouse=True)
def _dead_disk(harness: Harness) -> None:
    harness.hold_look_ups_of(DEAD)


@pytest.mark.parametrize(
    ("fields", "category", "field", "after_s"),
    [
        ({"deadline_s": 5.0}, "deadline", "deadline_s", 5.0),
        ({"stall_timeout_s": 7.0}, "stalled", "stall_timeout_s", 7.0),
        ({}, "stalled", "stall_timeout_s", 600.0),
    ],
)
def test_time_limits_end_a_load_whose_look_up_does_not(
    harness: Harness,
    pool: ThreadPoolExecutor,
    fields: dict[str, float],
    category: str,
    field: str,
    after_s: float,
) -> None:
    with harness.sync() as orch:
        load = pool.submit(lambda: orch.load(DEAD, **fields))  # type: ignore[arg-type]
        harness.until_look_up_of(DEAD)
        harness.pass_time(after_s - 0.1)
        assert not load.done()
        harness.pass_time(0.2)
        error = error_of(load)
        assert isinstance(error, TimedOut)
        assert (error.problem.category, error.problem.field) == (category, field)
        assert DEAD in error.message
        assert orch.load("A").status == "loaded"
        harness.release_look_ups_of(DEAD)


def test_time_of_the_look_up_counts_for_the_deadline_of_the_load(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.open_gates = frozenset()
    with harness.sync() as orch:
        load = pool.submit(lambda: orch.load(DEAD, deadline_s=5.0))
        harness.until_look_up_of(DEAD)
        harness.pass_time(4.0)
        harness.release_look_ups_of(DEAD)
        harness.effects.wait_for("kill")
        harness.pass_time(0.9)
        assert not load.done()
        harness.pass_time(0.2)
        harness.effects.open()
        assert error_of(load).problem.category == "deadline"


def test_prefetch_whose_look_up_hangs_can_be_cancelled(
    harness: Harness, pool: ThreadPoolExecutor
) -> None:
    with harness.sync() as orch:
        prefetch = pool.submit(lambda: orch.prefetch(DEAD, load_request_id="x"))
        harness.until_look_up_of(DEAD)
        assert orch.cancel("x")
        assert isinstance(error_of(prefetch), Cancelled)
        harness.release_look_ups_of(DEAD)


def test_two_hundred_hanging_look_ups_delay_no_other_load(harness: Harness) -> None:
    """Each has a thread of its own, which is given up when its call ends."""
    with harness.sync() as orch, ThreadPoolExecutor(200) as callers:
        loads = [callers.submit(orch.load, DEAD) for _ in range(200)]
        harness.until(lambda shown: len(shown.ctx.look_ups) == 200)
        assert orch.load("A").status == "loaded"
        assert orch.unload().status == "unloaded"
        assert all(isinstance(error_of(load), Exception) for load in loads)
        harness.release_look_ups_of(DEAD)


_HOST = """
import asyncio, threading
import httpx
from orchestrator import AsyncOrchestrator
from orchestrator.http import create_app
from orchestrator.models.source import ModelSource

looking = threading.Event()

def never(self, request):
    looking.set()
    threading.Event().wait()

ModelSource.look_up = never

async def main():
    async with AsyncOrchestrator(llama_server="/bin/true", state_dir=sys_argv[1]) as orch:
        transport = httpx.ASGITransport(create_app(orch))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model_path": "/mnt/dead/model.gguf"}
            planning = asyncio.create_task(client.post("/api/inference/plan", json=body))
            loading = asyncio.create_task(orch.load("/mnt/dead/model.gguf"))
            while not looking.is_set():
                await asyncio.sleep(0.01)
            assert (await client.get("/api/inference/status")).status_code == 200
            planning.cancel()
            await asyncio.gather(planning, return_exceptions=True)
    (error,) = await asyncio.gather(loading, return_exceptions=True)
    print(type(error).__name__)

asyncio.run(main())
print("ended")
"""


def test_host_ends_while_look_ups_hang(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither its event loop nor the interpreter waits for the threads."""
    state = tmp_path_factory.mktemp("state")
    ended = subprocess.run(
        [sys.executable, "-c", _HOST.replace("sys_argv[1]", repr(str(state)))],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["ShuttingDown", "ended"]), ended.stderr
