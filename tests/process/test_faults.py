"""Faults that no other file of tests injects; docs/assurance.md lists all faults.

They are injected into the real llama-server where that is possible, else into the fake one. Faults
of the host are injected into a host of its own, in namespaces where necessary.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from orchestrator import LoadFields, Orchestrator, State
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import DeadlineExceeded, InvalidRequest, ServerStartFailed, Stalled
from tests.kit.process.servers import servers_of
from tests.kit.process.support import (
    Background,
    Fake,
    Make,
    StartHost,
    Watch,
    abandon,
    is_running,
    keeper_of,
    kill,
    nothing_left,
    stream,
    until,
    until_it_catches,
    until_state,
)


def answers(base_url: str) -> bool:
    with httpx.Client(base_url=base_url, trust_env=False) as server:
        return server.get("/health").status_code == 200


# Exits of the server


@pytest.mark.external
@pytest.mark.parametrize(
    "signum",
    ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM", "SIGILL", "SIGBUS", "SIGFPE", "SIGHUP", "SIGINT"],
)
def test_a_signal_that_ends_a_healthy_server_is_reported(
    real: Orchestrator, tiny_model: str, signum: str
) -> None:
    """llama-server exits with 0 at SIGTERM and SIGINT; the others are crashes."""
    number = getattr(signal, signum)
    pid = real.load(tiny_model).pid
    if is_handled := signum in ("SIGTERM", "SIGINT"):
        until_it_catches(pid, number)
    os.kill(pid, number)
    until_state(real, State.IDLE)
    status = real.status()
    assert status.loaded is None
    assert status.last_error is not None
    assert status.last_error.category == "server_exited"
    assert status.last_exit is not None
    expected = 0 if is_handled else -number
    assert (status.last_exit.pid, status.last_exit.returncode) == (pid, expected)
    again = real.load(tiny_model)
    assert (again.status, is_running(again.pid)) == ("loaded", True)


@pytest.mark.parametrize("code", [0, 1, 2, 127, 255])
def test_the_exit_status_of_a_healthy_server_is_reported(
    orch: Orchestrator, fake: Fake, model_a: str, code: int
) -> None:
    """Also 0: the server has exited in any case."""
    fake.behave(crash_after_s=0.05, crash_code=code)
    pid = orch.load(model_a).pid
    until_state(orch, State.IDLE)
    status = orch.status()
    assert status.loaded is None
    assert status.last_exit is not None
    assert (status.last_exit.pid, status.last_exit.returncode) == (pid, code)


@pytest.mark.external
def test_a_server_killed_by_the_kernel_is_reported(real: Orchestrator, tmp_path: Path) -> None:
    """At its CPU limit, during a stream; the out-of-memory killer sends the same SIGKILL."""
    model = write_tiny_model(tmp_path / "long.gguf", context_length=1 << 17)  # for over a second
    outcome = real.load(str(model), n_parallel=1)
    with stream(outcome) as response:
        resource.prlimit(outcome.pid, resource.RLIMIT_CPU, (1, 1))
        reading = Background(response.read)  # a server whose output is not read uses no CPU
        until_state(real, State.IDLE)
        assert reading.error() is not None
    last_exit = real.status().last_exit
    assert last_exit is not None
    assert (last_exit.pid, last_exit.returncode) == (outcome.pid, -signal.SIGKILL)
    assert real.load(str(model), n_parallel=1).status == "loaded"


@pytest.mark.external
def test_a_memory_limit_fails_only_the_load_that_exceeds_it(
    llama_server: str, make: Make, fake: Fake, tiny_model: str
) -> None:
    """The next load succeeds."""
    limited = fake.script("limited.sh", f'#!/bin/sh\nulimit -v 40000\nexec "{llama_server}" "$@"\n')
    orch = make(llama_server=limited)
    with pytest.raises(ServerStartFailed) as failed:
        orch.load(tiny_model)
    assert failed.value.log_tail
    fake.script("limited.sh", f'#!/bin/sh\nexec "{llama_server}" "$@"\n')
    assert orch.load(tiny_model).status == "loaded"


# Foreign servers


@pytest.mark.external
def test_a_port_taken_over_after_a_crash_is_not_used(real: Orchestrator, tiny_model: str) -> None:
    """It cannot be taken before, because the server binds port 0."""
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
            thief.accept()  # it was never connected to


# The clock


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
def test_a_step_of_the_wall_clock_changes_no_timeout(
    make: Make,
    fake: Fake,
    model_a: str,
    model_b: str,
    monkeypatch: pytest.MonkeyPatch,
    jump_s: float,
) -> None:
    """NTP, a suspended laptop or a user may step it."""
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


# Ends of the host, in every state

IN_A_STATE = """
from orchestrator.models.source import ModelSource
from orchestrator.server.keepers import Keepers
def stop_in(module, name, *, after):
    wrapped = getattr(module, name)
    def stopping(*args, **settings):
        result = wrapped(*args, **settings) if after else None
        send(state=str(orch.status().state))
        rest_of_thread.wait()
        return result
    setattr(module, name, stopping)
