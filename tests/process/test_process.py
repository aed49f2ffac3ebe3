"""Children of an orchestrator: how they are started, drained, signalled and reaped.

The server is the fake one, which misbehaves on demand. Tests check the process table after each
call has returned.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestrator import Orchestrator, State
from orchestrator.errors import (
    Cancelled,
    OrchestratorError,
    ServerStartFailed,
    SlotOccupied,
    SlotOwned,
    StateDirError,
)
from orchestrator.models.source import ModelSource
from orchestrator.server import ladder, process_table
from orchestrator.server.link import KeeperLink
from orchestrator.server.pin import Pin
from orchestrator.server.warden import Warden
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    Background,
    Fake,
    Make,
    StartHost,
    Watch,
    is_running,
    kill,
    transitions,
    until,
    until_queued,
    until_state,
)
from tests.kit.sentences import assert_sentence

PROMPT_S = 5.0  # "at once", on a machine that may be very busy
KINDS = ("group", "setsid", "daemon", "closed", "scrubbed", "escaped")


# Start


def test_a_server_inherits_only_listed_variables(
    make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch, state_dir: Path
) -> None:
    """Secrets must not reach the server, and no variable may override its arguments."""
    forbidden = {
        "HF_TOKEN": "hf_secret",
        "HUGGING_FACE_HUB_TOKEN": "hf_secret",
        "LLAMA_API_KEY": "secret",
        "LLAMA_ARG_PORT": "1",
        "LLAMA_ARG_MODEL": "/x",
        "LLAMA_SERVER_ROUTER_PORT": "1",
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "GGML_BACKEND_PATH": "/tmp/evil.so",
        "PYTHONPATH": "/tmp",
        "LD_PRELOAD": "",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    allowed = {"CUDA_VISIBLE_DEVICES": "0", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    for name, value in (forbidden | allowed).items():
        monkeypatch.setenv(name, value)
    make(server_env={**fake.env, "NAMED": "by the caller"}).load(model_a)
    env = fake.wait_for("start")["env"]
    assert forbidden.keys() & env.keys() == {"LLAMA_API_KEY"}  # our own
    assert not any("secret" in value for value in env.values())
    assert {name: env[name] for name in allowed} == allowed
    assert env["PATH"] == os.environ["PATH"]
    assert env["NAMED"] == "by the caller"
    assert env["LLAMA_ORCHESTRATOR_SLOT_TOKEN"].startswith(str(state_dir / "default"))


def test_a_server_inherits_only_its_pipe_and_the_lock(
    orch: Orchestrator, fake: Fake, model_a: str, state_dir: Path
) -> None:
    """A leaked socket of the host would keep its port in use, a leaked terminal could be read."""
    read, write = os.pipe()
    os.set_inheritable(read, True)
    os.set_inheritable(write, True)
    stdin = os.dup(0)
    os.dup2(read, 0)
    try:
        orch.load(model_a)
    finally:
        os.dup2(stdin, 0)
        for fd in (stdin, read, write):
            os.close(fd)
    fds = fake.wait_for("start")["fds"]
    lock = next(fd for fd, name in fds.items() if name == str(state_dir / "default/server.lock"))
    assert sorted(fds) == [0, 1, 2, lock], fds
    assert fds[0] == "/dev/null"
    assert fds[1] == fds[2]
    assert fds[1].startswith("pipe:")


NO_STREAMS = """
orch.start()
out = os.dup(1)
os.set_inheritable(out, False)
os.closerange(0, 3)
pid = orch.load(a["model"]).pid
os.write(out, json.dumps({"pid": pid}).encode() + b"\\n")
sleep_forever()
"""


def test_a_host_without_standard_streams_passes_the_lock_on(
    host: StartHost, fake: Fake, state_dir: Path
) -> None:
    """The first files a daemon opens have the descriptors 0 to 2, replaced in the child."""
    pid = host(NO_STREAMS).receive()["pid"]
    fds = fake.wait_for("start")["fds"]
    assert str(state_dir / "default/server.lock") in fds.values()
    assert fds[0] == "/dev/null"
    assert fds[1] == fds[2]
    with open(state_dir / "default/server.lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    kill(pid)


def test_a_server_has_a_session_of_its_own(orch: Orchestrator, model_a: str) -> None:
    """Ctrl-C at the host's terminal must only reach the host, which then stops the server."""
    pid = orch.load(model_a).pid
    assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


