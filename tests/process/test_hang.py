"""A Healthy server that hangs is ended; one that works, or whose host was paused, never is."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import LoadOutcome, Orchestrator, RestartPolicy, State
from orchestrator.server.watch import PROBES
from tests.kit.process.support import (
    Background,
    Fake,
    Make,
    StartHost,
    is_running,
    key_of,
    transitions,
    until,
    until_state,
    watches,
)

HANG_S = 1.0
SOON = RestartPolicy(limit=3, backoff_s=0.01)


def loaded(orch: Orchestrator) -> LoadOutcome:
    found = orch.status().loaded
    assert found is not None
    return found


def watch_for(probes: int) -> None:
    """Let the time of so many probes pass, in which nothing is to happen."""
    ends = time.monotonic() + probes * HANG_S / PROBES
    until(lambda: time.monotonic() > ends, "the time of the probes")


def assert_told(orch: Orchestrator, pid: int) -> None:
    last = orch.status().last_exit
    assert last is not None
    assert (last.pid, last.reason) == (pid, "hung")


def test_a_stopped_server_is_ended_and_told_as_hung(make: Make, fake: Fake, model_a: str) -> None:
    orch = make(hang_timeout_s=HANG_S)
    pid = orch.load(model_a).pid
    with orch.lease():
        os.kill(pid, signal.SIGSTOP)
        until_state(orch, State.IDLE)
        assert orch.lease_count == 0
    assert_told(orch, pid)
    error = orch.status().last_error
    assert error is not None
    assert error.message.startswith("the server hung: neither an answer nor any work for ")
    assert [event.data["trigger"] for event in transitions(orch)][-2:] == ["hung", "emptied"]
    assert not is_running(pid)


@pytest.mark.parametrize("ignores_term", [0, -1])
def test_a_hung_server_is_restarted_by_policy(
    make: Make, fake: Fake, model_a: str, ignores_term: int
) -> None:
    fake.behave(hangs="idle", ignore_term=ignores_term)
    orch = make(hang_timeout_s=HANG_S, kill_grace_s=0.1, restart=SOON)
    pid = orch.load(model_a).pid
    fake.wait_for("hangs")
    fake.behave()
    fake.wait_for("start", 2)
    until_state(orch, State.HEALTHY)
    assert loaded(orch).pid != pid
    assert_told(orch, pid)
    fake.assert_no_overlap()


@pytest.mark.parametrize("work", ["compute", "print"])
def test_a_server_that_works_is_left_alone(make: Make, fake: Fake, model_a: str, work: str) -> None:
    """As one that computes a long prompt on its only slot."""
    fake.behave(hangs=work)
    orch = make(hang_timeout_s=HANG_S)
    pid = orch.load(model_a).pid
    fake.wait_for("hangs")
    with orch.lease():
        watch_for(3 * PROBES)
        assert loaded(orch).pid == pid
    assert watches()


def test_a_server_in_use_must_answer_from_its_main_loop(
    make: Make, fake: Fake, model_a: str
) -> None:
    """The threads that serve HTTP go on when it hangs; at rest nobody waits for it."""
    orch = make(hang_timeout_s=HANG_S, protect_server=False)  # else readiness asks for it
    fake.behave(silent_at="/slots")
    pid = orch.load(model_a).pid
    watch_for(2 * PROBES)
    assert loaded(orch).pid == pid
    with orch.lease():
        until_state(orch, State.IDLE)
    assert_told(orch, pid)


def test_a_full_queue_of_connections_hides_no_hang(make: Make, fake: Fake, model_a: str) -> None:
    """Then the kernel answers no connection at all."""
    orch = make(hang_timeout_s=HANG_S)
    outcome = orch.load(model_a)
    os.kill(outcome.pid, signal.SIGSTOP)
    port = int(outcome.base_url.rpartition(":")[2])
    waiting = []
    for _ in range(200):
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", port))
        waiting.append(connection)
    until_state(orch, State.IDLE)
    for connection in waiting:
        connection.close()
    assert_told(orch, outcome.pid)


def test_a_paused_host_ends_no_server(host: StartHost, fake: Fake) -> None:
    """Nor one that is paused together with its server, as a machine is."""
    backend = host(
        f"orch = make(hang_timeout_s={HANG_S})\n"
        'pid = orch.load(a["model"]).pid\n'
        "send(pid=pid)\n"
        "for line in sys.stdin: send(pid=orch.status().loaded and orch.status().loaded.pid)\n"
    )
    pid = backend.receive()["pid"]
    for paused in ([backend.pid], [backend.pid, pid], [pid, backend.pid]):
        for one in paused:
            os.kill(one, signal.SIGSTOP)
        watch_for(3 * PROBES)
        for one in reversed(paused):
            os.kill(one, signal.SIGCONT)
        for _ in range(3):
            backend.send()
            assert backend.receive()["pid"] == pid
    assert len(fake.entries("start")) == 1


def test_nobody_watches_where_a_hang_is_allowed(make: Make, fake: Fake, model_a: str) -> None:
    before = set(watches())
    orch = make(hang_timeout_s=None)
    orch.load(model_a)
    assert not set(watches()) - before
    orch.close()
    orch = make(hang_timeout_s=HANG_S)
    orch.load(model_a)
    until(lambda: set(watches()) - before, "the watch, which begins after the answer")
    [watch] = set(watches()) - before
    orch.unload()
    until(lambda: not watch.is_alive(), "the end of the watch")


def test_an_adopted_server_is_watched(host: StartHost, make: Make, fake: Fake) -> None:
    backend = host(
        'orch = make(on_host_exit="keep")\nsend(pid=orch.load(a["model"]).pid)\nsleep_forever()'
    )
    pid = backend.receive()["pid"]
    backend.die()
    orch = make(hang_timeout_s=HANG_S).start()
    assert loaded(orch).pid == pid
    os.kill(pid, signal.SIGSTOP)
    until_state(orch, State.IDLE)
    assert_told(orch, pid)


# The real server


@pytest.fixture
def watched(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(
        llama_server=llama_server, state_dir=state_dir, hang_timeout_s=HANG_S, restart=SOON
    ) as orch:
        yield orch


@pytest.mark.external
@pytest.mark.real
def test_a_real_server_that_hangs_is_replaced_and_its_request_ends(
    watched: Orchestrator, model_a: str
) -> None:
    outcome = watched.load(model_a)
    asked = Background(ask, outcome)
    until(lambda: outcome.pid, "the server")
    os.kill(outcome.pid, signal.SIGSTOP)
    assert isinstance(asked.error(), OSError | http.client.HTTPException)
    until(lambda: watched.status().loaded, "another server")
    until_state(watched, State.HEALTHY)
    assert loaded(watched).pid != outcome.pid
    assert_told(watched, outcome.pid)


@contextlib.contextmanager
def asking(server: LoadOutcome, *, stream: bool) -> Iterator[http.client.HTTPResponse]:
    """Ask for tokens without end."""
    address = server.base_url.removeprefix("http://")
    body = {"prompt": "hi", "n_predict": 1_000_000, "ignore_eos": True, "stream": stream}
    headers = {"Content-Type": "application/json", **key_of(server.pid)}
    with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        connection.request("POST", "/completion", json.dumps(body), headers)
        yield connection.getresponse()


def ask(server: LoadOutcome) -> bytes:
    with asking(server, stream=False) as answer:
        return answer.read()


@pytest.mark.external
@pytest.mark.real
def test_a_real_server_that_computes_is_left_alone(watched: Orchestrator, model_a: str) -> None:
    """On its one slot, for several times the time of a hang."""
    outcome = watched.load(model_a, n_parallel=1, max_seq_length=2048)
    with watched.lease():
        ends = time.monotonic() + 4 * HANG_S
        while time.monotonic() < ends:
            with asking(outcome, stream=True) as answer:  # it ends when the context is full
                while answer.readline() and time.monotonic() < ends:
                    pass
    assert loaded(watched).pid == outcome.pid
