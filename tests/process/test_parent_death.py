"""A server exits within a second of its backend, however that ends, and no other process does.

The backend is a process of its own (`support.Host`). A server that outlives both its backend and
the keeper is ended by the next start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.server import process_table
from orchestrator.server.slot import Slot
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    Fake,
    Make,
    StartHost,
    Watch,
    abandon,
    is_running,
    keeper_of,
    keepers_of,
    kill,
    open_files,
    until,
)

GONE_S = 1.0
LOAD = 'outcome = orch.load(a["model"])\nsend(pid=outcome.pid)\n'


# Ends of a backend

ENDS = {
    "SIGKILL": "sleep_forever()",
    "SIGTERM": "sleep_forever()",
    "SIGHUP": "sleep_forever()",
    "SIGSEGV": "sleep_forever()",
    "SIGINT": "sleep_forever()",
    "returns": "",
    "raises": "raise RuntimeError('unhandled')",
    "sys.exit": "sys.exit(3)",
    "os._exit": "os._exit(3)",
    "abort": "os.abort()",
}


@pytest.mark.parametrize("deaf", [False, True], ids=["obedient", "deaf"])
@pytest.mark.parametrize("end", ENDS)
def test_no_server_outlives_its_backend(
    host: StartHost, fake: Fake, state_dir: Path, end: str, deaf: bool
) -> None:

    fake.behave(ignore_term=-1 if deaf else 0)
    grace = "orch = make(kill_grace_s=0.2)\n"
    backend = host(f"{grace}{LOAD}sys.stdin.readline()\n{ENDS[end]}")
    server = Watch(backend.receive()["pid"])
    backend.send()
    signum = getattr(signal, end, 0)
    begun = backend.die(signum) if signum else time.monotonic()
    backend.process.wait(30)
    took = server.seconds_to_exit(begun, 5)
    assert fake.running() == set()
    assert took < GONE_S, took


def test_no_server_outlives_a_backend_killed_before_its_keeper_is_up(
    host: StartHost, fake: Fake
) -> None:
    """Memory tends to run out at the first load of a new backend."""
    backend = host(LOAD + "sleep_forever()")
    server = Watch(backend.receive()["pid"])
    assert server.seconds_to_exit(backend.die()) < 2 * GONE_S  # the keeper has yet to start


FORKING = """
outcome = orch.load(a["model"])
workers = []
for _ in range(3):
    worker = os.fork()
    if worker == 0:
        sleep_forever()
    workers.append(worker)
send(pid=outcome.pid, workers=workers)
sleep_forever()
"""


def test_forked_workers_do_not_keep_the_server_alive(host: StartHost, fake: Fake) -> None:
    """They hold copies of every pipe and lock."""
    backend = host(FORKING)
    received = backend.receive()
    server = Watch(received["pid"])
    keeper_of(backend)
    try:
        assert server.seconds_to_exit(backend.die()) < GONE_S
        assert all(map(is_running, received["workers"]))
    finally:
        for worker in received["workers"]:
            kill(worker)


FORKED_DURING_A_LOAD = """
from orchestrator.server.warden import Warden
spawn = Warden.spawn
def forking(*args):
    worker = os.fork()  # the lock of the slot is open at this moment
    if worker == 0:
        sleep_forever()
    send(worker=worker)
    spawn(*args)
