"""The keeper among real processes: what it proves, what it costs, and every end of host and server.

Its loop in every order of events is in tests/core/test_keeper.py, its ends with the host in
test_parent_death.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import Orchestrator, RestartPolicy, State
from orchestrator.errors import Unavailable
from orchestrator.server import process_table
from orchestrator.server.keeper import Keeper
from orchestrator.server.link import Answer, KeeperGone, KeeperLink
from orchestrator.server.tree import CannotExecute, Channel, Door
from orchestrator.server.tree.linux import SubreaperTree
from orchestrator.server.warden import Warden
from tests.kit.process.keeping import FakeHost, FakeTree, null_file, spec_file
from tests.kit.process.support import (
    Fake,
    Make,
    StartHost,
    Watch,
    is_running,
    keeper_of,
    keepers_of,
    key_of,
    kill,
    open_files,
    until,
    until_state,
    watches,
)

LOAD = 'outcome = orch.load(a["model"])\nsend(pid=outcome.pid)\n'


def only_keeper() -> int:
    [keeper] = keepers_of(os.getpid())
    return keeper


def running(orch: Orchestrator) -> int:
    loaded = orch.status().loaded
    assert loaded is not None
    return loaded.pid


def no_keeper_of(host: int) -> bool:
    return not keepers_of(host)


# What it proves


def test_a_daemon_that_has_thrown_everything_away_ends_with_its_server(
    make: Make, fake: Fake, model_a: str, model_b: str
) -> None:
    """B86: it has left its session, closed every descriptor and cleared its environment."""
    fake.behave(children=["escaped!"])
    orch = make(kill_grace_s=0.1)
    orch.load(model_a)
    first = fake.wait_for("child").pid
    until(lambda: psutil.Process(first).environ() == {}, "the execve")
    assert process_table.row(first) is not None
    orch.load(model_b)
    assert not is_running(first)
    second = fake.wait_for("child", 2).pid
    kill(running(orch))
    until_state(orch, State.IDLE)
    assert not is_running(second)
    orch.load(model_a)
    third = fake.wait_for("child", 3).pid
    assert orch.unload().status == "unloaded"
    assert not is_running(third)
    fake.assert_no_overlap()


def test_no_process_table_is_read_while_there_is_a_keeper(
    make: Make, fake: Fake, model_a: str, model_b: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B87: it grows with every foreign process of the machine."""
    fake.behave(children=["daemon!"], loading_s=0.2, work="compute")
    orch = make(kill_grace_s=0.1, restart=RestartPolicy(limit=1, backoff_s=0.01)).start()

    def read() -> list[int]:
        pytest.fail("the process table is read")

    monkeypatch.setattr(process_table, "pids", read)
    orch.load(model_a)
    orch.load(model_b)
    with orch.lease() as server:
        kill(server.pid)
    fake.wait_for("start", 3)
    until_state(orch, State.HEALTHY)
    orch.unload()
    assert orch.load(model_a).status == "loaded"
    orch.close()
    fake.assert_no_overlap()


def test_a_signal_reaches_each_process_once(tmp_path: Path) -> None:
    """llama-server ends at once, without finishing its answers, at a second SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-c", TREE, json.dumps(sys.path), str(tmp_path / "pids")],
        stdout=subprocess.PIPE,
    ) as process:
        told, _ = process.communicate(timeout=30)
    sent, groups, pids = json.loads(told)
    assert len(pids) == 3
    assert len(groups) == 1
    reached = [pid for pid, _ in sent]
    assert len(reached) == len(set(reached)) == 1
    assert set(reached) < set(pids)


TREE = """
import json, os, signal, sys, time
sys.path[:] = json.loads(sys.argv[1])
from orchestrator.server.tree.linux import SubreaperTree
tree, sent, groups = SubreaperTree(), [], []
send, killpg = SubreaperTree._send, os.killpg
SubreaperTree._send = staticmethod(lambda pid, _, signum: sent.append([pid, signum]))
os.killpg = lambda *given: groups.append(given)
program = f"sleep 600 & setsid sleep 600 & echo > {sys.argv[2]}; wait"
null = os.open(os.devnull, os.O_RDWR)
spec = {"argv": ["/bin/sh", "-c", program], "env": {"PATH": os.environ["PATH"]}, "cwd": "/"}
leader = tree.start(spec, null, null)
def settled():
    pids = [pid for pid in tree.pids() if pid != leader]
    return len(pids) == 2 and sum(os.getpgid(pid) != leader for pid in pids) == 1