def test_a_chat_template_is_passed_in_a_private_file_removed_with_the_server(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """It may hold parts of prompts, so it must not be in argv."""
    orch.load(model_a, chat_template_override="{{ secret }}")
    argv = fake.wait_for("start")["argv"]
    path = Path(argv[argv.index("--chat-template-file") + 1])
    assert path.read_text() == "{{ secret }}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any("secret" in argument for argument in argv)
    orch.unload()
    assert not path.exists()


def test_nothing_is_started_when_the_record_cannot_be_written(
    orch: Orchestrator, fake: Fake, model_a: str, state_dir: Path
) -> None:
    """A server without a record might not be found after a crash."""
    orch.start()
    record = state_dir / "default/server.json"
    record.mkdir()
    with pytest.raises(StateDirError) as refused:
        orch.load(model_a)
    assert refused.value.field == "state_dir"
    assert fake.entries() == []
    record.rmdir()
    orch.load(model_a)


# The kill ladder


def test_an_obedient_server_gets_one_signal_and_is_reaped(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """Not even a zombie remains."""
    pid = orch.load(model_a).pid
    orch.unload()
    assert [entry["event"] for entry in fake.entries()][-2:] == ["term", "exit"]
    assert process_table.row(pid) is None
    assert last_exit(orch) == (pid, 0)
    assert orch.status().last_error is None


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(
    make: Make, fake: Fake, model_a: str
) -> None:
    fake.behave(ignore_term=-1)
    orch = make(kill_grace_s=0.4)
    pid = orch.load(model_a).pid
    watch, begun = Watch(pid), time.monotonic()
    orch.unload()
    assert 0.4 <= watch.seconds_to_exit(begun) < 0.4 + PROMPT_S
    assert last_exit(orch) == (pid, -signal.SIGKILL)
    assert len(fake.entries("term")) == 2


def test_a_second_sigterm_is_sent_soon(make: Make, fake: Fake, model_a: str) -> None:
    """llama-server ignores the first while a stream is active, and exits at the second."""
    fake.behave(ignore_term=1)
    orch = make(kill_grace_s=60)
    pid = orch.load(model_a).pid
    watch, begun = Watch(pid), time.monotonic()
    orch.unload()
    assert watch.seconds_to_exit(begun) < PROMPT_S
    first, second = fake.entries("term")
    assert second["at"] - first["at"] >= 0.1
    assert last_exit(orch) == (pid, 0)


def last_exit(orch: Orchestrator) -> tuple[int, int | None]:
    """Return pid and exit status of the last exit."""
    exit_ = orch.status().last_exit
    assert exit_ is not None
    return exit_.pid, exit_.returncode


def test_no_grace_means_sigkill_at_once(make: Make, fake: Fake, model_a: str) -> None:
    orch = make(kill_grace_s=0)
    pid = orch.load(model_a).pid
    orch.unload()
    assert fake.entries("term") == []
    assert last_exit(orch) == (pid, -signal.SIGKILL)


def test_a_stopped_server_is_continued_to_receive_the_signal(
    make: Make, fake: Fake, model_a: str
) -> None:
    """SIGTERM stays pending while a process is stopped, and the grace is a minute."""
    orch = make(kill_grace_s=60)
    pid = orch.load(model_a).pid
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the stop")
    watch, begun = Watch(pid), time.monotonic()
    orch.unload()
    assert watch.seconds_to_exit(begun) < PROMPT_S
    assert last_exit(orch) == (pid, 0)


@pytest.mark.parametrize("at", ["start", "healthy"])
def test_a_server_that_stops_itself_is_unloaded(
    make: Make, fake: Fake, model_a: str, at: str
) -> None:
    fake.behave(stop_itself=at)
    orch = make(kill_grace_s=60)
    loading = Background(orch.load, model_a)
    pid = fake.wait_for("start").pid
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the stop")
    if at == "healthy":
        assert loading.result().pid == pid
    orch.unload()
    assert not is_running(pid)
    assert orch.status().state is State.IDLE
    if at == "start":
        assert isinstance(loading.error(), Cancelled)


# Descendants


@pytest.mark.parametrize("ignores", ["", "!"], ids=["obedient", "deaf"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unload_returns_when_the_last_descendant_is_dead(
    make: Make, fake: Fake, model_a: str, state_dir: Path, kind: str, ignores: str
) -> None:
    """Any of them can hold memory, the port and the pipe."""
    fake.behave(children=[kind + ignores])
    orch = make(kill_grace_s=0.3)
    orch.load(model_a)
    child = fake.wait_for("child").pid
    has_environment = kind not in ("scrubbed", "escaped")
    until(lambda: has_environment or "PAUSE" not in environ(child), "the execve")
    orch.unload()
    assert fake.running() == set()
    assert servers_of(state_dir) == set()
    assert not is_running(child)


def environ(pid: int) -> dict[str, str]:
    try:
        return psutil.Process(pid).environ()
    except psutil.Error:
        return {}


def test_a_descendant_gets_as_many_signals_as_the_server(
    make: Make, fake: Fake, model_a: str
) -> None:
    """Behind a wrapper, two SIGTERM at once would end llama-server without a grace period."""
    fake.behave(ignore_term=1)
    orch = make(llama_server=fake.wrapper(), kill_grace_s=60)
    orch.load(model_a)
    orch.unload()
    first, second = fake.entries("term")
    assert second["at"] - first["at"] >= 0.1


@pytest.mark.parametrize(
    "command",
    [
        '"$SERVER" "$@"; exit $?',
        '"$SERVER" "$@" & wait',
        'setsid "$SERVER" "$@" & wait',
        'trap "" TERM; "$SERVER" "$@"; exit 0',
        '(setsid setsid "$SERVER" "$@" &) ; exec sleep 600',
        '"$SERVER" "$@" & while [ ! -s "$FAKE_SERVER_DIR/journal" ]; do sleep 0.01; done',
    ],
    ids=["in front", "background", "session", "deaf wrapper", "orphan", "wrapper ends first"],
)
def test_the_server_behind_a_wrapper_ends_with_it(
    make: Make, fake: Fake, model_a: str, state_dir: Path, command: str
) -> None:
    """Many people start llama-server from a shell script that does not `exec`."""
    if command.endswith("done"):
        fake.behave(loading_s=-1)  # or it might be Healthy before its wrapper has ended
    orch = make(llama_server=fake.wrapper(command), kill_grace_s=0.5)
    loading = Background(orch.load, model_a)
    pid = fake.wait_for("start").pid
    if command.endswith("done"):
        assert isinstance(loading.error(), ServerStartFailed)
    else:
        assert loading.result().pid != pid
        orch.unload()
    assert not is_running(pid)
    assert servers_of(state_dir) == set()


def test_the_next_server_waits_for_the_last_descendant(
    make: Make, fake: Fake, model_a: str, model_b: str
) -> None:
    """Its memory is not free before that."""
    fake.behave(children=["daemon!"])
    orch = make(kill_grace_s=0.3)
    orch.load(model_a)
    child = Watch(fake.wait_for("child").pid)
    swapping = Background(orch.load, model_b)
    died = time.monotonic() + child.seconds_to_exit(time.monotonic())
    assert swapping.result().status == "loaded"
    assert fake.wait_for("start", 2)["at"] > died - 0.05
    fake.assert_no_overlap()


def test_a_descendant_that_outlives_a_crashed_server_is_ended(
    make: Make, fake: Fake, model_a: str
) -> None:
    """It holds the pipe open, so the end of the output does not tell."""
    fake.behave(children=["setsid!"])
    orch = make(kill_grace_s=0.2)
    pid = orch.load(model_a).pid
    child = Watch(fake.wait_for("child").pid)
    kill(pid)
    child.seconds_to_exit(time.monotonic())
    until_state(orch, State.IDLE)
    assert last_exit(orch) == (pid, -signal.SIGKILL)


# Output


@pytest.mark.parametrize("form", ["lines", "one_line", "binary", "escapes"])
def test_a_flood_of_output_does_not_block_a_load(
    orch: Orchestrator, fake: Fake, model_a: str, form: str
) -> None:
    """At 64 KiB an undrained pipe blocks the real server, including its signal handlers."""
    fake.behave(flood_bytes=2 << 20, flood=form)
    orch.load(model_a)
    lines = orch.logs(10_000)
    assert 1 <= len(lines) <= 2000
    assert all(len(line) <= 8192 for line in lines)
    assert all(line.isprintable() or "�" in line for line in lines)
    orch.unload()


def test_a_server_that_never_stops_printing_can_be_used_and_unloaded(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """The output must not starve the exit, nor a call."""
    fake.behave(flood_for_ever=True)
    outcome = orch.load(model_a)
    assert orch.load(model_a).pid == outcome.pid
    watch, begun = Watch(outcome.pid), time.monotonic()
    orch.unload()
    assert watch.seconds_to_exit(begun) < PROMPT_S


def test_a_closed_output_does_not_make_the_warden_spin(
    orch: Orchestrator, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe at its end is always readable."""
    turns = 0
    turn = Warden._turn

    def counted(warden: Warden) -> None:
        nonlocal turns
        turns += 1
        turn(warden)

    monkeypatch.setattr(Warden, "_turn", counted)
    fake.behave(close_output=True)
    pid = orch.load(model_a).pid
    fake.wait_for("closed")
    server = orch._owner.effects._server  # type: ignore[union-attr]
    until(lambda: server.output_fd is None, "the end of the pipe")
    before = turns
    threading.Event().wait(0.2)  # a measurement, not a rendezvous
    assert turns - before <= 2
    orch.unload()
    assert not is_running(pid)


def test_output_can_be_read_after_the_unload(orch: Orchestrator, fake: Fake, model_a: str) -> None:
    fake.behave(message="first words")
    orch.load(model_a)
    orch.unload()
    assert orch.logs()[0] == "first words"
    assert orch.logs(1) == orch.logs()[-1:]
    assert orch.logs(0) == ()


# Exits


@pytest.mark.parametrize(
    ("how", "returncode"),
    [({"crash_code": 7}, 7), ({"crash_code": 0}, 0), ({"crash_signal": 11}, -11)],
)
def test_a_crash_and_its_exit_status_are_reported(
    orch: Orchestrator, fake: Fake, model_a: str, how: dict[str, Any], returncode: int
) -> None:
    """And the same load then starts a new server."""
    fake.behave(crash_after_s=0.1, message="bye", **how)
    pid = orch.load(model_a).pid
    until_state(orch, State.IDLE)
    status = orch.status()
    assert status.loaded is None
    assert last_exit(orch) == (pid, returncode)
    assert status.last_error is not None
    assert status.last_error.category == "server_exited"
    assert "bye" in status.last_error.log_tail
    fake.behave()
    again = orch.load(model_a)
    assert (again.status, again.pid != pid) == ("loaded", True)
    assert orch.status().last_error is None


def test_the_exit_of_a_healthy_server_is_noticed_in_milliseconds(
    orch: Orchestrator, model_a: str
) -> None:
    took = []
    for _ in range(5):
        pid = orch.load(model_a).pid
        begun = time.monotonic()
        kill(pid)
        until(lambda: orch.status().state is not State.HEALTHY, "the exit")
        took.append(time.monotonic() - begun)
        until_state(orch, State.IDLE)
    assert min(took) < 0.1, took


@pytest.fixture(params=["absent", "forbidden"])
def no_pidfds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a Python built against old headers, or a container runtime that forbids pidfds."""

    def forbidden(pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    names = {name: value for name, value in vars(os).items() if name != "pidfd_open"}
    if request.param == "forbidden":
        names["pidfd_open"] = forbidden
    monkeypatch.setattr("orchestrator.server.tree.posix_process.os", SimpleNamespace(**names))


@pytest.mark.usefixtures("no_pidfds")
def test_exits_are_polled_for_without_pidfds(
    make: Make, fake: Fake, model_a: str, model_b: str
) -> None:
    fake.behave(by_model={"b.gguf": {"ignore_term": -1, "children": ["daemon!"]}})
    orch = make(kill_grace_s=0.2)
    first = orch.load(model_a).pid
    second = orch.load(model_b).pid
    assert not is_running(first)
    assert orch.load(model_b).pid == second
    orch.unload()
    assert fake.running() == set()
    third = orch.load(model_a).pid
    kill(third)
    until_state(orch, State.IDLE)
    assert last_exit(orch) == (third, -signal.SIGKILL)
    fake.behave(hang=True)
    loading = Background(orch.load, model_a, load_request_id="x")
    until_state(orch, State.WAITING_HEALTH)
    assert orch.cancel("x") is True
    assert isinstance(loading.error(), Cancelled)
    fake.assert_no_overlap()


# Processes that survive SIGKILL


@pytest.fixture
def immortal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Make signals have no effect until the returned function is called.

    The keeper is a thread, so that it is reached too.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(KeeperLink, "start", lambda *_: KeeperLink.start_thread())
    patch.setattr(Pin, "signal", lambda *_: None)
    patch.setattr(os, "killpg", lambda *_: None)
    monkeypatch.setattr(ladder, "_GONE_BASE_S", 0.2)
    yield patch.undo
    patch.undo()


def test_a_server_that_survives_sigkill_keeps_the_slot(
    make: Make,
    fake: Fake,
    model_a: str,
    model_b: str,
    immortal: Callable[[], None],
) -> None:
    """No server is started beside it, and once it has exited the slot is free."""
    orch = make(kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    with pytest.raises(SlotOccupied, match=str(pid)):
        orch.unload()
    status = orch.status()
    assert (status.state, status.occupied_by, status.loaded) == (State.IDLE, pid, None)
    for model in (model_a, model_b):
        with pytest.raises(SlotOccupied) as refused:
            orch.load(model)
        assert_sentence("slot.occupied", refused.value.message, pid=pid)
    assert len(fake.entries("start")) == 1
    assert is_running(pid)
    immortal()
    kill(pid)
    until(lambda: orch.status().occupied_by is None, "the slot to be free")
    assert orch.load(model_b).pid != pid
    fake.assert_no_overlap()


def test_a_server_that_may_not_be_signalled_keeps_the_slot(
    make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may run as another user, started by sudo."""

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(ladder, "_GONE_BASE_S", 0.2)
    monkeypatch.setattr(KeeperLink, "start", lambda *_: KeeperLink.start_thread())
    fake.behave(children=["daemon"])
    orch = make(kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    child = fake.wait_for("child").pid
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", forbidden)
        patch.setattr(signal, "pidfd_send_signal", forbidden)
        with pytest.raises(SlotOccupied, match=rf"{pid}.* did not end") as refused:
            orch.unload()
        assert str(child) in refused.value.message
    assert orch.unload().status == "unloaded"


def test_an_unload_retries_a_failed_kill(
    make: Make, fake: Fake, model_a: str, immortal: Callable[[], None]
) -> None:
    orch = make(kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    with pytest.raises(SlotOccupied):
        orch.unload()
    immortal()
    assert orch.unload().status == "unloaded"
    assert not is_running(pid)
    assert orch.status().occupied_by is None


def test_a_load_retries_a_failed_kill(
    make: Make, fake: Fake, model_a: str, model_b: str, immortal: Callable[[], None]
) -> None:
    orch = make(kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    with pytest.raises(SlotOccupied):
        orch.load(model_b)
    immortal()
    assert orch.load(model_b).pid != pid
    assert not is_running(pid)
    fake.assert_no_overlap()


def test_a_descendant_that_survives_sigkill_keeps_the_slot(
    make: Make, fake: Fake, model_a: str, immortal: Callable[[], None]
) -> None:
    fake.behave(children=["closed"])
    orch = make(kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    child = fake.wait_for("child").pid
    kill(pid)
    until(lambda: orch.status().state is State.IDLE, "the exit")
    assert not is_running(pid)
    with pytest.raises(SlotOccupied, match=str(child)):
        orch.load(model_a)
    assert len(fake.entries("start")) == 1
    immortal()
    assert orch.load(model_a).status == "loaded"
    assert not is_running(child)


def test_close_reports_a_server_that_survives_sigkill(
    fake: Fake, model_a: str, state_dir: Path, immortal: Callable[[], None]
) -> None:
    """The next orchestrator on the slot ends it."""
    settings: dict[str, Any] = {
        "llama_server": fake.path,
        "state_dir": state_dir,
        "server_env": fake.env,
    }
    orch = Orchestrator(kill_grace_s=0.1, **settings)
    pid = orch.load(model_a).pid
    with warnings.catch_warnings():  # `Popen` complains when it is dropped while its child runs
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(SlotOccupied, match=str(pid)):
            orch.close()
        assert is_running(pid)
        immortal()
        with Orchestrator(**settings) as heir:
            assert not is_running(pid)
            heir.load(model_a)
        gc.collect()


# Cancel, in every state


def test_a_cancel_during_killing_starts_no_server(
    make: Make, fake: Fake, model_a: str, model_b: str
) -> None:
    fake.behave(ignore_term=1)
    orch = make(kill_grace_s=60)
    orch.load(model_a)
    loading = Background(orch.load, model_b, load_request_id="b")
    until_state(orch, State.KILLING)
    assert orch.cancel("b") is True
    assert isinstance(loading.error(), Cancelled)
    assert orch.status().state is State.IDLE
    assert len(fake.entries("start")) == 1


def test_a_cancel_during_downloading_starts_no_server(
    orch: Orchestrator, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, fetch = threading.Event(), ModelSource.fetch

    def gated(*args: Any) -> Any:
        gate.wait(30)
        return fetch(*args)

    monkeypatch.setattr(ModelSource, "fetch", gated)
    loading = Background(orch.load, model_a, load_request_id="a")
    until_state(orch, State.DOWNLOADING)
    cancelling = Background(orch.cancel, "a")
    until(lambda: orch.status().last_error is not None, "the cancel")
    gate.set()
    assert cancelling.result() is True
    assert isinstance(loading.error(), Cancelled)
    assert orch.status().state is State.IDLE
    assert fake.entries("start") == []


@pytest.mark.parametrize("call", ["cancel", "unload", "supersede"])
def test_a_call_during_the_spawn_ends_the_late_server(
    orch: Orchestrator,
    fake: Fake,
    model_a: str,
    model_b: str,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    """The spawn still delivers a child, which no load wants any more."""
    gate, spawn = threading.Event(), Warden.spawn
    fake.behave(by_model={os.path.basename(model_a): {"loading_s": -1}})

    def gated(warden: Warden, *args: Any) -> None:
        gate.wait(30)
        spawn(warden, *args)

    monkeypatch.setattr(Warden, "spawn", gated)
    loading = Background(orch.load, model_a, load_request_id="a")
    until_state(orch, State.SPAWNING)
    calls = {
        "cancel": lambda: orch.cancel("a"),
        "unload": lambda: orch.unload(),
        "supersede": lambda: orch.load(model_b),
    }
    calling = Background(calls[call])
    until_queued(orch)
    gate.set()
    assert isinstance(loading.error(), OrchestratorError)
    answer = calling.result()
    if call == "supersede":
        assert fake.wait_for("start", len(fake.entries("start"))).pid == answer.pid
    else:
        assert orch.status().state is State.IDLE
        assert fake.running() == set()
    triggers = [event.data["trigger"] for event in transitions(orch)]
    probed = ["not_ready"] if call == "supersede" else []  # its look-up comes after the spawn
    assert triggers[: 5 + len(probed)] == [
        *("load", "emptied", "fetched", "spawned", *probed, "emptied")
    ]
    fake.assert_no_overlap()


@pytest.mark.parametrize(
    "behaviour",
    [
        {"hang": True},
        {"loading_s": -1},
        {"answer_after_s": -1},
        {"bind_after_s": 60},
        {"backlog": 0},
        {"stop_itself": "start"},
        {"announce": None, "answer_after_s": -1},
        {"loading_s": -1, "flood_for_ever": True},
    ],
    ids=lambda behaviour: "-".join(behaviour),
)
def test_a_cancel_during_waiting_health_is_quick(
    orch: Orchestrator, fake: Fake, model_a: str, behaviour: dict[str, Any]
) -> None:
    """A hanging probe must not delay it. Other implementations took up to 416 s."""
    fake.behave(**behaviour)
    took = []
    for number in range(3):
        loading = Background(orch.load, model_a, load_request_id="a")
        fake.wait_for(
            "start" if {"hang", "bind_after_s", "stop_itself"} & behaviour.keys() else "bound",
            number + 1,
        )
        until_state(orch, State.WAITING_HEALTH)
        threading.Event().wait(0.3 if "backlog" in behaviour else 0.03)  # until a probe hangs
        begun = time.monotonic()
        assert orch.cancel("a") is True
        took.append(time.monotonic() - begun)
        assert isinstance(loading.error(), Cancelled)
        assert fake.running() == set()
    assert min(took) < 0.25, took


def test_a_cancel_of_a_healthy_load_changes_nothing(orch: Orchestrator, model_a: str) -> None:
    pid = orch.load(model_a, load_request_id="a").pid
    assert orch.cancel("a") is False
    assert orch.load(model_a).pid == pid


# Slots and processes


def test_a_second_orchestrator_on_the_slot_is_refused(make: Make, model_a: str) -> None:
    first = make()
    pid = first.load(model_a).pid
    with pytest.raises(SlotOwned, match="this process"):
        make().load(model_a)
    assert first.load(model_a).pid == pid
    first.close()
    assert make().load(model_a).pid != pid


def test_another_process_on_the_slot_is_refused_with_the_pid_of_the_owner(
    orch: Orchestrator, host: StartHost, model_a: str
) -> None:
    """A second backend started by mistake must not disturb the running model."""
    pid = orch.load(model_a).pid
    other = host(
        "from orchestrator import SlotOwned\n"
        "try: orch.load(a['model'])\n"
        "except SlotOwned as error: send(text=str(error))\n"
    )
    assert f"process {os.getpid()}:" in other.receive()["text"]
    assert other.process.wait(30) == 0
    assert orch.load(model_a).pid == pid
    orch.unload()


def test_different_slots_coexist(make: Make, tmp_path: Path, model_a: str) -> None:
    fakes = [Fake(tmp_path / name) for name in ("one", "two")]
    one, two = (
        make(slot=name, llama_server=fake.path, server_env=fake.env)
        for name, fake in zip(("one", "two"), fakes, strict=True)
    )
    pids = {one.load(model_a).pid, two.load(model_a).pid}
    assert len(pids) == 2
    one.unload()
    assert two.load(model_a).pid in pids
    assert [len(fake.running()) for fake in fakes] == [0, 1]
    one.close()
    two.close()


FORKED = """
pid = orch.load(a["model"]).pid
child = os.fork()
if child == 0:
    from orchestrator import WrongProcess
    seen = []
    for call in (lambda: orch.load(a["model"]), orch.unload, lambda: orch.cancel("x"),
                 lambda: orch.lease().__enter__(), lambda: orch.plan(a["model"])):
        try: seen.append(repr(call()))
        except WrongProcess as error: seen.append(error.category)
    send(seen=seen)
    sys.exit(0)  # runs the inherited exit handlers
status = os.waitpid(child, 0)[1]
again = orch.load(a["model"])
send(status=status, pid=pid, again=again.pid, how=again.status)
orch.close()
send(left=str(orch.status().state))
"""


def test_a_forked_worker_neither_uses_nor_ends_the_server(host: StartHost) -> None:
    parent = host(FORKED)
    assert parent.receive()["seen"] == ["wrong_process"] * 5
    received = parent.receive()
    assert (received["status"], received["how"]) == (0, "already_loaded")
    assert received["pid"] == received["again"]
    assert parent.receive() == {"left": "Idle"}


UNUSED = """
unused = make(slot="unused")
listed = len(orch.variants(a["model"]).variants)  # by a thread that has nothing to do after that
if os.fork() == 0:
    signal.alarm(20)
    again = len(unused.variants(a["model"]).variants)
    send(again=again, status=unused.load(a["model"]).status)
    unused.close()
    os._exit(0)
os.wait()
send(listed=listed)
"""


def test_an_unused_orchestrator_works_after_a_fork(host: StartHost) -> None:
    """Pre-fork servers import the app first. The threads of the parent are not in the child."""
    parent = host(UNUSED)
    assert parent.receive() == {"again": 1, "status": "loaded"}
    assert parent.receive() == {"listed": 1}


def test_workers_forked_at_any_moment_hold_no_lock(
    orch: Orchestrator, fake: Fake, model_a: str, model_b: str
) -> None:
    """A fork copies all descriptors, and every load has the slot's lock open for a moment."""
    workers: list[int] = []
    stop = threading.Event()

    def fork_all_day() -> None:
        while not stop.is_set() and len(workers) < 100:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                while True:
                    signal.pause()
            workers.append(pid)

    forking = threading.Thread(target=fork_all_day)
    forking.start()
    try:
        for _ in range(6):
            assert orch.load(model_a).status == "loaded"
            assert orch.load(model_b).status == "loaded"
        orch.unload()
    finally:
        stop.set()
        forking.join()
        survivors = [pid for pid in workers if is_running(pid)]
        for pid in workers:
            kill(pid)
            os.waitpid(pid, 0)
    assert survivors == workers
    fake.assert_no_overlap()


REAPS_ALL = """
def reap_all():
    while True:
        try: os.waitpid(-1, 0)
        except ChildProcessError: time.sleep(0.0005)
threading.Thread(target=reap_all, daemon=True).start()
"""

REAPED_BY_THE_HOST = """
outcome = orch.load(a["model"])
os.kill(outcome.pid, 9)
while orch.status().state is not State.IDLE: time.sleep(0.001)
crash = orch.status().last_exit
again = orch.load(a["model"])
orch.unload()
end = orch.status()
send(crash=[crash.pid == outcome.pid, crash.returncode], again=again.pid != outcome.pid,
    end=[str(end.state), end.last_exit.returncode, end.occupied_by])
orch.close()
send(closed=True)
"""


@pytest.mark.parametrize(
    "habit",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        REAPS_ALL,
    ],
    ids=["ignores SIGCHLD", "waits for any child"],
)
def test_a_host_that_reaps_our_children_loses_only_the_exit_status(
    host: StartHost, habit: str
) -> None:
    """The status is None unless it was read in time; 0 would be wrong."""
    other = host(habit + REAPED_BY_THE_HOST)
    received = other.receive()
    assert received["crash"][0] is True
    assert received["crash"][1] in (None, -9)
    assert received["again"] is True
    assert received["end"][0] == "Idle"
    assert received["end"][1] in (None, 0)
    assert received["end"][2] is None
    assert other.receive() == {"closed": True}
    assert other.process.wait(30) == 0


def test_many_cycles_leak_no_descriptor_and_no_thread(
    make: Make, fake: Fake, model_a: str, model_b: str
) -> None:
    orch = make()

    def cycle() -> None:
        orch.load(model_a)
        orch.load(model_b)
        orch.unload()

    for _ in range(3):
        cycle()
    before = held()
    for _ in range(30):
        cycle()
    until(lambda: holds_at_most(before), f"{held()} to become {before}")
    orch.close()


def test_close_releases_threads_descriptors_and_children(make: Make, model_a: str) -> None:
    make().start().close()
    before = held()
    children = set(psutil.Process().children())
    for _ in range(5):
        orch = make()
        orch.load(model_a)
        orch.close()
    until(lambda: holds_at_most(before), f"{held()} to become {before}")
    assert set(psutil.Process().children()) == children


def held() -> tuple[int, int]:
    """Count the descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def holds_at_most(before: tuple[int, int]) -> bool:
    """A thread that has answered may need a moment to end, also one of another test."""
    return all(now <= then for now, then in zip(held(), before, strict=True))
