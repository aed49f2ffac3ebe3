"""The slot: its owner, when it is empty, what a record proves, and which processes are left alone.

There is no orchestrator here, only a `Slot` and ordinary processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import InvalidRequest, SlotOwned, StateDirError
from orchestrator.server import ladder, process_table
from orchestrator.server.eviction import reap
from orchestrator.server.pin import Pin
from orchestrator.server.process_table import ProcessId
from orchestrator.server.slot import TOKEN_NAME, Slot
from tests.kit.process.support import in_a_fork, is_running, kill, reaped, until
from tests.kit.sentences import assert_sentence

Sleeper = subprocess.Popen[bytes]
Sleep = Callable[..., Sleeper]
_PYTHON = (sys.executable, "-I", "-S", "-c")
_SLEEP = [*_PYTHON, "import time; print(flush=True); time.sleep(600)"]
_DEAF = [*_PYTHON, "import signal, time; signal.signal(15, signal.SIG_IGN)\n" + _SLEEP[-1]]


@pytest.fixture
def sleep() -> Iterator[Sleep]:
    """Start processes that sleep, each in a session of its own, as a server is."""
    started: list[Sleeper] = []

    def start(
        command: list[str] = _SLEEP, *, start_new_session: bool = True, **popen: Any
    ) -> Sleeper:
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, start_new_session=start_new_session, **popen
            )
        )
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == b"\n"
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def mine(state_dir: Path) -> Iterator[Slot]:
    claimed = Slot("mine", state_dir)
    claimed.claim()
    yield claimed
    claimed.release()


def environment(of: Slot) -> dict[str, str]:
    name, _, value = of.token.partition("=")
    return {name: value}


def identity(process: Sleeper) -> ProcessId:
    found = process_table.identify(process.pid)
    assert found is not None
    return found


@contextlib.contextmanager
def next_owner(of: Slot) -> Iterator[Slot]:
    """End the claim, as the end of its process would, and claim the slot anew."""
    of.release()
    heir = Slot(of.name, of.directory.parent)
    heir.claim()
    yield heir
    heir.release()


# Ownership


def test_a_second_claim_is_refused_and_names_the_owner(mine: Slot, state_dir: Path) -> None:
    """Also within one process."""
    with pytest.raises(SlotOwned) as refused:
        Slot("mine", state_dir).claim()
    assert_sentence("slot.owned_here", refused.value.message)
    assert refused.value.field == "slot"
    mine.release()
    again = Slot("mine", state_dir)
    again.claim()
    again.release()


def test_a_claim_ends_with_its_process(state_dir: Path) -> None:
    """The kernel releases the lock, however the process ended."""
    program = (
        "import sys; sys.path[:] = sys.argv[2:]\n"
        "from orchestrator.server.slot import Slot\n"
        "Slot('s', sys.argv[1]).claim(); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(state_dir), *sys.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        with pytest.raises(SlotOwned, match=rf"process {other.pid}\b"):
            Slot("s", state_dir).claim()
        other.kill()
        other.wait()
        heir = Slot("s", state_dir)
        heir.claim()
        heir.release()


def test_a_forked_worker_neither_owns_nor_keeps_the_slot(mine: Slot, state_dir: Path) -> None:
    """The workers of a pre-fork server outlive their parent."""
    lock, fd = mine.take_lock()
    assert lock.is_empty
    assert fd is not None
    with reaped(in_a_fork(lambda: None)):
        os.close(fd)
        again, fd = mine.take_lock()
        assert again.is_empty, again.reason
        assert fd is not None
        os.close(fd)
        mine.release()
        heir = Slot("mine", state_dir)
        heir.claim()
        heir.release()


def test_a_release_in_a_fork_keeps_the_parents_claim(mine: Slot, state_dir: Path) -> None:
    """A worker runs the exit handlers it inherited."""
    with reaped(in_a_fork(mine.release)), pytest.raises(SlotOwned):
        Slot("mine", state_dir).claim()


def test_a_claim_waits_for_the_keeper_of_a_dead_owner(state_dir: Path) -> None:
    """A restarted host must not be refused while the keeper empties its slot."""
    after = Slot("s", state_dir)
    dead = subprocess.Popen(["true"])
    after.owner_path.write_text(json.dumps(asdict(identity(dead))))
    dead.wait()
    with after.owner_path.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        claiming = threading.Thread(target=after.claim)
        claiming.start()
        claiming.join(0.1)
        assert claiming.is_alive()
    claiming.join(10)
    assert not claiming.is_alive()
    assert json.loads(after.owner_path.read_text())["pid"] == os.getpid()
    after.release()


def test_slots_of_one_directory_are_independent(mine: Slot, state_dir: Path, sleep: Sleep) -> None:
    """One name may be the beginning of another."""
    other = Slot("mine2", state_dir)
    other.claim()
    _, fd = other.take_lock()
    assert fd is not None
    process = sleep(env=environment(other), pass_fds=(fd,))
    os.close(fd)
    assert mine.inhabitants() == set()
    assert reap(mine)[0] == set()
    assert not other.take_lock()[0].is_empty
    assert other.inhabitants() == {identity(process)}
    assert reap(other)[0] == {process.pid}
    assert process.wait() == -signal.SIGTERM
    other.release()


# Emptiness


def test_the_slot_is_empty_once_the_last_holder_of_its_lock_is_dead(
    mine: Slot, sleep: Sleep
) -> None:
    """This holds for processes that are not on record, too."""
    _, fd = mine.take_lock()
    assert fd is not None
    held = mine.take_lock()
    assert (held[0].is_empty, held[1]) == (False, None)
    process = sleep(pass_fds=(fd,))
    os.close(fd)
    evidence, none = mine.take_lock()
    assert (evidence.is_empty, none) == (False, None)
    assert "lock" in evidence.reason
    process.kill()
    process.wait()
    evidence, fd = mine.take_lock()
    assert evidence.is_empty
    assert fd is not None
    os.close(fd)


def test_the_slot_is_not_empty_while_a_recorded_process_lives(mine: Slot, sleep: Sleep) -> None:
    """A server that closes its descriptors releases the lock, but not its memory."""
    process = sleep()
    mine.remember(identity(process))
    evidence, none = mine.take_lock()
    assert (evidence.is_empty, none) == (False, None)
    assert str(process.pid) in evidence.reason
    process.kill()
    process.wait()
    evidence, fd = mine.take_lock()
    assert evidence.is_empty
    assert fd is not None
    os.close(fd)


def test_a_zombie_is_not_alive(mine: Slot, sleep: Sleep) -> None:
    """It holds neither memory nor a port, and only its parent can reap it."""
    process = sleep()
    who = identity(process)
    assert process_table.is_alive(who)
    process.kill()
    until(lambda: not process_table.is_alive(who), "the zombie")
    assert process_table.row(process.pid) is not None
    assert Pin.of(who) is None


def test_a_process_whose_main_thread_has_ended_is_alive(mine: Slot, sleep: Sleep) -> None:
    """The process table shows it as a zombie, but its other threads are running."""
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print(flush=True)\n"
        "exit_thread = {'x86_64': 60, 'aarch64': 93}[__import__('os').uname().machine]\n"
        "ctypes.CDLL(None).syscall(exit_thread, 0)"
    )
    process = sleep([sys.executable, "-c", program])
    mine.remember(identity(process))
    status = psutil.Process(process.pid).status
    until(lambda: status() == psutil.STATUS_ZOMBIE, "the end of its main thread")
    assert process_table.is_alive(identity(process))
    assert mine.inhabitants() == {identity(process)}
    assert reap(mine)[0] == {process.pid}
    assert process.wait() == -signal.SIGTERM


def test_inhabitants_are_found_by_record_token_group_and_descent(mine: Slot, sleep: Sleep) -> None:
    """A process with the same command line is not one."""
    by_token = sleep(env=environment(mine))
    by_record = sleep()
    mine.remember(identity(by_record))
    leader = sleep()
    parent = sleep(["sh", "-c", "env -i setsid sleep 600 & echo; wait"])
    mine.remember(identity(parent))
    sleep()  # the same command line as three of them
    [child] = until(lambda: process_table.descendants({parent.pid}), "a child")
    until(lambda: os.getsid(child) == child, "its own session")
    found = {process.pid for process in mine.inhabitants(leader.pid)}
    assert found == {by_token.pid, by_record.pid, leader.pid, parent.pid, child}
    assert mine.inhabitants() == {p for p in mine.inhabitants(leader.pid) if p.pid != leader.pid}
    kill(child)


def test_processes_of_our_own_session_are_never_inhabitants(mine: Slot, sleep: Sleep) -> None:
    """No descendant of a server can join our session, so these are workers of the host."""
    _, fd = mine.take_lock()
    assert fd is not None
    worker = sleep(env=environment(mine), pass_fds=(fd,), start_new_session=False)
    os.close(fd)
    mine.remember(identity(worker))
    assert mine.inhabitants(worker.pid) == set()
    assert mine.lock_holders() == set()
    assert not mine.take_lock()[0].is_empty


def test_own_process_and_ancestors_are_never_inhabitants(
    mine: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that named the user's session once ended it (pid 1, signalled as a group)."""
    me = process_table.identify(os.getpid())
    parent = process_table.identify(os.getppid())
    init = process_table.identify(1)
    assert me
    assert parent
    assert init
    monkeypatch.setattr(mine, "_known", {me, parent, init})
    found = mine.inhabitants(os.getsid(0))
    assert not {p.pid for p in found} & {0, 1, os.getpid(), os.getppid()}
    assert Pin.of(me) is None
    assert Pin.of(init) is None
    assert Pin.of(ProcessId(0, 0, process_table.boot_id())) is None