while not (os.path.exists(sys.argv[2]) and settled()):
    time.sleep(0.01)
tree.signal(signal.SIGTERM)
print(json.dumps([sent, groups, tree.pids()]))
SubreaperTree._send, os.killpg = staticmethod(send), killpg
while not tree.is_empty():
    tree.signal(signal.SIGKILL)
"""


def test_a_limit_of_processes_ends_no_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The load is refused with the kernel's words, and the next one finds the same keeper."""
    tree = object.__new__(SubreaperTree)
    monkeypatch.setattr(SubreaperTree, "is_empty", lambda _: True)

    monkeypatch.setattr(tree, "_fork", lambda: -1, raising=False)
    monkeypatch.setattr(tree, "_errno", lambda: 11, raising=False)
    pipes: list[str] = []
    make_pipe = os.pipe

    def pipe() -> tuple[int, int]:
        ends = make_pipe()
        pipes.append(os.readlink(f"/proc/self/fd/{ends[0]}"))
        return ends

    monkeypatch.setattr(os, "pipe", pipe)
    with open(os.devnull) as null, pytest.raises(CannotExecute) as found:
        tree.start({"argv": ["/bin/true"], "env": {}, "cwd": "/no/such"}, 1, null.fileno())
    assert (found.value.number, found.value.text) == (11, "Resource temporarily unavailable")
    assert pipes
    assert not {*open_files(os.getpid())} & {*pipes}


# What it costs


def test_a_keeper_is_small_and_rests(orch: Orchestrator, model_a: str) -> None:
    orch.load(model_a)
    until(watches, "the watch")  # the keeper has been told of the address before
    keeper = psutil.Process(only_keeper())
    until(lambda: keeper.status() == psutil.STATUS_SLEEPING, "its rest")
    assert keeper.memory_info().rss <= 14 << 20
    assert keeper.num_threads() == 1
    before = keeper.num_ctx_switches()
    threading.Event().wait(0.5)  # a measurement, not a rendezvous
    assert keeper.num_ctx_switches() == before


