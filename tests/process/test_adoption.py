"""A server outlives its host, and the next owner goes on with it, or ends it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import AsyncOrchestrator, LoadOutcome, Orchestrator, SlotOwned, State
from orchestrator.errors import NotLoaded
from orchestrator.http import create_app
from orchestrator.runtime import handover
from orchestrator.server.slot import Slot
from orchestrator.server.tree import Channel
from tests.kit.http import PREFIX, serving
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    Fake,
    Host,
    Make,
    StartHost,
    Watch,
    in_a_fork,
    is_running,
    keeper_of,
    keepers_of,
    kill,
    reaped,
    transitions,
    until,
    until_state,
)

LOAD = 'outcome = orch.load(a["model"], max_seq_length=512)\nsend(pid=outcome.pid)\n'
KEEPING = 'orch = make(on_host_exit="keep")\n' + LOAD + "sleep_forever()"


def keeping(host: StartHost, program: str = KEEPING) -> tuple[Host, int]:
    """Return a host that keeps its server, and the server."""
    backend = host(program)
    return backend, backend.receive()["pid"]


def loaded(orch: Orchestrator) -> LoadOutcome:
    found = orch.status().loaded
    assert found is not None
    return found


@pytest.fixture
def adopt(make: Make) -> Callable[..., Orchestrator]:
    """Make the next owner, which has decided by the time this returns."""
    return lambda **settings: make(on_host_exit="keep", **settings).start()


# What is adopted


def test_a_model_outlives_a_killed_host(
    host: StartHost, adopt: Callable[..., Orchestrator], fake: Fake, model_a: str
) -> None:
    backend, pid = keeping(host)
    backend.die()
    orch = adopt()
    found = loaded(orch)
    assert (found.pid, found.adopted, found.generation) == (pid, True, 1)
    assert (found.context_length, found.requested_context_length) == (4096, 512)
    edges = [(event.data["source"], event.data["dest"]) for event in transitions(orch)]
    assert edges == [("Idle", "WaitingHealth"), ("WaitingHealth", "Healthy")]
    assert transitions(orch)[0].data["trigger"] == "found"
    again = orch.load(model_a, max_seq_length=512)
    assert (again.status, again.pid, again.adopted) == ("already_loaded", pid, True)
    assert len(fake.entries("start")) == 1
    assert orch.unload().status == "unloaded"
    assert not is_running(pid)


def test_close_keeps_the_model_for_the_same_object_too(
    make: Make, model_a: str, fake: Fake
) -> None:
    orch = make(on_host_exit="keep")
    pid = orch.load(model_a).pid
    orch.close()
    assert is_running(pid)
    orch.start()
    assert (loaded(orch).pid, loaded(orch).adopted) == (pid, True)
    orch.close(keep=False)
    assert not is_running(pid)
    assert len(fake.entries("start")) == 1


def test_an_async_owner_adopts(host: StartHost, fake: Fake, state_dir: Path, model_a: str) -> None:
    backend, pid = keeping(host)
    backend.die()

    async def go_on() -> LoadOutcome:
        async with AsyncOrchestrator(
            llama_server=fake.path, state_dir=state_dir, server_env=fake.env
        ) as orch:
            return await orch.load(model_a, max_seq_length=512)

    found = asyncio.run(go_on())
    assert (found.status, found.pid) == ("already_loaded", pid)
    assert not is_running(pid), "it stops what it has adopted, by its own settings"


def test_generations_extra_args_and_reasons_go_on(
    host: StartHost, adopt: Callable[..., Orchestrator], model_a: str, model_b: str
) -> None:
    backend, pid = keeping(
        host,
        'orch = make(on_host_exit="keep")\n'
        'orch.load(a["model"])\n'
        'outcome = orch.load(a["model"], llama_extra_args=["--top-k", "5"])\n'
        "send(pid=outcome.pid)\nsleep_forever()",
    )
    backend.die()
    orch = adopt()
    assert loaded(orch).generation == 2
    assert loaded(orch).llama_extra_args == ["--top-k", "5"]
    assert orch.load(model_a).status == "already_loaded"
    other = orch.load(model_b)
    assert other.generation == 3
    assert [reason.field for reason in other.reload_reasons] == ["model_path", "llama_extra_args"]
    assert orch.load(model_a).llama_extra_args == ["--top-k", "5"]
    assert not is_running(pid)


def test_an_owner_with_other_settings_adopts_too(
    host: StartHost, adopt: Callable[..., Orchestrator], fake: Fake, model_a: str
) -> None:
    """Its next load is an ordinary reload."""
    backend, pid = keeping(host)
    backend.die()
    other = fake.script("other-server", Path(fake.path).read_text())
    orch = adopt(llama_server=other, kill_grace_s=0.5, protect_server=False, restart="on-crash")
    assert loaded(orch).pid == pid
    plan = orch.plan(model_a, max_seq_length=512)
    assert (plan.action, [reason.field for reason in plan.reload_reasons]) == (
        "reload",
        ["llama_server"],
    )
    assert orch.load(model_a, max_seq_length=512).status == "loaded"
    assert not is_running(pid)


def test_a_server_that_still_loads_is_adopted(
    host: StartHost, make: Make, fake: Fake, model_a: str
) -> None:
    fake.behave(loading_s=1.5, work="print")
    backend = host('orch = make(on_host_exit="keep")\n' + LOAD)
    pid = fake.wait_for("bound").pid
    backend.die()
    found = make().load(model_a, max_seq_length=512)
    assert (found.status, found.pid, found.adopted) == ("already_loaded", pid, True)
    assert len(fake.entries("start")) == 1


def test_output_and_exit_of_an_adopted_server_are_heard(
    host: StartHost, adopt: Callable[..., Orchestrator], fake: Fake
) -> None:
    backend, pid = keeping(host)
    backend.die()
    orch = adopt(restart="on-crash")
    kill(pid)
    fake.wait_for("start", 2)
    until_state(orch, State.HEALTHY)
    last = orch.status().last_exit
    assert last is not None
    assert (last.pid, last.returncode) == (pid, -signal.SIGKILL)
    assert not loaded(orch).adopted
    fake.assert_no_overlap()


def test_what_a_kept_server_prints_reaches_the_next_owner(
    host: StartHost, adopt: Callable[..., Orchestrator], fake: Fake
) -> None:
    fake.behave(flood_for_ever=True)
    backend, _ = keeping(host)
    backend.die()
    lines = adopt().logs()
    assert any("prints all day" in line for line in lines)


def test_an_adopted_server_is_kept_again(
    host: StartHost, adopt: Callable[..., Orchestrator], fake: Fake
) -> None:
    backend, pid = keeping(host)
    for _ in range(3):
        backend.die()
        backend = host(
            'orch = make(on_host_exit="keep").start()\n'
            "send(pid=orch.status().loaded.pid)\nsleep_forever()"
        )
        assert backend.receive()["pid"] == pid
    backend.die()
    assert loaded(adopt()).pid == pid
    assert len(fake.entries("start")) == 1


# Until when it is kept


def test_a_server_is_not_kept_for_ever(host: StartHost, fake: Fake) -> None:
    """A deaf one neither, with everything it has started."""
    fake.behave(ignore_term=-1, children=["escaped!"])
    backend, pid = keeping(
        host,
        'orch = make(on_host_exit="keep", keep_s=0.3, kill_grace_s=600.0)\n'
        + LOAD
        + "sleep_forever()",
    )
    fake.wait_for("child")
    server = Watch(pid)
    assert server.seconds_to_exit(backend.die()) > 0.3
    until(lambda: not fake.running(), "the end of what it has started")
    until(lambda: not keepers_of(backend.pid), "the end of the keeper")


@pytest.mark.parametrize("how", ["orch = make()", 'orch = make(on_host_exit="stop", keep_s=60)'])
def test_without_keep_a_server_ends_with_its_host(host: StartHost, how: str) -> None:
    backend, pid = keeping(host, f"{how}\n{LOAD}sleep_forever()")
    server = Watch(pid)
    assert server.seconds_to_exit(backend.die()) < 5


def test_a_server_ends_with_the_keeper_that_keeps_it(
    host: StartHost, adopt: Callable[..., Orchestrator], fake: Fake, model_a: str
) -> None:
    backend, pid = keeping(host)
    keeper = keeper_of(backend)
    backend.die()
    kill(keeper)
    orch = adopt()
    assert orch.status().loaded is None
    assert orch.load(model_a).pid != pid
    fake.assert_no_overlap()


def test_a_server_that_ends_while_it_is_kept_is_not_adopted(
    host: StartHost, adopt: Callable[..., Orchestrator], model_a: str
) -> None:
    backend, pid = keeping(host)
    keeper = keeper_of(backend)
    backend.die()
    kill(pid)
    until(lambda: not is_running(keeper), "the end of the keeper")
    orch = adopt()
    status = orch.status()
    assert (status.state, status.last_error, status.last_exit) == (State.IDLE, None, None)


# What is not believed


def a_longer_file(host: Host, fake: Fake, model: str) -> None:
    with open(model, "ab") as file:
        file.write(b"more")


def a_replaced_file(host: Host, fake: Fake, model: str) -> None:
    shutil.copy(model, model + ".new")
    os.replace(model + ".new", model)


def a_removed_file(host: Host, fake: Fake, model: str) -> None:
    os.unlink(model)


def another_binary(host: Host, fake: Fake, model: str) -> None:
    fake.script("new", Path(fake.path).read_text())
    os.replace(fake.directory / "new", fake.path)


def of_record(**members: Any) -> Callable[[Host, Fake, str], None]:
    """Return what changes the server in the record."""

    def change(host: Host, fake: Fake, model: str) -> None:
        path = Slot("default", fake.directory.parent / "state").record_path
        record = json.loads(path.read_text())
        record["server"] |= members
        path.write_text(json.dumps(record))

    return change


def no_record(host: Host, fake: Fake, model: str) -> None:
    Slot("default", fake.directory.parent / "state").record_path.unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (a_longer_file, "has changed since the server started"),
        (a_replaced_file, "has changed since the server started"),
        (a_removed_file, "has changed since the server started"),
        (another_binary, "has changed since the server started"),
        (of_record(start_ticks=1), None),
        (of_record(boot_id="another"), None),
        (of_record(pid=1 << 21), None),
        (no_record, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_has_changed_is_ended(
    host: StartHost,
    make: Make,
    fake: Fake,
    model_a: str,
    state_dir: Path,
    change: Callable[[Host, Fake, str], None],
    why: str | None,
) -> None:
    assert state_dir == fake.directory.parent / "state"
    backend, pid = keeping(host)
    backend.die()
    change(backend, fake, model_a)
    orch = make().start()
    assert (orch.status().state, is_running(pid)) == (State.IDLE, False)
    error = orch.status().last_error
    assert (error is None) if why is None else (error and why in error.message)
    with pytest.raises(NotLoaded), orch.lease():
        pass


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b'{"version": 2}', b"\xff", b'{"version": 1, "generation": "x"}']
)
def test_a_memory_of_another_version_is_not_believed(text: bytes) -> None:
    assert handover.recalled(text) is None


def test_a_server_of_another_version_is_ended(
    host: StartHost, make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, pid = keeping(host)
    backend.die()
    monkeypatch.setattr(handover, "_VERSION", 2)
    orch = make().start()
    assert not is_running(pid)
    assert orch.load(model_a).status == "loaded"
    fake.assert_no_overlap()


def test_a_server_that_refuses_its_key_is_ended(
    host: StartHost, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recalled(text: bytes) -> handover.Remembered | None:
        found = genuine(text)
        assert found is not None
        return handover.Remembered(found.generation, found.target, "another key")

    genuine = handover.recalled
    backend, pid = keeping(host)
    backend.die()
    monkeypatch.setattr("orchestrator.runtime.effects.recalled", recalled)
    orch = make().start()
    assert (orch.status().state, is_running(pid)) == (State.IDLE, False)
    error = orch.status().last_error
    assert error is not None
    assert error.message == "the server refuses the key it was given"


def test_a_server_that_is_stopped_is_ended_and_a_load_gets_another(
    host: StartHost, make: Make, fake: Fake, model_a: str
) -> None:
    """Who has joined the adoption is not failed by it."""
    backend, pid = keeping(host)
    backend.die()
    os.kill(pid, signal.SIGSTOP)
    found = make(hang_timeout_s=1.5).load(model_a, max_seq_length=512)
    assert (found.status, found.adopted, found.generation) == ("loaded", False, 1)
    assert not is_running(pid)
    fake.assert_no_overlap()


@pytest.mark.parametrize(
    ("name", "value"),
    [("tree.process.pid_namespace", lambda: "pid:[1]"), ("VERSION", 1)],
    ids=["pids", "version"],
)
def test_a_keeper_in_another_container_or_of_another_version_has_its_server_ended(
    host: StartHost,
    make: Make,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: object,
) -> None:
    """Its numbers mean other processes: it is asked, and never signalled."""
    backend, pid = keeping(host)
    backend.die()
    monkeypatch.setattr(f"orchestrator.server.link.{name}", value)
    before = len(os.listdir("/proc/self/fd"))
    orch = make().start()
    orch.close()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the end of all descriptors")
    assert (orch.status().loaded, is_running(pid)) == (None, False)
    monkeypatch.undo()
    fake.assert_no_overlap()


def test_no_path_is_told_over_http_of_what_has_changed(
    host: StartHost, fake: Fake, state_dir: Path, model_a: str
) -> None:
    folder = os.path.dirname(model_a)
    program = KEEPING.replace("make(", "make(models_dir=os.path.dirname(a['model']), ")
    backend, _ = keeping(host, program.replace('load(a["model"]', 'load("a.gguf"'))
    backend.die()
    a_longer_file(backend, fake, model_a)
    app = create_app(
        llama_server=fake.path, server_env=fake.env, state_dir=state_dir, models_dir=folder
    )
    with serving(app) as client:
        error = client.get(PREFIX + "/status").json()["last_error"]
    assert error["detail"].endswith("a.gguf has changed since the server started")
    assert folder not in error["detail"]


# Who may have it


def test_a_second_next_owner_is_refused(
    host: StartHost, adopt: Callable[..., Orchestrator], make: Make
) -> None:
    backend, pid = keeping(host)
    backend.die()
    orch = adopt()
    with pytest.raises(SlotOwned, match="this process"):
        make().start()
    refused = host("try: orch.start()\nexcept Exception as e: send(error=type(e).__name__)")
    assert refused.receive() == {"error": "SlotOwned"}
    assert (loaded(orch).pid, is_running(pid)) == (pid, True)


def test_many_next_owners_are_one(host: StartHost, fake: Fake, make: Make) -> None:
    backend, pid = keeping(host)
    backend.die()
    owners = [make(on_host_exit="keep") for _ in range(6)]
    results: list[str] = []

    def start(orch: Orchestrator) -> None:
        try:
            orch.start()
            results.append(f"has {loaded(orch).pid}")
        except SlotOwned:
            results.append("refused")

    threads = [threading.Thread(target=partial(start, orch)) for orch in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"has {pid}", *["refused"] * 5]


def test_forked_workers_neither_keep_nor_end_a_server(
    host: StartHost, adopt: Callable[..., Orchestrator]
) -> None:
    backend = host(
        'orch = make(on_host_exit="keep")\noutcome = orch.load(a["model"])\n'
        "worker = os.fork()\nif worker == 0: sleep_forever()\n"
        "send(pid=outcome.pid, worker=worker)\nsleep_forever()"
    )
    received = backend.receive()
    backend.die()
    try:
        orch = adopt()
        assert loaded(orch).pid == received["pid"]
        with reaped(in_a_fork(orch.close)):
            assert loaded(orch).pid == received["pid"]
            assert is_running(received["pid"])
    finally:
        kill(received["worker"])


def test_a_stranger_gets_neither_server_nor_key(
    host: StartHost, adopt: Callable[..., Orchestrator], state_dir: Path
) -> None:
    """Of the same user, but without the slot."""
    backend, pid = keeping(host)
    backend.die()
    channel = Channel.to(str(Slot("default", state_dir).door_path))
    until(lambda: channel.receive() is None, "the refusal")
    channel.close()
    assert loaded(adopt()).pid == pid


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.deep)])
@pytest.mark.timeout(1800)
def test_a_host_may_die_at_any_moment(
    host: StartHost, fake: Fake, make: Make, model_a: str, count: int
) -> None:
    """There is never a second server, and the next owner goes on, whatever it finds."""
    fake.behave(children=["daemon"])
    program = (
        'orch = make(kill_grace_s=0.05, on_host_exit="keep").start()\nsend(made=True)\n'
        "for n in range(9): orch.load(a['model'], force_reload=n % 3 == 1)\n"
    )
    for number in range(count):
        backend = host(program)
        backend.receive()
        threading.Event().wait(0.2 * ((number * 0.618) % 1))  # a moment of its life
        backend.die()
    orch = make(on_host_exit="keep").start()
    until(lambda: orch.status().state in {State.IDLE, State.HEALTHY}, "rest")
    pid = orch.load(model_a).pid
    assert {row.pid for row in fake.entries("start")} >= {pid}
    fake.assert_no_overlap()
    orch.close(keep=False)
    until(lambda: not fake.running(), "the end of everything")


# The real server


@pytest.mark.external
@pytest.mark.real
@pytest.mark.parametrize("kind", ["external", "embedded"])
def test_a_real_server_is_adopted_and_answers(
    host: StartHost, llama_server: str, state_dir: Path, model_a: str, kind: str
) -> None:
    server = llama_server if kind == "external" else "embedded"
    backend, pid = keeping(host, KEEPING.replace("make(", f"make(llama_server={server!r}, "))
    backend.die()
    with Orchestrator(llama_server=server, state_dir=state_dir) as orch:
        again = orch.load(model_a, max_seq_length=512)
        assert (again.status, again.pid, again.context_length) == ("already_loaded", pid, 512)
        with orch.lease() as leased:
            assert leased.api_key is not None
            assert leased.pid == pid
    assert not is_running(pid)
    assert not servers_of(state_dir)