Warden.spawn = forking
outcome = orch.load(a["model"])
send(pid=outcome.pid)
sleep_forever()
"""


def test_a_worker_forked_during_a_load_holds_no_lock(
    host: StartHost, make: Make, fake: Fake, model_a: str
) -> None:
    """It would keep the slot occupied for as long as it lives."""
    backend = host(FORKED_DURING_A_LOAD)
    worker = backend.receive()["worker"]
    server = Watch(backend.receive()["pid"])
    keeper_of(backend)
    try:
        assert server.seconds_to_exit(backend.die()) < GONE_S
        assert is_running(worker)
        assert make().load(model_a).status == "loaded"
        assert is_running(worker)
    finally:
        kill(worker)


SHORT_LIVED_THREAD = """
report = []
caller = threading.Thread(target=lambda: report.append(orch.load(a["model"])))
caller.start()
caller.join()
send(pid=report[0].pid)
sys.stdin.readline()
send(again=orch.load(a["model"]).pid)
sleep_forever()
"""


def test_a_server_outlives_the_thread_that_loaded_it(host: StartHost) -> None:
    """A parent-death signal would end it with that thread."""
    backend = host(SHORT_LIVED_THREAD)
    pid = backend.receive()["pid"]
    server = Watch(pid)
    keeper_of(backend)
    backend.send()
    assert backend.receive()["again"] == pid
    assert server.seconds_to_exit(backend.die()) < GONE_S


EVENT_LOOP = """
import asyncio
from orchestrator import AsyncOrchestrator
made = AsyncOrchestrator(llama_server=a["server"], state_dir=a["state_dir"], server_env=a["env"])
pid = asyncio.run(made.load(a["model"])).pid  # the loop and its threads are gone after this
again = asyncio.run(made.load(a["model"])).pid
send(pid=pid, again=again)
sleep_forever()
"""


def test_a_server_outlives_the_event_loop_that_loaded_it(host: StartHost) -> None:
    """A parent-death signal would end it when the loop's executor is shut down."""
    backend = host(EVENT_LOOP)
    received = backend.receive()
    assert received["pid"] == received["again"]
    server = Watch(received["pid"])
    keeper_of(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S


@pytest.mark.parametrize("kind", ["group", "setsid!", "daemon!", "closed!", "escaped!"])
def test_no_descendant_outlives_the_backend(host: StartHost, fake: Fake, kind: str) -> None:
    """Nor one that has left the process group and ignores SIGTERM."""
    fake.behave(children=[kind])
    backend = host(LOAD + "sleep_forever()")
    backend.receive()
    child = Watch(fake.wait_for("child").pid)
    keeper_of(backend)
    assert child.seconds_to_exit(backend.die()) < GONE_S
    until(lambda: not fake.running(), "the rest", 5)


def test_no_server_behind_a_wrapper_outlives_the_backend(host: StartHost, fake: Fake) -> None:
    """The wrapper is the child, but the server holds the memory."""
    backend = host(LOAD + "sleep_forever()", server=fake.wrapper())
    wrapper = backend.receive()["pid"]
    server = Watch(fake.wait_for("start").pid)
    keeper_of(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S
    until(lambda: not is_running(wrapper), "the wrapper", 5)


def test_no_server_outlives_a_backend_killed_during_the_start(host: StartHost, fake: Fake) -> None:
    """The record and the lock exist before the server, so it is found at any moment."""
    fake.behave(hang=True, ignore_term=-1)
    backend = host('orch.submit(a["model"])\nsend(submitted=True)\nsleep_forever()')
    backend.receive()
    server = Watch(fake.wait_for("start").pid)
    keeper_of(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S


def test_no_stopped_server_outlives_its_backend(host: StartHost, fake: Fake) -> None:
    """A stopped process keeps SIGTERM pending."""
    backend = host(LOAD + "sleep_forever()")
    pid = backend.receive()["pid"]
    os.kill(pid, signal.SIGSTOP)
    server = Watch(pid)
    keeper_of(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S


def test_a_stopped_backend_keeps_its_server(host: StartHost, fake: Fake) -> None:
    """A debugger stops processes, too."""
    backend = host(
        LOAD + 'sys.stdin.readline()\nsend(again=orch.load(a["model"]).pid)\nsleep_forever()'
    )
    pid = backend.receive()["pid"]
    keeper_of(backend)
    backend.process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(backend.pid).status() == psutil.STATUS_STOPPED, "the stop")
    assert is_running(pid)
    backend.process.send_signal(signal.SIGCONT)
    backend.send()
    assert backend.receive()["again"] == pid


IN_A_CONTAINER = """
outcome = orch.load(a["model"])
keeper = orch._owner.effects._warden.keepers.present.pid
settled, ends = "", time.monotonic() + 20
while not settled and time.monotonic() < ends:
    time.sleep(0.005)
    try:
        folder = f"/proc/{keeper}/fd"
        names = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
        settled = "watching" if any("pidfd" in name for name in names) else ""
    except FileNotFoundError:  # a descriptor that was closed, or a keeper that has ended
        settled = "" if os.path.exists(f"/proc/{keeper}/exe") else "gone"
again = orch.load(a["model"])
send(me=os.getpid(), settled=settled, pid=outcome.pid, again=again.pid, how=again.status)
orch.close()
send(left=str(orch.status().state))
"""


def test_a_backend_that_is_pid_1_keeps_its_server(host: StartHost, tmp_path: Path) -> None:
    """It is in most containers, and the keeper must be able to watch it."""
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        inside += ["--user", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no pid namespaces here")
    fake = Fake(tmp_path / "inside")  # the pids in its journal are of another namespace
    backend = host(IN_A_CONTAINER, inside=tuple(inside), server=fake.path, of=fake)
    received = backend.receive()
    assert received == {
        "me": 1,
        "settled": "watching",
        "pid": received["pid"],
        "again": received["pid"],
        "how": "already_loaded",
    }
    assert backend.receive() == {"left": "Idle"}


# The keeper


def test_a_keeper_that_was_killed_is_replaced_at_the_next_start(host: StartHost) -> None:
    """Otherwise the backend might run without one for months."""
    again = 'sys.stdin.readline()\nsend(pid=orch.load(a["model"], force_reload=True).pid)\n'
    backend = host(LOAD + again + "sleep_forever()")
    backend.receive()
    first = keeper_of(backend)
    kill(first)
    until(lambda: not is_running(first), "its end")
    backend.send()
    server = Watch(backend.receive()["pid"])
    assert keeper_of(backend) != first
    assert server.seconds_to_exit(backend.die()) < GONE_S


def test_close_does_not_wait_for_a_stopped_keeper(host: StartHost) -> None:
    """A stopped process does not handle SIGTERM."""
    backend = host(LOAD + "sys.stdin.readline()\norch.close()\nsend(closed=True)\nsleep_forever()")
    backend.receive()
    os.kill(keeper_of(backend), signal.SIGSTOP)
    backend.send()
    assert backend.receive() == {"closed": True}


PROGRAM = """
import pathlib
sys.path.append(pathlib.Path("/no/such/folder"))  # the import system passes over it
sys.executable = a["env"]["APPLICATION"]
sys.frozen = a["env"].get("FROZEN") == "1"
import logging
from orchestrator.base import log
logged = []
class Handler(logging.Handler):
    def emit(self, record): logged.append(record.event)
logging.getLogger("orchestrator").addHandler(Handler(level=40))
outcome = orch.load(a["model"])
log.flush()
send(pid=outcome.pid, logged=logged)
sleep_forever()
"""


@pytest.mark.parametrize("is_frozen", [False, True], ids=["embedded", "frozen"])
def test_the_keeper_is_never_started_with_another_program_than_python(
    host: StartHost, fake: Fake, tmp_path: Path, is_frozen: bool
) -> None:
    """`sys.executable` of a bundled application is the application: a second one would claim the
    slot, and start a third. If there is no Python, the load goes on and a log event reports it.
    """
    application = tmp_path / "application"
    application.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    application.chmod(0o755)
    fake.env |= {"APPLICATION": str(application), "FROZEN": str(int(is_frozen))}
    backend = host(PROGRAM)
    received = backend.receive()
    assert ("keeper.replaced" in received["logged"]) is is_frozen
    server = Watch(received["pid"])
    if is_frozen:
        kill(received["pid"])
        server.seconds_to_exit(time.monotonic())
    else:
        keeper_of(backend)
        assert server.seconds_to_exit(backend.die()) < GONE_S
    assert not (tmp_path / "started").exists()


def test_a_closed_backend_leaves_no_keeper(host: StartHost) -> None:
    backend = host(LOAD + "orch.close()\nsend(closed=True)\nsleep_forever()")
    backend.receive()
    backend.receive()
    assert keepers_of(backend.pid) == []
    assert psutil.Process(backend.pid).children() == []


def test_a_keeper_holds_nothing_of_the_backend(host: StartHost, state_dir: Path) -> None:
    """It must keep no port, pipe or terminal of the host open."""
    backend = host(
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\ns.set_inheritable(True)\n"
        + LOAD
        + "sleep_forever()"
    )
    backend.receive()
    pid = keeper_of(backend)
    kinds = sorted(name.partition(":[")[0] for name in open_files(pid))
    lock = str(state_dir / "default/owner.lock")
    output, woken = ["pipe"], ["pipe"] * 2
    assert kinds == ["/dev/null"] * 3 + [lock, "anon_inode"] + output + woken + ["socket"] * 2
    assert os.getsid(pid) != os.getsid(backend.pid)
    assert psutil.Process(pid).ppid() != backend.pid  # some hosts end all of their children


def test_the_keeper_of_an_old_backend_leaves_a_new_one_alone(
    host: StartHost, fake: Fake, make: Make, model_a: str
) -> None:
    """A supervisor may start the new one while the old server is still being ended."""
    fake.behave(ignore_term=-1)
    backend = host(LOAD + "sleep_forever()")
    old = backend.receive()["pid"]
    keeper = keeper_of(backend)
    backend.die()
    fake.behave()
    new = make().load(model_a).pid  # neither refused nor ended
    assert not is_running(old)
    fake.assert_no_overlap()
    until(lambda: not is_running(keeper) or psutil.Process(new).ppid() == keeper, "its hand-over")
    assert is_running(new)


# The next start after backend and keeper were killed


def abandoned(host: StartHost, fake: Fake) -> int:
    """Return the pid of a server whose backend and keeper were killed.

    It is behind a wrapper: the kernel ends the keeper's own child only.
    """
    backend = host(LOAD + "sleep_forever()", server=fake.wrapper())
    backend.receive()
    pid = fake.wait_for("start").pid
    abandon(backend)
    assert is_running(pid)
    return pid


@pytest.mark.parametrize("deaf", [False, True], ids=["obedient", "deaf"])
def test_the_next_start_ends_what_backend_and_keeper_left(
    host: StartHost, make: Make, fake: Fake, model_a: str, deaf: bool
) -> None:
    fake.behave(ignore_term=-1 if deaf else 0, children=["daemon!"])
    pid = abandoned(host, fake)
    child = fake.wait_for("child").pid
    fake.behave()
    orch = make().start()
    assert not is_running(pid)
    assert not is_running(child)
    assert orch.load(model_a).pid != pid
    fake.assert_no_overlap()


@pytest.mark.parametrize("record", ["", "{", "[]", "missing", "foreign"])
def test_a_lost_record_does_not_hide_the_server(
    host: StartHost, make: Make, fake: Fake, state_dir: Path, record: str
) -> None:
    """Its lock and its token identify it."""
    pid = abandoned(host, fake)
    path = state_dir / "default/server.json"
    assert json.loads(path.read_text())["server"] is not None
    if record == "missing":
        path.unlink()
    elif record == "foreign":
        someone = asdict(process_table.ProcessId(os.getpid(), 1, "elsewhere"))
        path.write_text(json.dumps({"version": 99, "host": someone, "server": someone}))
    else:
        path.write_text(record)
    make().start()
    assert not is_running(pid)


def test_the_next_start_leaves_other_slots_alone(
    host: StartHost, make: Make, fake: Fake, tmp_path: Path, model_a: str
) -> None:
    """Here another backend's server has the same state directory."""
    other_fake = Fake(tmp_path / "other")
    other = make(slot="default2", llama_server=other_fake.path, server_env=other_fake.env)
    theirs = other.load(model_a).pid
    ours = abandoned(host, fake)
    make().start()
    assert not is_running(ours)
    assert is_running(theirs)
    assert other.load(model_a).pid == theirs
    other.unload()


def test_the_next_start_leaves_a_lookalike_process_alone(
    host: StartHost, make: Make, fake: Fake, tmp_path: Path
) -> None:
    """Such as the user's own llama-server, with the same name and arguments."""
    ours = abandoned(host, fake)
    arguments = psutil.Process(ours).cmdline()
    twin_home = Fake(tmp_path / "twin")
    with subprocess.Popen(
        arguments,
        env={**os.environ, **twin_home.env},
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as twin:
        twin_home.wait_for("bound")
        assert psutil.Process(twin.pid).cmdline() == arguments
        make().start()
        assert not is_running(ours)
        assert twin.poll() is None
        twin.kill()


@pytest.mark.parametrize(
    "change",
    [{"start_ticks": 7}, {"boot_id": "before the reboot"}, {"pid": 1}, {"pid": 0}, {"pid": -1}],
    ids=str,
)
def test_the_next_start_ignores_a_record_of_another_process(
    make: Make, state_dir: Path, change: dict[str, Any]
) -> None:
    """Such as a reused pid, another boot, the init process or a process group."""
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as bystander:
        assert bystander.stdout is not None
        bystander.stdout.readline()
        who = process_table.identify(bystander.pid)
        assert who is not None
        slot = Slot("default", state_dir)
        slot.remember(who)
        record = json.loads(slot.record_path.read_text())
        record["server"] |= change
        slot.record_path.write_text(json.dumps(record))
        make().start()
        assert bystander.poll() is None
        assert servers_of(state_dir) == set()
        assert is_running(1)
        bystander.kill()
    assert replace(who, start_ticks=7) != who