rest_of_thread = threading.Event()
orch = make(kill_grace_s=GRACE_S)
state = STATE
if state == "Downloading":
    orch.start()
    stop_in(ModelSource, "fetch", after=True)
if state == "Spawning":
    orch.start()
    stop_in(Keepers, "spawn", after=True)
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
    send(state=state)
try: sleep_forever()
finally: rest_of_thread.set()  # at Ctrl-C the host continues what it is doing
"""
"""Sends the state once it is in it, and stays there."""


@pytest.mark.parametrize("signum", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("state", list(State))
def test_no_server_outlives_a_backend_that_ends_in_any_state(
    host: StartHost,
    make: Make,
    fake: Fake,
    model_a: str,
    state_dir: Path,
    state: State,
    signum: str,
) -> None:
    """The server ignores SIGTERM wherever it is alive. Only Ctrl-C lets the host stop it, after the
    grace period. The slot is free afterwards.
    """
    is_deaf = state is not State.IDLE
    fake.behave(ignore_term=-1 if is_deaf else 0, hang=state is State.WAITING_HEALTH)
    grace_s = "1.0" if signum == "SIGINT" else "600.0"
    backend = host(IN_A_STATE.replace("STATE", repr(str(state))).replace("GRACE_S", grace_s))
    assert backend.receive() == {"state": str(state)}
    keeper_of(backend)
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
    fake.assert_no_overlap()


# Shortages of the host

MANY_FILES = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
wanted = 10_000
resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + 200, hard))
kept = [os.dup(0) for _ in range(wanted)]
for fd in kept: os.set_inheritable(fd, True)
first = orch.load(a["model"])
again = orch.load(a["model"], force_reload=True)
with orch.lease() as server: leased = server.pid
send(files=len(os.listdir("/proc/self/fd")) > wanted, pids=[first.pid, again.pid], leased=leased)
orch.close()
send(left=str(orch.status().state))
"""


def test_ten_thousand_open_files_are_not_inherited(host: StartHost, fake: Fake) -> None:
    """Such as a proxy's connections: `select` fails beyond 1,024, and a fork copies them all."""
    backend = host(MANY_FILES)
    received = backend.receive()
    assert received["files"] is True
    assert received["leased"] == received["pids"][1]
    assert [len(entry["fds"]) for entry in fake.entries("start")] == [4, 4]
    assert backend.receive() == {"left": "Idle"}
    fake.assert_no_overlap()


NO_FILES = """
import resource
from orchestrator import OrchestratorError
def use_up():
    used = []
    try:
        while True: used.append(os.dup(0))
    except OSError: return used
def ask(call):
    try: return call().status
    except OrchestratorError as error: return error.category
def give_back(used):
    for fd in used: os.close(fd)
load = lambda: orch.load(a["model"], force_reload=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
orch = make(kill_grace_s=0.2)
load()
used = use_up()
report = dict(state=str(orch.status().state), unload=ask(orch.unload))
give_back(used)
report["then"] = [ask(orch.unload), ask(load)]
used = use_up()
give_back(used[:SPARED])
report["reload"] = ask(lambda: orch.load(a["model"], force_reload=True, deadline_s=5))
give_back(used[SPARED:])
report["at_last"] = [ask(orch.unload), ask(load)]
send(**report)
orch.close()
send(left=str(orch.status().state))
"""


@pytest.mark.parametrize("spared", [0, 2, 4, 6])
def test_running_out_of_descriptors_loses_nothing(host: StartHost, fake: Fake, spared: int) -> None:
    """A process that cannot be checked is not taken for dead."""
    fake.behave(children=["daemon!"])
    backend = host(NO_FILES.replace("SPARED", str(spared)))
    received = backend.receive()
    assert received["state"] == "Healthy"
    assert received["unload"] in ("unloaded", "slot_occupied")
    assert received["then"] == ["unloaded", "loaded"]
    assert received["reload"] in (
        *("loaded", "server_unavailable", "unavailable", "slot_occupied", "state_dir"),
        "deadline",  # nothing is left to ask the server with
    )
    assert received["at_last"] == ["unloaded", "loaded"]
    assert backend.receive() == {"left": "Idle"}
    fake.assert_no_overlap()


def namespaces() -> list[str]:
    """Return a command prefix that gives a program mounts of its own, as root or most users may."""
    prefix = ["unshare", "--mount"]
    if os.geteuid() != 0:
        prefix += ["--user", "--map-root-user"]
    subprocess.run([*prefix, "true"], check=True)
    return prefix