def test_the_same_path_in_a_container_is_another_slot(mine: Slot, sleep: Sleep) -> None:
    """The host sees the processes of its containers; here one with a mount namespace of its own."""
    name, _, value = mine.token.partition("=")
    earlier = {name: value.rpartition(":")[0] + ":1"}  # a folder that was at this path
    inside = sleep(["unshare", "--mount", *_SLEEP], env={"PATH": os.environ["PATH"], **earlier})
    beside = sleep(env={**earlier, name + "_": value})
    longer = sleep(env={name: f"{value}/x:1:2"})
    assert mine.inhabitants() == {identity(beside)}
    assert inside.poll() is longer.poll() is None


# The record


def test_a_record_is_written_read_and_removed(mine: Slot, state_dir: Path) -> None:
    """Before the server exists, so that nothing is started which cannot be recorded."""
    assert mine.recall() is None
    mine.remember(None)
    assert mine.recall() is None
    assert mine.record_path.exists()
    server = ProcessId(4242, 17, process_table.boot_id())
    mine.remember(server)
    assert Slot("mine", state_dir).recall() == server
    names = [path.name for path in sorted(mine.directory.iterdir())]
    assert names == ["owner.lock", "server.json", "server.lock"]
    mine.forget()
    mine.forget()
    assert mine.recall() is None


