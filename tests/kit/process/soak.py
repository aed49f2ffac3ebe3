"""Random operations from many threads on fake servers, with faults injected continuously.

`soak` runs them and returns a report; `python -m tests.kit.process.soak 5000` prints it.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator import Orchestrator, RestartPolicy
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import OrchestratorError
from tests.kit.process.servers import servers_of
from tests.kit.process.support import BEHAVIOURS, Background, Fake, pinned, watched

THREADS: Final = 16
_MEAN_PAUSE_S: Final = 0.6  # so that some loads complete
_SABOTAGE_EVERY_S: Final = 0.1
_GOOD: Final = ("plain.gguf", "late.gguf")
_DEAD_ENDS: Final = {"hanging.gguf", "deaf.gguf"}
_MODELS: Final = BEHAVIOURS | {"flooding.gguf": {"flood_bytes": 200_000}}
_SIGNALS: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGSTOP, signal.SIGABRT)
ANSWERS: Final = {
    *("loaded", "already_loaded", "unloaded", "not_loaded", "cancelled", "nothing to cancel"),
    *("leased", "planned", "read", "submitted", "superseded", "busy", "server_start_failed"),
    *("deadline", "stalled", "not_loaded_error", "server_exited"),
}


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds at rest: a long run must not increase it."""

    descriptors: int
    threads: int
    children: int
    files: int
    traced_bytes: int
    resident_bytes: int

    @classmethod
    def by(cls, state_dir: Path) -> Held:
        gc.collect()
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = len(file.read().split())
        return cls(
            len(os.listdir("/proc/self/fd")),
            sum(t.name != "llama-worker" for t in threading.enumerate()),  # those are bounded
            children,
            sum(1 for _ in state_dir.rglob("*")) + len(os.listdir(tempfile.gettempdir())),
            tracemalloc.get_traced_memory()[0],
            resident,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one run."""

    operations: int
    seconds: float
    answers: collections.Counter[str]
    sabotages: int
    starts: int
    overlaps: int
    two_alive: int
    left: int
    looks: int
    warm: Held
    cold: Held

    def __str__(self) -> str:
        grown = {
            name: getattr(self.cold, name) - getattr(self.warm, name) for name in Held.__slots__
        }
        answers = ", ".join(f"{name} {count}" for name, count in self.answers.most_common())
        return (
            f"{self.operations} operations from {THREADS} threads in {self.seconds:.0f} s, "
            f"{self.starts} servers started, {self.sabotages} signals sent to them\n"
            f"  {answers}\n"
            f"  two alive: {self.two_alive} (in {self.looks} scans of the process table), "
            f"overlaps detected by the servers: {self.overlaps}, left: {self.left}\n"
            f"  grown since the warm-up: {grown}"
        )


class Caller:
    """One thread's share of the operations."""

    def __init__(self, orch: Orchestrator, folder: Path, seed: int) -> None:
        self.orch = orch
        self.folder = folder
        self.seed = seed
        self.dice = random.Random(seed)
        self.answers: collections.Counter[str] = collections.Counter()
        self.pause = threading.Event()
        self.number = 0
        self.operations = (
            *((self.load, 50), (self.submit, 5), (self.unload, 8), (self.cancel, 12)),
            *((self.lease, 10), (self.plan, 5), (self.read, 10)),
        )

    def run(self, count: int) -> None:
        calls, weights = zip(*self.operations, strict=True)
        for call in self.dice.choices(calls, weights, k=count):
            self.pause.wait(self.dice.expovariate(1 / _MEAN_PAUSE_S))
            self.number += 1
            try:
                answer = call()
            except OrchestratorError as error:
                answer = error.category
                answer = "not_loaded_error" if answer == "not_loaded" else answer
            self.answers[answer] += 1

    def request(self) -> dict[str, Any]:
        names = (*_MODELS, *_GOOD * 3)
        name = self.dice.choice(names)
        return {
            "request": str(self.folder / name),
            "max_seq_length": self.dice.choice([0, 0, 512]),
            "load_request_id": f"{self.seed}.{self.number}",
            "on_busy": self.dice.choice(["supersede", "queue", "reject"]),
            "force_reload": self.dice.random() < 0.2,
            "restore_previous": self.dice.random() < 0.2,
            "pinned": self.dice.random() < 0.1,
            "deadline_s": 1.0 if name in _DEAD_ENDS else 8.0,
        }

    def load(self) -> str:
        return self.orch.load(**self.request()).status

    def submit(self) -> str:
        self.orch.submit(**self.request())
        return "submitted"

    def unload(self) -> str:
        return self.orch.unload().status

    def cancel(self) -> str:
        if self.dice.random() < 0.5:
            ended = self.orch.cancel(generation=self.orch.status().generation)
        else:
            other = f"{self.dice.randrange(THREADS)}.{max(0, self.number - self.dice.randrange(3))}"
            ended = self.orch.cancel(other)
        return "cancelled" if ended else "nothing to cancel"

    def lease(self) -> str:
        with self.orch.lease():
            self.pause.wait(self.dice.random() * 0.1)
        return "leased"

    def plan(self) -> str:
        self.orch.plan(**self.request())
        return "planned"

    def read(self) -> str:
        self.orch.status().as_dict()
        self.orch.progress()
        self.orch.logs(50)
        self.orch.history(20)
        return "read"


class Saboteur:
    """Signals the loaded server at random, as the kernel, a user or a bug would."""

    def __init__(self, orch: Orchestrator, seed: int) -> None:
        self._orch = orch
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self._work = Background(self._run)
        self.count = 0

    def stop(self) -> None:
        self._over.set()
        self._work.result()

    def _run(self) -> None:
        while not self._over.wait(self._dice.expovariate(1 / _SABOTAGE_EVERY_S)):
            loaded = self._orch.status().loaded
            if loaded is not None:
                with contextlib.suppress(ProcessLookupError), pinned(loaded.pid) as fd:
                    still = self._orch.status().loaded
                    if still is not None and still.pid == loaded.pid:
                        signal.pidfd_send_signal(fd, self._dice.choice(_SIGNALS))
                        self.count += 1


@contextlib.contextmanager
def traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def private_temporary_files(folder: Path) -> Iterator[None]:
    """Give this process and its servers a folder for temporary files of their own."""
    folder.mkdir()
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        del os.environ["TMPDIR"]
        if variable is not None:
            os.environ["TMPDIR"] = variable


def soak(directory: Path, operations: int, *, warm_up: int, seed: int = 0) -> Report:
    """Run this many operations after a warm-up; only files remain."""
    folder, state_dir = directory / "models", directory / "state"
    folder.mkdir()
    state_dir.mkdir(mode=0o700)
    tiny = write_tiny_model(directory / "tiny.gguf")
    for name in _MODELS:
        (folder / name).hardlink_to(tiny)
    fake = Fake(directory / "fake")
    fake.behave(by_model=_MODELS)
    policy = RestartPolicy(backoff_s=0.05, backoff_max_s=0.2, limit=3, cool_down_s=1.0)
    orch = Orchestrator(
        llama_server=fake.path,
        state_dir=state_dir,
        server_env=fake.env,
        kill_grace_s=0.3,
        drain_timeout_s=0.2,
        restart=policy,
        idle_ttl_s=5.0,
    )
    with (
        private_temporary_files(directory / "tmp"),
        traced(),
        watched(state_dir, directory / "watched.json") as report,
        orch,
    ):
        callers = [Caller(orch, folder, seed * THREADS + n) for n in range(THREADS)]
        _run(callers, orch, warm_up, seed)
        warm = Held.by(state_dir)
        begun = time.monotonic()
        sabotages = _run(callers, orch, operations, seed + 1)
        seconds = time.monotonic() - begun
        cold = Held.by(state_dir)
        left = servers_of(state_dir) | fake.running()
        seen = report()
    entries = fake.entries()
    return Report(
        operations,
        seconds,
        sum((caller.answers for caller in callers), collections.Counter()),
        sabotages,
        len([entry for entry in entries if entry["event"] == "start"]),
        len([entry for entry in entries if entry["event"] == "overlap"]),
        len(seen["pairs"]),
        len(left | set(seen["left"])),
        seen["looks"],
        warm,
        cold,
    )


def _run(callers: list[Caller], orch: Orchestrator, operations: int, seed: int) -> int:
    """Run all callers to the end, and return how many signals were sent."""
    saboteur = Saboteur(orch, seed)
    shares = [operations // THREADS + (n < operations % THREADS) for n in range(THREADS)]
    calls = [Background(caller.run, share) for caller, share in zip(callers, shares, strict=True)]
    for call in calls:
        call.result(60 + operations)
    saboteur.stop()
    orch.unload()
    return saboteur.count


def main(operations: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        print(soak(Path(directory), operations, warm_up=operations // 5))


if __name__ == "__main__":
    main(int(sys.argv[1]))