NO_PROC = """
import subprocess
from orchestrator import OrchestratorError
def ask(call):
    try: return call().status
    except OrchestratorError as error: return error.category
report = {}
if BEFORE == "loaded":
    report["pid"] = orch.load(a["model"]).pid
subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
report["load"] = ask(lambda: orch.load(a["model"], force_reload=True))
report["unload"] = ask(orch.unload)
report["state"] = str(orch.status().state)
send(**report)
subprocess.run(["umount", "/proc"], check=True)
send(then=[ask(orch.unload), ask(lambda: orch.load(a["model"]))])
orch.close()
send(left=str(orch.status().state))
"""


@pytest.mark.parametrize("before", ["nothing", "loaded"])
def test_an_unreadable_process_table_starts_and_loses_nothing(
    host: StartHost, fake: Fake, before: str
) -> None:
    """Whether the slot is empty cannot be known in a jail without /proc."""
    backend = host(NO_PROC.replace("BEFORE", repr(before)), inside=tuple(namespaces()))
    received = backend.receive()
    if "pid" in received:
        assert not is_running(received["pid"])
    assert received["load"] not in ("loaded", "already_loaded", "internal")
    assert received["state"] == "Idle"
    assert backend.receive() == {"then": ["unloaded", "loaded"]}
    assert backend.receive() == {"left": "Idle"}
    fake.assert_no_overlap()


FULL_DISK = """
from orchestrator import OrchestratorError
def ask(call):
    try: return call().status
    except OrchestratorError as error: return [error.category, error.field]
def fill():
    try:
        with open(a["state_dir"] + "/filler", "wb", buffering=0) as file:
            while True: file.write(bytes(1024))
    except OSError: pass
load = lambda: orch.load(a["model"], chat_template_override="{{ messages }}")
orch.start()
fill()
report = dict(full=[ask(load), ask(lambda: orch.load(a["model"])), str(orch.status().state)])
os.unlink(a["state_dir"] + "/filler")
report["free"] = ask(load)
fill()
report["full_again"] = [ask(load), ask(orch.unload), ask(orch.unload)]
os.unlink(a["state_dir"] + "/filler")
report["free_again"] = ask(load)
send(**report)
orch.close()
send(left=str(orch.status().state))
"""


def test_a_full_disk_under_the_record_starts_nothing_and_loses_nothing(
    host: StartHost, fake: Fake, state_dir: Path
) -> None:
    """Nothing is started without a record; a running server can be stopped without writing."""
    mount = f'mount -t tmpfs -o size=64k none "{state_dir}" && exec "$@"'
    backend = host(FULL_DISK, inside=(*namespaces(), "sh", "-c", mount, "sh"))
    assert backend.receive() == {
        "full": [["state_dir", "state_dir"], ["state_dir", "state_dir"], "Idle"],
        "free": "loaded",
        "full_again": ["already_loaded", "unloaded", "unloaded"],
        "free_again": "loaded",
    }
    assert backend.receive() == {"left": "Idle"}
    fake.assert_no_overlap()
    assert len(fake.entries("start")) == 2


FULL_LOG = """
import logging
logging.basicConfig(level=0, stream=open("/dev/full", "w", buffering=1))
sys.stderr = open("/dev/full", "w")
from orchestrator import OrchestratorError
from orchestrator.models.source import ModelSource
first = orch.load(a["model"])
fetch = ModelSource.fetch
def failing(*args): raise RuntimeError("of the effect")
ModelSource.fetch = failing
try: failed = orch.load(a["model"], force_reload=True).status
except OrchestratorError as error: failed = error.category
ModelSource.fetch = fetch
os.kill(orch._owner.effects._warden.keepers.present.pid, signal.SIGKILL)
again = orch.load(a["model"])
orch.unload()
send(first=first.status, failed=failed, again=again.status, state=str(orch.status().state))
last = orch.load(a["model"])
send(pid=last.pid)
sleep_forever()
"""


def test_a_log_on_a_full_disk_does_not_interrupt_anything(
    host: StartHost, make: Make, fake: Fake
) -> None:
    """Neither a load, nor a failing effect, nor a new keeper, nor the next start."""
    backend = host(FULL_LOG, server=fake.wrapper())
    received = backend.receive()
    assert received == {"first": "loaded", "failed": "internal", "again": "loaded", "state": "Idle"}
    backend.receive()
    server = Watch(fake.entries("start")[-1].pid)
    abandon(backend)
    assert is_running(server.pid)
    with_full_log = FULL_LOG.partition("from orchestrator import")[0]
    second = host(with_full_log + 'send(how=orch.load(a["model"]).status)\norch.close()\n')
    assert second.receive() == {"how": "loaded"}
    server.seconds_to_exit(time.monotonic(), 5)
    fake.assert_no_overlap()


# Environment and names


