"""Random operations on a pool of real servers, with crashes: of one process, and of a service."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from orchestrator import ModelPool, OrchestratorError, State
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.process.pool_soak import EXPECTED, ROOM, soak
from tests.kit.process.support import is_running

pytestmark = pytest.mark.external

_THREADS: Final = 8
_OTHERS: Final = ("load", "unload", "cut", "cancel", "kill", "add", "remove", "plan")
_OPERATIONS: Final = ("lease",) * 6 + _OTHERS
_EXPECTED: Final = {
    "cancelled": "an unload, a cancel or a removal came first",
    "model_not_found": "it was removed",
    "server_start_failed": "it was killed while it loaded",
    "server_exited": "it was killed",
    "name_taken": "another thread has added it",
}


class Operations:
    """What one thread does, over and over."""

    def __init__(self, pool: ModelPool, extra: str, seed: int, seen: Counter[str]) -> None:
        self._pool, self._extra, self._seen = pool, extra, seen
        self._random = random.Random(seed)

    def run(self, count: int) -> None:
        for _ in range(count):
            what, name = self._random.choice(_OPERATIONS), self._random.choice("abcde")
            try:
                getattr(self, what)(name)
                self._seen[what] += 1
            except OrchestratorError as error:
                if error.category not in _EXPECTED:
                    raise
                self._seen[error.category] += 1
            budget = self._pool.status().budget[0]
            assert budget.reserved_mib <= budget.total_mib

    def lease(self, name: str) -> None:
        with self._pool.lease(name) as server:
            assert server.pid > 0

    def load(self, name: str) -> None:
        self._pool.load(name, force_reload=self._random.random() < 0.3)

    def unload(self, name: str) -> None:
        self._pool.unload(name)

    def cut(self, name: str) -> None:
        self._pool.unload(name, cut=True)

    def cancel(self, name: str) -> None:
        self._pool.cancel(name)

    def plan(self, name: str) -> None:
        self._pool.plan(name)

    def kill(self, name: str) -> None:
        if (pid := self._pool.model_status(name).pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def add(self, _: str) -> None:
        self._pool.add("e", model_path=self._extra)

    def remove(self, _: str) -> None:
        self._pool.remove("e")


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.deep)])
def test_random_operations_keep_to_the_budget_and_leave_nothing(
    count: int, llama_server: str, state_dir: Path, tmp_path: Path
) -> None:
    """Every call is answered, at most two servers live, and in the end none."""
    files = {n: str(write_tiny_model(tmp_path / f"{n}.gguf", seed=ord(n))) for n in "abcde"}
    settings = {"memory": "250 MiB", "cache_ram_mib": 100, "min_resident_s": 0, "max_wait_s": 0.05}
    models = {name: {"model_path": files[name]} for name in "abcd"}
    seen: Counter[str] = Counter()
    alive: set[int] = set()
    is_over = threading.Event()

    def sample(pool: ModelPool) -> None:
        """Count the servers from the outside."""
        while not is_over.wait(0.005):
            pids = {one.pid for one in pool.status().models if one.pid is not None}
            assert len(pids) <= 2
            alive.update(pids)

    with (
        ModelPool(
            {"pool": settings, "models": models},
            llama_server=llama_server,
            state_dir=state_dir,
            drain_timeout_s=5,
        ) as pool,
        ThreadPoolExecutor(_THREADS + 1) as threads,
    ):
        sampler = threads.submit(sample, pool)
        runs = [
            threads.submit(Operations(pool, files["e"], seed, seen).run, count // _THREADS)
            for seed in range(_THREADS)
        ]
        try:
            for run in runs:
                run.result()
        finally:
            is_over.set()
        sampler.result()
        assert seen.keys() >= set(_OPERATIONS)  # each has succeeded
        assert not pool.status().waiting
        for model in pool.status().models:
            pool.unload(model.name)
        assert pool.status().budget[0].reserved_mib == 0
        assert {one.state for one in pool.status().models} == {State.IDLE}
    assert not [pid for pid in alive if is_running(pid)]


@pytest.mark.deep
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    ("operations", "mean_pause_s"),
    [pytest.param(320, 0.3, id="320"), pytest.param(5_000, 5.5, id="5000")],
)
def test_random_use_of_a_service_that_is_killed_again_and_again(
    operations: int, mean_pause_s: float, llama_server: str, tmp_path: Path
) -> None:
    """16 clients, four models, room for two. A stream is cut only by what the test has done; every
    other answer is right, or names what the test has done.
    """
    report = soak(tmp_path, llama_server, operations, mean_pause_s=mean_pause_s)
    print(report)
    assert report.pairs == 0
    assert report.most <= ROOM
    assert report.left == 0
    assert report.lives > 1
    assert report.killed["server"] + report.killed["keeper"] > 2
    answered = sum(n for name, n in report.answers.items() if name not in EXPECTED)
    assert answered > operations / 2
    assert report.cold.is_within(report.warm)
    assert report.cold.resident_kib - report.warm.resident_kib < 32 << 10
