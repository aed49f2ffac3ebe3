"""Faults that no other file of tests injects; docs/assurance.md has the table of them all.

On the real llama-server where it can be made to do it, on the fake one where it cannot. What the
host alone is made to suffer happens in a host of its own, in namespaces where it needs them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from orchestrator import Orchestrator, State
from orchestrator.errors import (
    DeadlineExceeded,
    OrchestratorError,
    ServerStartFailed,
    Stalled,
)
from tests.conftest import servers_of
from tests.process.support import (
    Background,
    Fake,
    Host,
    Make,
    Watch,
    is_running,
    kill,
    nothing_left,
    until,
    until_state,
)
from tests.process.test_facade_real import stream
from tests.process.test_parent_death import until_guarded

StartHost = Callable[..., Host]


@pytest.fixture
def real(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    """An orchestrator over the real llama-server."""
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orch:
        yield orch


def answers(base_url: str) -> bool:
    with httpx.Client(base_url=base_url, trust_env=False) as server:
        return server.get("/health").status_code == 200


# The server ends


@pytest.mark.external
@pytest.mark.parametrize(
    "signum",
    ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM", "SIGILL", "SIGBUS", "SIGFPE", "SIGHUP", "SIGINT"],
)
def test_whatever_signal_ends_a_healthy_server_it_is_told_and_loads_again(
    real: Orchestrator, tiny_model: str, signum: str
) -> None:
    """llama-server takes SIGTERM and SIGINT as a wish and exits with 0; the others are crashes."""
    number = getattr(signal, signum)
    pid = real.load(tiny_model).pid
    os.kill(pid, number)
    until_state(real, State.IDLE)
    status = real.status()
    assert status.loaded is None
    assert status.last_error is not None
    assert status.last_error.category == "server_exited"
    assert status.last_exit is not None
    expected = 0 if signum in ("SIGTERM", "SIGINT") else -number
    assert (status.last_exit.pid, status.last_exit.returncode) == (pid, expected)
    again = real.load(tiny_model)
    assert (again.status, is_running(again.pid)) == ("loaded", True)


@pytest.mark.parametrize("code", [0, 1, 2, 127, 255])
def test_whatever_code_a_healthy_server_exits_with_it_is_told(
    orch: Orchestrator, fake: Fake, model_a: str, code: int
) -> None:
    """Also 0: a server that ends of its own accord is as gone as one that crashes."""
    fake.behave(crash_after_s=0.05, crash_code=code)
    pid = orch.load(model_a).pid
    until_state(orch, State.IDLE)
    status = orch.status()
    assert status.loaded is None
    assert status.last_exit is not None
    assert (status.last_exit.pid, status.last_exit.returncode) == (pid, code)


@pytest.mark.external
def test_a_server_that_the_kernel_kills_is_noticed(real: Orchestrator, tiny_model: str) -> None:
    """At the end of its CPU time, in the middle of a stream: a SIGKILL that nobody sent, as the
    out-of-memory killer's is.
    """
    outcome = real.load(tiny_model)
    connection = stream(outcome.base_url)
    resource.prlimit(outcome.pid, resource.RLIMIT_CPU, (1, 1))
    until_state(real, State.IDLE)
    connection.close()
    last_exit = real.status().last_exit
    assert last_exit is not None
    assert (last_exit.pid, last_exit.returncode) == (outcome.pid, -signal.SIGKILL)
    assert real.load(tiny_model).status == "loaded"


@pytest.mark.external
def test_a_server_that_runs_into_a_memory_limit_fails_alone(
    llama_server: str, make: Make, fake: Fake, tiny_model: str
) -> None:
    """Too little for its libraries, or for its model: an error, and the next load works."""
    limited = fake.script("limited.sh", f'#!/bin/sh\nulimit -v 40000\nexec "{llama_server}" "$@"\n')
    orch = make(llama_server=limited)
    with pytest.raises(ServerStartFailed) as failed:
        orch.load(tiny_model)
    assert failed.value.log_tail
    fake.script("limited.sh", f'#!/bin/sh\nexec "{llama_server}" "$@"\n')
    assert orch.load(tiny_model).status == "loaded"


# Somebody else answers


@pytest.mark.external
def test_a_port_that_is_taken_over_after_a_crash_is_nobodys(
    real: Orchestrator, tiny_model: str
) -> None:
    """A server binds port 0, so nobody can take its port before it; this one takes it after."""
    before = real.load(tiny_model)
    port = urlsplit(before.base_url).port
    kill(before.pid)
    until_state(real, State.IDLE)
    with socket.create_server(("127.0.0.1", port or 0), reuse_port=False) as thief:
        assert real.status().loaded is None
        after = real.load(tiny_model)
        assert (after.status, after.base_url != before.base_url) == ("loaded", True)
        assert answers(after.base_url)
        thief.settimeout(0)
        with pytest.raises(BlockingIOError):
            thief.accept()  # nobody has even asked it


# The clock


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
def test_a_step_of_the_wall_clock_ends_nothing_and_prolongs_nothing(
    make: Make, fake: Fake, model_a: str, model_b: str, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """NTP, a suspended laptop, a user: stalls, deadlines and idle times are on another clock."""
    real_time, jumped = time.time, threading.Event()
    monkeypatch.setattr(time, "time", lambda: real_time() + (jump_s if jumped.is_set() else 0.0))
    orch = make(kill_grace_s=0.2)
    fake.behave(by_model={"a.gguf": {"loading_s": 0.6}, "b.gguf": {"hang": True}})
    loading = Background(orch.load, model_a, deadline_s=20.0, stall_timeout_s=10.0)
    until_state(orch, State.WAITING_HEALTH)
    jumped.set()
    outcome = loading.result()
    assert 0 <= outcome.timings_s.total < 20
    assert orch.load(model_a).status == "already_loaded"
    jumped.clear()
    loading = Background(orch.load, model_b, stall_timeout_s=0.6)
    until_state(orch, State.WAITING_HEALTH)
    begun = time.monotonic()
    jumped.set()
    assert isinstance(loading.error(), Stalled)
    assert time.monotonic() - begun < 10
    with pytest.raises(DeadlineExceeded):
        orch.load(model_b, deadline_s=0.3)
    orch.load(model_a, idle_ttl_s=0.5)
    jumped.clear()
    assert orch.status().loaded is not None
    until_state(orch, State.IDLE)
    assert orch.status().uptime_s >= 0


# The host ends, whatever it is doing

IN_A_STATE = """
from orchestrator import forks, models, process
def stop_in(module, name, *, after):
    wrapped = getattr(module, name)
    def stopping(*args, **settings):
        result = wrapped(*args, **settings) if after else None
        say(state=str(orch.status().state))
        rest_of_thread.wait()
        return result
    setattr(module, name, stopping)