@pytest.mark.external
@pytest.mark.parametrize("server", ["real", "fake"])
def test_a_host_with_an_empty_environment_loads(
    host: StartHost, llama_server: str, fake: Fake, server: str
) -> None:
    """No PATH, HOME or LANG: a service manager may start it like this."""
    program = 'send(env=dict(os.environ))\nsend(how=orch.load(a["model"]).status)\norch.close()\n'
    backend = host(
        program,
        server=llama_server if server == "real" else fake.path,
        inside=("/usr/bin/env", "-i"),
    )
    assert "PATH" not in backend.receive()["env"]
    assert backend.receive() == {"how": "loaded"}
    assert backend.process.wait(30) == 0


AWKWARD = {
    "spaces": "a  model of mine",
    "quotes": 'it\'s "quoted" `$HOME` $(touch x) \\ ;&|',
    "unicode": "модель-模型-🦙-e\u0301",
    "dash": "--help",
    "long": "n" * 200,
}
UNPRINTABLE = {
    "newline": "two\nlines",
    "escape": "\x1b[31mred",
    "not-utf-8": os.fsdecode(b"caf\xe9-\xff"),
}


@pytest.mark.external
@pytest.mark.parametrize("server", ["llama_server", "embedded"])
@pytest.mark.parametrize("kind", AWKWARD)
def test_an_awkward_path_is_passed_on_unchanged(
    llama_server: str, tmp_path: Path, tiny_model: str, kind: str, server: str
) -> None:
    """Model and state directory: nothing is split, expanded or taken for a flag."""
    folder = tmp_path / AWKWARD[kind]
    state_dir = folder / "state"
    state_dir.mkdir(parents=True)
    model = folder / f"{AWKWARD[kind]}.gguf"
    model.hardlink_to(tiny_model)
    binary = llama_server if server == "llama_server" else "embedded"
    template: LoadFields = {"chat_template_override": "{{ messages[0].content }}"}
    with Orchestrator(llama_server=binary, state_dir=state_dir) as orch:
        outcome = orch.load(str(model), **template)
        assert answers(outcome.base_url)
        assert os.fsencode(model) in Path(f"/proc/{outcome.pid}/cmdline").read_bytes().split(b"\0")
        assert orch.load(str(model), **template).pid == outcome.pid
        assert outcome.model_path == str(model)
    assert not is_running(outcome.pid)
    assert servers_of(state_dir) == set()
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("kind", UNPRINTABLE)
def test_an_unprintable_path_is_refused(
    orch: Orchestrator, fake: Fake, tmp_path: Path, model_a: str, kind: str
) -> None:
    """It can be neither logged nor sent as JSON. As a state directory it is accepted."""
    folder = tmp_path / UNPRINTABLE[kind]
    (folder / "state").mkdir(parents=True)
    (folder / "m.gguf").hardlink_to(model_a)
    pid = orch.load(model_a).pid
    with pytest.raises(InvalidRequest) as refused:
        orch.load(str(folder / "m.gguf"))
    assert refused.value.field == "model_path"
    assert orch.load(model_a).pid == pid
    orch.unload()
    other = Orchestrator(llama_server=fake.path, state_dir=folder / "state", server_env=fake.env)
    with other:
        assert is_running(other.load(model_a).pid)
    assert fake.running() == set()


IN_THE_C_LOCALE = """
from orchestrator import InvalidRequest
folder = os.path.dirname(a["model"])
[name] = [name for name in os.listdir(folder) if name.startswith("caf")]
try: report = orch.load(os.path.join(folder, name)).status
except InvalidRequest as error: report = error.field
outcome = orch.load(a["model"])
send(other=report, how=outcome.status, again=orch.load(a["model"]).status, lines=orch.logs()[:1])
orch.close()
send(left=str(orch.status().state))
"""


@pytest.mark.parametrize("locale", ["C", "tlh_QO.KLINGON"])
def test_output_is_read_in_any_locale(
    host: StartHost, fake: Fake, model_a: str, locale: str
) -> None:
    """Output is bytes that the locale may not be able to decode."""
    words = b"caf\xe9 \xff\xfe mod\xc3\xa8le"
    wrapper = Path(fake.wrapper('exec "$SERVER" "$@"'))
    wrapper.write_bytes(
        wrapper.read_bytes().replace(b"\nSERVER", b"\necho '" + words + b"'\nSERVER")
    )
    Path(model_a).with_name("café.gguf").hardlink_to(model_a)
    backend = host(
        IN_THE_C_LOCALE,
        server=str(wrapper),
        inside=("env", f"LC_ALL={locale}", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0"),
    )
    assert backend.receive() == {
        "other": "model_path",
        "how": "loaded",
        "again": "already_loaded",
        "lines": [words.decode("utf-8", "replace")],
    }
    assert backend.receive() == {"left": "Idle"}