GOOD = {"pid": 4242, "start_ticks": 17, "boot_id": "b"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "{}",
        b"\xff\xfe".decode("latin-1"),
        json.dumps({"version": 1, "host": GOOD}),
        json.dumps({"version": 2, "host": GOOD, "server": GOOD}),
        json.dumps({"version": 1, "host": GOOD, "server": []}),
        json.dumps({"version": 1, "host": GOOD, "server": {**GOOD, "more": 1}}),
        *(
            json.dumps({"version": 1, "host": GOOD, "server": {**GOOD, "pid": pid}})
            for pid in (0, 1, -1, -4242, True, 1.5, "4242", None, 10**30)
        ),
        json.dumps({"version": 1, "host": GOOD, "server": {**GOOD, "start_ticks": "17"}}),
        json.dumps({"version": 1, "host": GOOD, "server": {**GOOD, "boot_id": 5}}),
        json.dumps({"version": 1, "host": {**GOOD, "pid": 0}, "server": GOOD}),
        json.dumps({"version": 1, "host": GOOD, "server": GOOD}) + "}",
        "[" * 100_000,
    ],
)
def test_an_invalid_record_is_ignored(mine: Slot, text: str) -> None:
    """A corrupt or foreign record must neither name a process to signal nor prevent a start."""
    mine.record_path.write_text(text, encoding="latin-1")
    assert mine.recall() is None
    signalled, evidence = reap(mine)
    assert signalled == set()
    assert evidence.is_empty
    assert not mine.record_path.exists()


