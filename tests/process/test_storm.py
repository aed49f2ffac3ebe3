"""Two hundred random calls from eight threads on real processes: never two servers, and none left.

Two checks are independent of the orchestrator: a lock that every fake server and its descendants
hold while they are alive, and a monitor process that watches the process table.
"""

from __future__ import annotations

import collections
import itertools
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator
from orchestrator.errors import OrchestratorError
from tests.kit.process.monitor import Monitor
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    BEHAVIOURS,
    Background,
    Fake,
    Make,
    kill,
    until,
    watched,
)

THREADS = 8
CALLS = 25
MEAN_PAUSE_S = 0.4
RESTING = collections.Counter(
    {"llama-owner-default": 1, "llama-warden-default": 1}
    | {"llama-worker": 1, "llama-log": 1}  # of the process
)
ANSWERS = {"loaded", "unloaded", "cancelled", "nothing to cancel", "busy", "superseded"} | {
    "server_start_failed",
    "deadline",
}


def storm(orch: Orchestrator, models: list[str], seed: int) -> collections.Counter[str]:
    """Make one thread's share of the calls, and return how often each answer came."""
    rng = random.Random(seed)
    answers: collections.Counter[str] = collections.Counter()
    pause = threading.Event()
    for number in range(CALLS):
        pause.wait(rng.expovariate(1 / MEAN_PAUSE_S))  # so that some loads complete
        dice = rng.random()
        try:
            if dice < 0.7:
                orch.load(
                    rng.choice(models),
                    load_request_id=f"{seed}.{number}",
                    on_busy=rng.choice(["supersede", "supersede", "queue", "reject"]),
                    deadline_s=5.0,
                    force_reload=rng.random() < 0.2,
                )
                answers["loaded"] += 1
            elif dice < 0.82:
                orch.unload()
                answers["unloaded"] += 1
            elif dice < 0.9:
                cancelled = orch.cancel(generation=orch.status().generation)
                answers["cancelled" if cancelled else "nothing to cancel"] += 1
            else:
                other = f"{rng.randrange(THREADS)}.{rng.randrange(CALLS)}"
                cancelled = orch.cancel(other)
                answers["cancelled" if cancelled else "nothing to cancel"] += 1
        except OrchestratorError as error:
            answers[error.category] += 1
    return answers


def our_threads() -> collections.Counter[str]:
    return collections.Counter(t.name for t in threading.enumerate() if t.name.startswith("llama-"))


@pytest.mark.timeout(180)
def test_concurrent_random_calls_never_run_two_servers_and_leave_none(
    make: Make, fake: Fake, state_dir: Path, tmp_path: Path, tiny_model: str
) -> None:
    """B01 to B05, B14 to B17 and B36."""
    models = []
    for name in BEHAVIOURS:
        (tmp_path / name).hardlink_to(tiny_model)
        models.append(str(tmp_path / name))
    fake.behave(by_model=BEHAVIOURS)
    before = our_threads()  # a test may have left one that waits for a disk
    orch = make(kill_grace_s=0.4).start()
    with watched(state_dir, tmp_path / "watched.json") as report:
        calls = [Background(storm, orch, models, seed) for seed in range(THREADS)]
        answers: collections.Counter[str] = collections.Counter()
        for call in calls:
            answers += call.result(120)
        orch.unload()
        assert servers_of(state_dir) == set()
        assert fake.running() == set()
        seen = report()
    assert answers.total() == THREADS * CALLS, answers
    assert answers.keys() <= ANSWERS, answers
    starts = fake.entries("start")
    assert len(starts) > 20
    assert answers["loaded"] > 10
    assert answers["superseded"] > 10
    fake.assert_no_overlap()
    assert seen["pairs"] == []
    assert seen["left"] == []
    assert len(seen["seen"]) > 20
    until(lambda: our_threads() <= before | RESTING, "the end of idle threads")
    print(dict(answers), len(starts), "starts,", seen["looks"], "looks")


# The checks themselves


def test_the_lock_of_the_fake_server_detects_two_servers(fake: Fake, tmp_path: Path) -> None:
    command = [fake.path, "-m", "x.gguf", "--port", "0"]
    popen: dict[str, Any] = {"env": fake.env, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **popen) as one:
        fake.wait_for("bound")
        fake.assert_no_overlap()
        with subprocess.Popen(command, **popen) as two:
            fake.wait_for("bound", 2)
            assert [entry.pid for entry in fake.entries("overlap")] == [two.pid]
            two.kill()
        one.kill()


def test_the_lock_of_the_fake_server_detects_a_descendant(fake: Fake) -> None:
    """It may outlive its server."""
    fake.behave(children=["closed!"])
    command = [fake.path, "-m", "x.gguf", "--port", "0"]
    popen: dict[str, Any] = {"env": fake.env, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **popen) as one:
        child = fake.wait_for("child").pid
        one.kill()
    with subprocess.Popen(command, **popen) as two:
        assert fake.wait_for("overlap").pid == two.pid
        fake.wait_for("child", 2)
        two.kill()
    assert child in fake.running()
    for pid in fake.running():
        kill(pid)
    until(lambda: not fake.running(), "their end")


def test_the_monitor_detects_two_servers_at_once(state_dir: Path, tmp_path: Path) -> None:
    """But not two that run one after the other."""

    def start() -> subprocess.Popen[str]:
        return start_bearer(state_dir, next(keys), "print(flush=True); input()")

    def end(process: subprocess.Popen[str]) -> int:
        with process:
            process.kill()
        return process.pid

    keys = map(str, itertools.count())
    with watched(state_dir, tmp_path / "one.json") as report:
        first = end(start())
        second = end(start())
        seen = report()
    assert [entry["pid"] for entry in seen["seen"]] == [first, second]
    assert seen["pairs"] == []
    with watched(state_dir, tmp_path / "two.json") as report:
        processes = [start(), start()]
        pids = [end(process) for process in processes]
        seen = report()
    assert seen["pairs"] == [pids]
    assert seen["left"] == []


def test_the_monitor_takes_a_daemon_for_its_server(state_dir: Path) -> None:
    """Even if it has not seen the parent between them, and the daemon has written no journal."""
    monitor = Monitor(str(state_dir))
    program = (
        "import os, signal\n"
        "print(flush=True); input()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    print(os.getpid(), flush=True); signal.pause()\n"
        "os.wait(); print(flush=True); signal.pause()\n"
    )
    with start_bearer(state_dir, "key", program) as server:
        monitor.look()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("\n")
        server.stdin.flush()
        lines = [server.stdout.readline() for _ in range(2)]
        [daemon] = "".join(lines).split()
        monitor.look()
        server.kill()
        kill(int(daemon))
    assert [entry["pid"] for entry in monitor.seen] == [server.pid, int(daemon)]
    assert monitor.pairs == []


def start_bearer(state_dir: Path, key: str, program: str) -> subprocess.Popen[str]:
    """Start a program that looks like a server; it prints a line once it runs."""
    environment = {"LLAMA_ORCHESTRATOR_SLOT_TOKEN": f"{state_dir}/s:0:0", "LLAMA_API_KEY": key}
    process = subprocess.Popen(
        [sys.executable, "-ISc", program],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    return process