rest_of_thread = threading.Event()
orch = make(kill_grace_s=GRACE_S)
state = STATE
if state == "Downloading":
    orch.start()
    stop_in(models, "locate", after=True)
if state == "Spawning":
    orch.start()
    stop_in(process.forks, "popen", after=True)
if state in ("Healthy", "Killing"):
    orch.load(a["model"])
if state in ("Downloading", "Spawning", "WaitingHealth"):
    orch.submit(a["model"])
if state == "Killing":
    threading.Thread(target=orch.unload, daemon=True).start()
if state == "Idle":
    orch.load(a["model"]); orch.unload()
if state not in ("Downloading", "Spawning"):
    while str(orch.status().state) != state: time.sleep(0.001)
    say(state=state)
try: rest()
finally: rest_of_thread.set()  # only Ctrl-C comes by here: then all that is under way goes on
"""
"""It says so once it is in that state, and stays there."""


@pytest.mark.parametrize("signum", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("state", list(State))
def test_in_whatever_state_the_backend_is_ended_no_server_outlives_it(
    host: StartHost, make: Make, fake: Fake, model_a: str, state_dir: Path, state: State, signum: str
) -> None:
    """The server does not help: it ignores SIGTERM wherever it is alive. And the slot is free.

    Only Ctrl-C lets the host end in order, so only then is its grace waited for.
    """
    is_deaf = state is not State.IDLE
    fake.behave(ignore_term=-1 if is_deaf else 0, hang=state is State.WAITING_HEALTH)
    grace_s = "1.0" if signum == "SIGINT" else "600.0"
    backend = host(IN_A_STATE.replace("STATE", repr(str(state))).replace("GRACE_S", grace_s))
    assert backend.hear() == {"state": str(state)}
    until_guarded(backend)
    has_server = state not in (State.IDLE, State.DOWNLOADING)
    if has_server:
        server = Watch(fake.wait_for("start").pid)
        assert is_running(server.pid)
    backend.process.send_signal(getattr(signal, signum))
    died = time.monotonic()
    backend.process.wait(30)
    if has_server:
        server.seconds_to_exit(died, 10)
    until(lambda: nothing_left(state_dir, fake), "the rest", 5)
    fake.behave()
    assert make().load(model_a).status == "loaded"
    fake.assert_never_two()