def test_an_unreadable_record_is_ignored(mine: Slot) -> None:
    """Here it is a folder."""
    mine.record_path.mkdir()
    assert mine.recall() is None
    assert reap(mine)[0] == set()
    with pytest.raises(StateDirError) as refused:
        mine.remember(None)
    assert refused.value.field == "state_dir"


# Reaping at a later start


def test_leftover_processes_are_reaped_by_lock_token_and_record(mine: Slot, sleep: Sleep) -> None:
    """Each has only one of the three; SIGKILL follows for the one that ignores SIGTERM."""
    _, fd = mine.take_lock()
    assert fd is not None
    by_lock = sleep(env={}, pass_fds=(fd,))
    os.close(fd)
    by_token = sleep(_DEAF, env=environment(mine))
    by_record = sleep(env={})
    stopped = sleep(env=environment(mine))
    stopped.send_signal(signal.SIGSTOP)
    mine.remember(identity(by_record))
    stranger = sleep(env={})
    with next_owner(mine) as heir:
        signalled, evidence = reap(heir)
    assert evidence.is_empty
    assert signalled == {p.pid for p in (by_lock, by_token, by_record, stopped)}
    assert by_token.wait() == -signal.SIGKILL
    assert [p.wait() for p in (by_record, stopped)] == [-signal.SIGTERM] * 2
    assert by_lock.wait() in (-signal.SIGTERM, -signal.SIGKILL)  # looked for last
    assert stranger.poll() is None
    assert mine.recall() is None


def test_the_descendants_of_a_recorded_server_are_reaped(mine: Slot, sleep: Sleep) -> None:
    """They carry no token and hold no lock."""
    server = sleep(
        ["sh", "-c", "env -i sleep 600 & env -i setsid sleep 600 & echo; wait"],
        env={"PATH": os.environ["PATH"]},
    )
    mine.remember(identity(server))
    until(lambda: len(process_table.descendants({server.pid})) == 2, "two children")
    family = process_table.descendants({server.pid})
    signalled, _ = reap(mine)
    assert signalled == family | {server.pid}
    assert not any(map(is_running, family))


@pytest.fixture
def short_reap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "LEFT_GRACE_S", 0.05)
    monkeypatch.setattr(ladder, "_GONE_BASE_S", 0.1)


@pytest.mark.parametrize(
    "change", [{"start_ticks": 1}, {"boot_id": "another"}], ids=["pid reused", "rebooted"]
)
def test_a_process_that_reuses_a_recorded_pid_is_not_signalled(
    mine: Slot, sleep: Sleep, change: dict[str, Any]
) -> None:
    """Nor is its process group."""
    stranger = sleep()
    mine.remember(ProcessId(**(asdict(identity(stranger)) | change)))
    with next_owner(mine) as heir:
        signalled, evidence = reap(heir)
    assert signalled == set()
    assert evidence.is_empty
    assert stranger.poll() is None


@pytest.mark.usefixtures("short_reap")
def test_a_lock_of_an_unknown_holder_keeps_the_slot_occupied(mine: Slot) -> None:
    """The holder may be another user's process."""
    _, fd = mine.take_lock()
    assert fd is not None
    signalled, evidence = reap(mine)
    assert signalled == set()
    assert_sentence("slot.held_by_unknown", evidence.reason)
    assert not evidence.is_empty
    os.close(fd)
    assert reap(mine)[1].is_empty