def test_a_keeper_knows_no_secret_of_its_host(
    make: Make, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It outlives the host for a moment, and needs none."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    make().load(model_a)
    told = psutil.Process(only_keeper())
    assert "HF_TOKEN" not in told.environ()
    assert "hf_secret" not in " ".join(told.cmdline())


def test_a_keeper_imports_nothing_but_the_standard_library(
    orch: Orchestrator, model_a: str
) -> None:
    orch.load(model_a)
    maps = Path(f"/proc/{only_keeper()}/maps").read_text()
    assert "site-packages" not in maps


# Its end


def test_the_end_of_a_keeper_is_the_exit_of_its_server(
    make: Make, fake: Fake, model_a: str
) -> None:
    """Also of a server that the signal of the kernel does not reach."""
    orch = make(llama_server=fake.wrapper(), kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    server = Watch(fake.wait_for("start").pid)
    first = only_keeper()
    kill(first)
    until_state(orch, State.IDLE)
    assert not is_running(pid)
    assert server.seconds_to_exit(time.monotonic()) < 5
    last_exit = orch.status().last_exit
    assert last_exit is not None
    assert (last_exit.pid, last_exit.returncode) == (pid, None)
    assert orch.load(model_a).status == "loaded"
    assert only_keeper() != first
    fake.assert_no_overlap()


def test_a_server_is_restarted_after_the_end_of_its_keeper(
    make: Make, fake: Fake, model_a: str
) -> None:
    orch = make(restart=RestartPolicy(limit=1, backoff_s=0.01))
    first = orch.load(model_a).pid
    kill(only_keeper())
    fake.wait_for("start", 2)
    until_state(orch, State.HEALTHY)
    assert running(orch) != first
    fake.assert_no_overlap()


def test_the_exit_of_one_server_is_not_told_of_the_next(
    orch: Orchestrator, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's word may come after the keeper's, which has the status."""
    handle = Warden._handle_ready

    def late(warden: Warden, fd: int) -> None:
        server = warden._server
        if server is None or fd != server.pin.fd or server.exit is not None:
            handle(warden, fd)

    monkeypatch.setattr(Warden, "_handle_ready", late)
    monkeypatch.setattr("orchestrator.server.warden._STATUS_S", 0.3)
    kill(orch.load(model_a).pid)
    until_state(orch, State.IDLE)
    second = orch.load(model_a).pid
    threading.Event().wait(0.4)  # longer than the patience of the warden
    assert orch.status().loaded is not None
    assert orch.load(model_a).pid == second


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_keeper_ends_after_its_host_not_before(
    orch: Orchestrator, model_a: str, signum: str
) -> None:
    """Ctrl-C and systemd signal every process of a program."""
    pid = orch.load(model_a).pid
    keeper = only_keeper()
    os.kill(keeper, getattr(signal, signum))
    assert orch.load(model_a, force_reload=True).pid != pid
    assert only_keeper() == keeper


@pytest.mark.parametrize("in_state", ["Idle", "Healthy"])
def test_a_stopped_keeper_is_continued(
    make: Make, fake: Fake, model_a: str, model_b: str, in_state: str
) -> None:
    orch = make().start()
    if in_state == "Healthy":
        orch.load(model_a)
    until(lambda: psutil.Process().children() == [], "the keeper's fork")
    os.kill(only_keeper(), signal.SIGSTOP)
    assert orch.load(model_b).status == "loaded"
    os.kill(only_keeper(), signal.SIGSTOP)
    kill(running(orch))
    until_state(orch, State.IDLE)
    os.kill(only_keeper(), signal.SIGSTOP)
    orch.unload()
    assert orch.status().occupied_by is None
    fake.assert_no_overlap()


@pytest.mark.parametrize("how", ["ends", "stops"])
def test_a_keeper_that_never_says_a_word_is_replaced_by_a_thread(
    make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Such as of a Python that needs PYTHONHOME."""
    code = {"ends": "raise SystemExit(3)", "stops": "import os; os.kill(os.getpid(), 19)"}[how]
    monkeypatch.setattr("orchestrator.server.link._CODE", code)
    monkeypatch.setattr("orchestrator.server.keepers.ANSWER_S", 0.5)
    monkeypatch.setattr("orchestrator.server.warden.ANSWER_S", 0.5)
    fake.behave(children=["daemon!"])
    orch = make(kill_grace_s=0.1)
    pid = orch.load(model_a).pid
    assert keepers_of(os.getpid()) == []
    assert orch.unload().status == "unloaded"
    assert not is_running(pid)
    assert fake.running() == set()
    kill(orch.load(model_a).pid)
    until_state(orch, State.IDLE)
    assert fake.running() == set()


def test_a_start_whose_keeper_has_ended_is_not_repeated(
    orch: Orchestrator, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been carried out, and then there would be two servers."""
    orch.load(model_a)
    given = KeeperLink.order

    def lost(link: KeeperLink, op: str, fds: tuple[int, ...] = (), **more: Any) -> Future[Answer]:
        answer = given(link, op, fds, **more)
        if op != "spawn" or link.pid is None:
            return answer
        fake.wait_for("start", 2)
        kill(link.pid)
        gone: Future[Answer] = Future()
        gone.set_exception(KeeperGone("the keeper has ended"))
        return gone

    with monkeypatch.context() as patch:
        patch.setattr(KeeperLink, "order", lost)
        with pytest.raises(Unavailable, match="has ended"):
            orch.load(model_a, force_reload=True)
    assert len(fake.entries("start")) == 2
    assert not fake.running()
    assert orch.load(model_a).status == "loaded"
    fake.assert_no_overlap()


# Every end of host, keeper and server

PARTIES = ("host", "keeper", "server")
ORDERS = [
    [f"{who} {signum}" for who, signum in zip(order, signals, strict=True)]
    for order in permutations(PARTIES)
    for signals in product(("SIGKILL", "SIGSTOP"), repeat=3)
]


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_whatever_ends_first_the_next_owner_has_an_empty_slot(
    host: StartHost, make: Make, fake: Fake, model_a: str, order: list[str]
) -> None:
    """Killed or stopped, in every order; the host is killed in the end."""
    fake.behave(ignore_term=-1, children=["daemon!"])
    backend = host("orch = make(kill_grace_s=600.0)\n" + LOAD + "sleep_forever()")
    pids = {"host": backend.pid, "server": backend.receive()["pid"]}
    fake.wait_for("child")
    pids["keeper"] = keeper = keeper_of(backend)
    for step in order:
        who, signum = step.split()
        if is_running(pids[who]):
            os.kill(pids[who], getattr(signal, signum))
    backend.die()
    fake.behave()
    orch = make()
    new = orch.load(model_a).pid
    assert fake.running() == {new}
    fake.assert_no_overlap()
    orch.close()
    until(lambda: not is_running(keeper), "the end of the old keeper")


def test_a_host_that_replaces_itself_leaves_no_server(host: StartHost, fake: Fake) -> None:
    """Its pid lives on, as another program."""
    backend = host(LOAD + "os.execv('/bin/sleep', ['sleep', '600'])")
    server = backend.receive()["pid"]
    until(lambda: not is_running(server), "the end of the server")
    assert is_running(backend.pid)


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.deep)])
@pytest.mark.timeout(1800)
def test_no_host_that_dies_at_any_moment_leaves_anything(
    host: StartHost, fake: Fake, make: Make, model_a: str, count: int
) -> None:
    program = "for n in range(9): orch.load(a['model'], force_reload=True); send(n=n)\n"
    fake.behave(ignore_term=-1, children=["escaped!"])
    for number in range(count):
        backend = host("orch = make(kill_grace_s=0.01)\nsend(made=True)\n" + program)
        backend.receive()
        threading.Event().wait(0.25 * ((number * 0.618) % 1))  # a moment of its life
        backend.die()
        until(partial(no_keeper_of, backend.pid), "the end of the keeper")
        assert fake.running() == set()
    fake.behave()
    assert make().load(model_a).status == "loaded"
    fake.assert_no_overlap()


# The next owner


def test_the_next_owner_has_the_server_ended_by_its_keeper_and_goes_on_with_it(
    host: StartHost, make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing need be looked for in the process table."""
    fake.behave(ignore_term=-1, children=["escaped!"])
    backend = host("orch = make(kill_grace_s=600.0)\n" + LOAD + "sleep_forever()")
    backend.receive()
    child = fake.wait_for("child").pid
    keeper = keeper_of(backend)
    os.kill(keeper, signal.SIGSTOP)  # so that it is still there
    backend.die()
    fake.behave()
    orch = make()

    def read() -> list[int]:
        pytest.fail("the process table is read")

    monkeypatch.setattr(process_table, "pids", read)
    orch.start()
    assert not is_running(child)
    assert fake.running() == set()
    assert orch.load(model_a).status == "loaded"
    [loaded] = fake.running()
    assert psutil.Process(loaded).ppid() == keeper
    orch.close()
    until(lambda: not is_running(keeper), "the end of the keeper")
    fake.assert_no_overlap()


class Talking(FakeTree):
    """A tree whose server prints what the test writes."""

    def start(self, spec: dict[str, Any], output: int, lock: int) -> int:
        self.output = os.dup(output)
        return super().start(spec, output, lock)


class Known(FakeHost):
    def is_owner(self, pid: int) -> bool:
        return pid == os.getpid()


def test_the_next_owner_gets_the_output_that_no_host_has_read(tmp_path: Path) -> None:
    """A full pipe would stop the server, and its last words may say why its host has died."""
    path = str(tmp_path / "keeper.sock")
    door, (ours, theirs), tree, host = Door.at(path), Channel.pair(), Talking(), Known()
    keeper = Keeper(Channel(theirs), tree, host, door=door)

    def turn() -> None:
        keeper.turn([fd for fd, _ in keeper.poll.poll(0)])

    with spec_file() as spec, null_file() as lock, null_file() as owner:
        ours.send({"op": "spawn", "id": 1}, (spec, lock, owner))
    turn()
    host.is_dead, tree.is_deaf = True, True
    turn()
    for number in range(40):
        os.write(tree.output, b"x" * 9999 + b"%d\n" % number)
        turn()
    next_owner = KeeperLink(Channel.to(path), None)
    turn()
    assert next_owner.wait(lambda: next_owner.pid is not None)
    assert next_owner.unread.endswith(b"x39\n")
    assert len(next_owner.unread) == 1 << 18
    os.close(tree.output)
    next_owner._channel.close()
    ours.close()
    assert keeper.channel is not None
    keeper.channel.close()
    keeper.close()
    assert door is not None
    door.close()


def test_a_keeper_works_for_the_owner_of_the_slot_only(
    orch: Orchestrator, model_a: str, state_dir: Path
) -> None:
    pid = orch.load(model_a).pid
    stranger = Channel.to(str(state_dir / "default/keeper.sock"))
    with contextlib.suppress(BrokenPipeError):  # it has been closed by now
        stranger.send({"op": "kill", "id": 1, "grace_s": 0.0})
    while (answer := stranger.receive()) == []:
        pass
    assert answer is None
    stranger.close()
    assert orch.load(model_a).pid == pid


def test_the_key_of_a_server_reaches_no_disk(
    orch: Orchestrator, model_a: str, monkeypatch: pytest.MonkeyPatch, state_dir: Path
) -> None:
    """The keeper is handed the server's environment as a file."""
    orch.start()

    def refused() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    server = orch.load(model_a)
    key = key_of(server.pid)["Authorization"].removeprefix("Bearer ").encode()
    for path in (state_dir / "default").iterdir():
        assert not path.is_file() or key not in path.read_bytes()


def test_the_next_owner_finds_a_keeper_whatever_the_length_of_its_path(
    make: Make, tmp_path: Path, model_a: str
) -> None:
    """The kernel takes 107 bytes of a socket's path."""
    folder = tmp_path / ("x" * 120)
    orch = make(state_dir=folder, on_host_exit="keep")
    pid = orch.load(model_a).pid
    orch.close()
    assert (folder / "default/keeper.sock").is_socket()
    orch.start()
    assert running(orch) == pid


def test_no_descriptor_is_lost_by_keeping_and_adopting(make: Make, model_a: str) -> None:
    orch = make(on_host_exit="keep")

    def live() -> None:
        pid = orch.start().load(model_a).pid
        orch.close()
        orch.start()
        assert running(orch) == pid
        orch.close(keep=False)

    live()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        live()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the end of all descriptors")


def test_a_keeper_does_without_a_socket_where_none_can_be(
    make: Make, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept, and nothing is left."""
    monkeypatch.setattr(Door, "at", lambda _: None)
    orch = make(on_host_exit="keep")
    pid = orch.load(model_a).pid
    orch.close()
    assert not is_running(pid)


# Messages


def test_messages_arrive_whole_also_where_there_are_no_packets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """macOS has no SOCK_SEQPACKET for UNIX sockets: there a line is a message."""
    monkeypatch.setattr("orchestrator.server.tree.unix_channel._TYPE", socket.SOCK_STREAM)
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    with open(os.devnull) as null:
        ours.send({"op": "one"}, (null.fileno(),))
        ours.send({"op": "two", "text": "x" * 5000})
    received: list[Any] = []
    while len(received) < 2:
        received += other.receive() or []
    assert [message["op"] for message, _ in received] == ["one", "two"]
    assert [len(fds) for _, fds in received] == [1, 0]
    fd = received[0][1][0]
    assert os.get_inheritable(fd) is False
    os.close(fd)
    ours.close()
    assert other.receive() is None
    other.close()
