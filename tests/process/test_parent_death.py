"""However a backend ends, its server is gone within a second, and nobody else's is.

The backend is a process of its own (`support.Host`) that is killed, leaves or crashes. A server
left behind by everything is found by the next start, which touches nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.server import process_table
from orchestrator.server.slot import Slot
from tests.kit.process.servers import servers_of
from tests.kit.process.support import Fake, Host, Make, Watch, is_running, kill, open_files, until

GONE_S = 1.0
LOAD = 'outcome = orch.load(a["model"])\nsay(pid=outcome.pid)\n'
StartHost = Callable[..., Host]


def guardian_of(host: Host) -> int:
    """The helper that outlives a killed host."""
    [pid] = [
        child.pid
        for child in psutil.Process(host.pid).children()
        if any("orchestrator.server.guardian" in word for word in child.cmdline())
    ]
    return pid


def until_guarded(host: Host) -> int:
    """Wait until the helper has come up: it then sleeps on the host's pidfd."""

    def sleeping() -> int:
        pid = guardian_of(host)
        return pid if any("pidfd" in name for name in open_files(pid)) else 0

    return until(sleeping, "the guardian")


# How a backend may end

ENDS = {
    "SIGKILL": "rest()",
    "SIGTERM": "rest()",
    "SIGHUP": "rest()",
    "SIGSEGV": "rest()",
    "SIGINT": "rest()",
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
    """By whatever signal, exit or exception, and also when the server ignores SIGTERM."""
    fake.behave(ignore_term=-1 if deaf else 0)
    grace = "orch = make(kill_grace_s=0.2)\n"
    backend = host(f"{grace}{LOAD}sys.stdin.readline()\n{ENDS[end]}")
    server = Watch(backend.hear()["pid"])
    guardian = until_guarded(backend)
    if end in ("SIGINT", "returns", "raises", "sys.exit"):
        kill(guardian)  # these end in order: the host itself sees to it
    backend.tell()
    signum = getattr(signal, end, 0)
    begun = backend.die(signum) if signum else time.monotonic()
    backend.process.wait(30)
    took = server.seconds_to_exit(begun, 5)
    assert fake.living() == set()
    assert took < GONE_S, took


def test_no_server_outlives_a_backend_killed_before_its_guardian_is_up(
    host: StartHost, fake: Fake
) -> None:
    """The first load of a new backend is when memory runs out."""
    backend = host(LOAD + "rest()")
    server = Watch(backend.hear()["pid"])
    assert server.seconds_to_exit(backend.die()) < 2 * GONE_S  # the helper has yet to start


FORKING = """
outcome = orch.load(a["model"])
workers = []
for _ in range(3):
    worker = os.fork()
    if worker == 0:
        rest()
    workers.append(worker)
say(pid=outcome.pid, workers=workers)
rest()
"""


def test_forked_workers_do_not_keep_the_server_alive(host: StartHost, fake: Fake) -> None:
    """They hold copies of every pipe and lock, and they are not the backend."""
    backend = host(FORKING)
    said = backend.hear()
    server = Watch(said["pid"])
    until_guarded(backend)
    try:
        assert server.seconds_to_exit(backend.die()) < GONE_S
        assert all(map(is_running, said["workers"]))
    finally:
        for worker in said["workers"]:
            kill(worker)


FORKED_DURING_A_LOAD = """
from orchestrator.server.warden import Warden
spawn = Warden.spawn
def forking(*args):
    worker = os.fork()  # the lock of the slot is open at this moment
    if worker == 0:
        rest()
    say(worker=worker)
    spawn(*args)
Warden.spawn = forking
outcome = orch.load(a["model"])
say(pid=outcome.pid)
rest()
"""


def test_a_worker_forked_during_a_load_holds_no_lock(
    host: StartHost, make: Make, fake: Fake, model_a: str
) -> None:
    """Otherwise the slot would be occupied for as long as that worker lives."""
    backend = host(FORKED_DURING_A_LOAD)
    worker = backend.hear()["worker"]
    server = Watch(backend.hear()["pid"])
    until_guarded(backend)
    try:
        assert server.seconds_to_exit(backend.die()) < GONE_S
        assert is_running(worker)
        assert make().load(model_a).status == "loaded"
        assert is_running(worker)
    finally:
        kill(worker)


SHORT_LIVED_THREAD = """
said = []
caller = threading.Thread(target=lambda: said.append(orch.load(a["model"])))
caller.start()
caller.join()
say(pid=said[0].pid)
sys.stdin.readline()
say(again=orch.load(a["model"]).pid)
rest()
"""


def test_a_server_outlives_the_thread_that_loaded_it(host: StartHost) -> None:
    """A parent-death signal is bound to a thread: a server died with the thread that asked."""
    backend = host(SHORT_LIVED_THREAD)
    pid = backend.hear()["pid"]
    server = Watch(pid)
    until_guarded(backend)
    backend.tell()
    assert backend.hear()["again"] == pid
    assert server.seconds_to_exit(backend.die()) < GONE_S


EVENT_LOOP = """
import asyncio
from orchestrator import AsyncOrchestrator
made = AsyncOrchestrator(llama_server=a["server"], state_dir=a["state_dir"], server_env=a["env"])
pid = asyncio.run(made.load(a["model"])).pid  # the loop and its threads are gone after this
again = asyncio.run(made.load(a["model"])).pid
say(pid=pid, again=again)
rest()
"""


def test_a_server_outlives_the_event_loop_that_loaded_it(host: StartHost) -> None:
    """A child of `asyncio.to_thread` died when the executor was shut down."""
    backend = host(EVENT_LOOP)
    said = backend.hear()
    assert said["pid"] == said["again"]
    server = Watch(said["pid"])
    until_guarded(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S


@pytest.mark.parametrize("kind", ["group", "setsid!", "daemon!", "closed!"])
def test_no_descendant_outlives_the_backend(host: StartHost, fake: Fake, kind: str) -> None:
    """Also one that has left the group and ignores SIGTERM."""
    fake.behave(children=[kind])
    backend = host(LOAD + "rest()")
    backend.hear()
    child = Watch(fake.wait_for("child").pid)
    until_guarded(backend)
    assert child.seconds_to_exit(backend.die()) < GONE_S
    until(lambda: not fake.living(), "the rest", 5)


def test_no_server_behind_a_wrapper_outlives_the_backend(host: StartHost, fake: Fake) -> None:
    """The wrapper is what was started; the server is what holds the memory."""
    backend = host(LOAD + "rest()", server=fake.wrapper())
    wrapper = backend.hear()["pid"]
    server = Watch(fake.wait_for("start").pid)
    until_guarded(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S
    until(lambda: not is_running(wrapper), "the wrapper", 5)


def test_no_server_outlives_a_backend_killed_during_the_start(host: StartHost, fake: Fake) -> None:
    """Written down and locked before it exists, so it is found at any moment."""
    fake.behave(hang=True, ignore_term=-1)
    backend = host('orch.submit(a["model"])\nsay(submitted=True)\nrest()')
    backend.hear()
    server = Watch(fake.wait_for("start").pid)
    until_guarded(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S


def test_no_stopped_server_outlives_its_backend(host: StartHost, fake: Fake) -> None:
    """A stopped process keeps SIGTERM pending."""
    backend = host(LOAD + "rest()")
    pid = backend.hear()["pid"]
    os.kill(pid, signal.SIGSTOP)
    server = Watch(pid)
    until_guarded(backend)
    assert server.seconds_to_exit(backend.die()) < GONE_S


def test_a_stopped_backend_keeps_its_server(host: StartHost, fake: Fake) -> None:
    """A debugger is not death."""
    backend = host(LOAD + 'sys.stdin.readline()\nsay(again=orch.load(a["model"]).pid)\nrest()')
    pid = backend.hear()["pid"]
    until_guarded(backend)
    backend.process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(backend.pid).status() == psutil.STATUS_STOPPED, "the stop")
    assert is_running(pid)
    backend.process.send_signal(signal.SIGCONT)
    backend.tell()
    assert backend.hear()["again"] == pid


IN_A_CONTAINER = """
outcome = orch.load(a["model"])
guardian = orch._owner.effects._guardian.pid
settled, ends = "", time.monotonic() + 20
while not settled and time.monotonic() < ends:
    time.sleep(0.005)
    try:
        folder = f"/proc/{guardian}/fd"
        names = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
        settled = "watching" if any("pidfd" in name for name in names) else ""
    except FileNotFoundError:  # a descriptor that was closed, or a guardian that has ended
        settled = "" if os.path.exists(f"/proc/{guardian}/exe") else "gone"
again = orch.load(a["model"])
say(me=os.getpid(), settled=settled, pid=outcome.pid, again=again.pid, how=again.status)
orch.close()
say(left=str(orch.status().state))
"""


def test_a_backend_that_is_pid_1_keeps_its_server(
    state_dir: Path, tmp_path: Path, model_a: str
) -> None:
    """So it is in most containers, and pid 1 must not be mistaken for dead."""
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        inside += ["--user", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no pid namespaces here")
    fake = Fake(tmp_path / "inside")  # its journal holds numbers of another namespace
    backend = Host(
        IN_A_CONTAINER,
        server=fake.path,
        state_dir=state_dir,
        env=fake.env,
        model=model_a,
        inside=tuple(inside),
    )
    try:
        said = backend.hear()
        assert said == {
            "me": 1,
            "settled": "watching",
            "pid": said["pid"],
            "again": said["pid"],
            "how": "already_loaded",
        }
        assert backend.hear() == {"left": "Idle"}
    finally:
        backend.close()


# The guardian


def test_a_guardian_that_was_killed_is_replaced_at_the_next_start(host: StartHost) -> None:
    """One lost helper must not leave the backend unguarded for months."""
    backend = host(
        LOAD + 'sys.stdin.readline()\nsay(pid=orch.load(a["model"], force_reload=True).pid)\nrest()'
    )
    backend.hear()
    first = until_guarded(backend)
    kill(first)
    until(lambda: not is_running(first), "its end")
    backend.tell()
    server = Watch(backend.hear()["pid"])
    assert until_guarded(backend) != first
    assert server.seconds_to_exit(backend.die()) < GONE_S


def test_close_does_not_wait_for_a_stopped_guardian(host: StartHost) -> None:
    """A process that is stopped does not hear SIGTERM."""
    backend = host(LOAD + "sys.stdin.readline()\norch.close()\nsay(closed=True)\nrest()")
    backend.hear()
    os.kill(until_guarded(backend), signal.SIGSTOP)
    backend.tell()
    assert backend.hear() == {"closed": True}


PROGRAM = """
import pathlib
sys.path.append(pathlib.Path("/no/such/folder"))  # the import system passes over it
sys.executable = a["env"]["APPLICATION"]
sys.frozen = a["env"].get("FROZEN") == "1"
logged = []
structlog.configure(
    processors=[lambda _, __, event: logged.append(event["event"]) or str(event)],
    wrapper_class=structlog.make_filtering_bound_logger(40),
    logger_factory=structlog.PrintLoggerFactory(sys.stderr),
)
outcome = orch.load(a["model"])
say(pid=outcome.pid, logged=logged)
rest()
"""


@pytest.mark.parametrize("is_frozen", [False, True], ids=["embedded", "frozen"])
def test_the_guardian_is_never_started_with_another_program_than_python(
    host: StartHost, fake: Fake, tmp_path: Path, is_frozen: bool
) -> None:
    """`sys.executable` of a bundled application is the application: a second one would claim the
    slot, and start a third. Without a guardian the load goes on, and the log says so.
    """
    application = tmp_path / "application"
    application.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    application.chmod(0o755)
    fake.env |= {"APPLICATION": str(application), "FROZEN": str(int(is_frozen))}
    backend = host(PROGRAM)
    said = backend.hear()
    assert ("guardian.unavailable" in said["logged"]) is is_frozen
    server = Watch(said["pid"])
    if is_frozen:
        kill(said["pid"])
        server.seconds_to_exit(time.monotonic())
    else:
        until_guarded(backend)
        assert server.seconds_to_exit(backend.die()) < GONE_S
    assert not (tmp_path / "started").exists()


def test_a_closed_backend_leaves_no_guardian(host: StartHost) -> None:
    """It is not needed any more, and a later kill of the host must not start anything."""
    backend = host(LOAD + "orch.close()\nsay(closed=True)\nrest()")
    backend.hear()
    backend.hear()
    assert psutil.Process(backend.pid).children() == []


def test_a_guardian_holds_nothing_of_the_backend(host: StartHost) -> None:
    """No port, no pipe and no terminal of the host stays open because of it."""
    backend = host(
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\ns.set_inheritable(True)\n"
        + LOAD
        + "rest()"
    )
    backend.hear()
    pid = until_guarded(backend)
    only = ["/dev/null"] * 3 + ["anon_inode:[pidfd]"]
    until(lambda: sorted(open_files(pid)) == only, f"{open_files(pid)} to be {only}")
    assert os.getsid(pid) == pid


def test_the_guardian_of_an_old_backend_leaves_a_new_one_alone(
    host: StartHost, fake: Fake, make: Make, model_a: str
) -> None:
    """It starts at once, as a supervisor would start it, while the old server is still dying."""
    fake.behave(ignore_term=-1)
    backend = host(LOAD + "rest()")
    old = backend.hear()["pid"]
    guardian = until_guarded(backend)
    backend.die()
    fake.behave()
    new = make().load(model_a).pid  # neither refused nor ended
    assert not is_running(old)
    fake.assert_never_two()
    until(lambda: not is_running(guardian), "the old guardian to end")
    assert is_running(new)


# The next start, when the guardian was killed too


def abandoned(host: StartHost, program: str = LOAD + "rest()") -> int:
    """A server that has lost its backend and its guardian."""
    backend = host(program)
    pid = int(backend.hear()["pid"])
    kill(until_guarded(backend))
    backend.die()
    assert is_running(pid)
    return pid


@pytest.mark.parametrize("deaf", [False, True], ids=["obedient", "deaf"])
def test_the_next_start_ends_what_backend_and_guardian_left(
    host: StartHost, make: Make, fake: Fake, model_a: str, deaf: bool
) -> None:
    """Before it starts anything."""
    fake.behave(ignore_term=-1 if deaf else 0, children=["daemon!"])
    pid = abandoned(host)
    child = fake.wait_for("child").pid
    fake.behave()
    orch = make().start()
    assert not is_running(pid)
    assert not is_running(child)
    assert orch.load(model_a).pid != pid
    fake.assert_never_two()


@pytest.mark.parametrize("record", ["", "{", "[]", "missing", "foreign"])
def test_a_lost_record_does_not_hide_the_server(
    host: StartHost, make: Make, fake: Fake, state_dir: Path, record: str
) -> None:
    """Its lock and its token are proof enough."""
    pid = abandoned(host)
    path = state_dir / "default/server.json"
    assert json.loads(path.read_text())["server"]["pid"] == pid
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
    """Another backend's live server, in the same state directory, started by the same binary."""
    other_fake = Fake(tmp_path / "other")
    other = make(slot="default2", llama_server=other_fake.path, server_env=other_fake.env)
    theirs = other.load(model_a).pid
    ours = abandoned(host)
    make().start()
    assert not is_running(ours)
    assert is_running(theirs)
    assert other.load(model_a).pid == theirs
    other.unload()


def test_the_next_start_leaves_a_lookalike_process_alone(
    host: StartHost, make: Make, fake: Fake, tmp_path: Path
) -> None:
    """The user's own llama-server has the same name and the same arguments."""
    ours = abandoned(host)
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
    """A reused pid, another boot, the init process, a process group: none is touched."""
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