@pytest.mark.usefixtures("short_reap")
def test_a_process_that_survives_sigkill_keeps_the_slot_occupied(
    mine: Slot, sleep: Sleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next start would run beside it."""
    process = sleep(env=environment(mine))
    with monkeypatch.context() as patch:
        patch.setattr(Pin, "signal", lambda *_: None)
        signalled, evidence = reap(mine)
    assert signalled == {process.pid}
    assert not evidence.is_empty
    assert_sentence("slot.survivors", evidence.reason, pid=process.pid)
    assert process.poll() is None
    assert reap(mine)[1].is_empty


# Names and directories


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\n", "a\0", "é", "x" * 65])
def test_an_invalid_slot_name_is_refused_and_creates_nothing(state_dir: Path, name: str) -> None:
    """The name becomes the name of a folder."""
    with pytest.raises(InvalidRequest) as refused:
        Slot(name, state_dir)
    assert_sentence("slot.name", refused.value.message, given=repr(name))
    assert refused.value.field == "slot"
    assert list(state_dir.iterdir()) == []


def test_a_valid_slot_name_is_accepted(state_dir: Path) -> None:

    for name in ("a", "0", "A-b_c.d", "x" * 64):
        assert Slot(name, state_dir).directory == state_dir / name


@pytest.mark.parametrize(
    "where",
    [
        "missing/parent/state",
        "file",
        "file/state",
        "loop",
        "loop/state",
        "/proc/state",
        "/proc/self/state",
        "/dev/null",
        "nul\0byte",
        "x" * 300,
        "",
    ],
)
def test_an_unusable_state_directory_is_refused(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("here")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StateDirError, match="state_dir") as refused:
        Slot("s", where and tmp_path / where)
    assert refused.value.field == "state_dir"
    assert sorted(tmp_path.iterdir()) == before


def test_a_state_directory_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateDirError) as refused:
        Slot("s", 5)  # type: ignore[arg-type]
    assert_sentence("slot.state_dir", refused.value.message)
    assert refused.value.field == "state_dir"


def test_a_state_directory_is_created_where_its_parent_exists(tmp_path: Path) -> None:
    """And it is private, because records and templates are."""
    made = Slot("s", tmp_path / "new")
    assert made.directory == tmp_path / "new" / "s"
    assert [p.stat().st_mode & 0o777 for p in (made.directory, made.directory.parent)] == [
        0o700
    ] * 2


def test_the_default_state_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order: our own variable, XDG's, the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("LLAMA_ORCHESTRATOR_STATE_DIR", raising=False)
    at_home = tmp_path / "home/.local/state/llama-orchestrator"
    assert Slot().directory == at_home / "default"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert Slot().directory == tmp_path / "xdg/llama-orchestrator/default"
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_STATE_DIR", str(tmp_path / "named/deep"))
    assert Slot().directory == tmp_path / "named/deep/default"


def test_a_relative_state_directory_is_resolved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the working directory must not move the slot."""
    monkeypatch.chdir(tmp_path)
    made = Slot("s", "state")
    monkeypatch.chdir("/")
    assert made.directory == tmp_path / "state" / "s"
    made.claim()
    made.release()


def test_a_state_directory_with_a_name_that_is_not_utf8_works(tmp_path: Path, sleep: Sleep) -> None:
    """The token, which contains the path, must still be found in the environment."""
    odd = Slot("s", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.claim()
    process = sleep(env=environment(odd))
    assert odd.inhabitants() == {identity(process)}
    odd.remember(identity(process))
    assert reap(odd)[0] == {process.pid}
    odd.release()


def test_the_token_is_an_environment_variable(mine: Slot) -> None:
    """With the folder in it, for a person who looks at the process."""
    assert mine.token.startswith(f"{TOKEN_NAME}={mine.directory}")
