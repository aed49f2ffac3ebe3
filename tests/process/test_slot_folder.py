"""The folder of a slot, or a lock in it, is removed or replaced while the slot is in use.

A lock file proves nothing about another file at its path (B84): there were two servers of one slot,
or a slot that could never be unloaded again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import Orchestrator, SlotOccupied, SlotOwned, State
from orchestrator.models.source import ModelSource
from orchestrator.runtime.parts import Parts
from orchestrator.server import process_table, slot, slot_name
from orchestrator.server.slot import Slot
from orchestrator.settings.files import ModelFiles
from tests.kit.process.support import (
    Background,
    Fake,
    Make,
    StartHost,
    Watch,
    abandon,
    in_a_fork,
    is_running,
    kill,
    reaped,
    until,
    until_state,
)
from tests.kit.sentences import assert_sentence

LOAD = 'outcome = orch.load(a["model"])\nsend(pid=outcome.pid)\n'
TRY = """
from orchestrator import SlotOwned
try:
    orch.load(a["model"])
    send(owned=None)
except SlotOwned as error:
    send(owned=error.message)
"""


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()


def replace_file(path: Path) -> None:
    path.unlink()
    path.touch()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "folder removed": shutil.rmtree,
    "folder replaced": replace_folder,
    "state folder removed": lambda folder: shutil.rmtree(folder.parent),
    "server lock removed": lambda folder: (folder / "server.lock").unlink(),
    "server lock replaced": lambda folder: replace_file(folder / "server.lock"),
    "owner lock removed": lambda folder: (folder / "owner.lock").unlink(),
    "owner lock replaced": lambda folder: replace_file(folder / "owner.lock"),
}


@pytest.fixture(params=DAMAGES)
def damage(request: pytest.FixtureRequest, state_dir: Path) -> Callable[[], None]:
    return lambda: DAMAGES[request.param](state_dir / "default")


def test_a_damaged_folder_costs_neither_the_unload_nor_the_next_load(
    make: Make,
    host: StartHost,
    fake: Fake,
    model_a: str,
    model_b: str,
    damage: Callable[[], None],
) -> None:
    """And no second owner gets in between, neither in this process nor in another one."""
    fake.behave(children=["group", "setsid!"])
    orch = make(kill_grace_s=0.1)
    first = Watch(orch.load(model_a).pid)
    damage()
    with pytest.raises(SlotOwned):
        make().load(model_b)
    assert f"process {os.getpid()}" in host(TRY).receive()["owned"]
    assert orch.status().state is State.HEALTHY
    assert orch.unload().status == "unloaded"
    assert fake.running() == set()
    first.seconds_to_exit(0)
    assert orch.load(model_b).status == "loaded"
    assert f"process {os.getpid()}" in host(TRY).receive()["owned"]
    assert len(fake.entries("start")) == 2
    orch.unload()
    fake.assert_no_overlap()


def test_a_load_over_a_damaged_folder_swaps_the_models(
    orch: Orchestrator, fake: Fake, model_a: str, model_b: str, damage: Callable[[], None]
) -> None:
    """The next damage meets the files that were made anew."""
    orch.load(model_a)
    damage()
    assert orch.load(model_b).status == "loaded"
    with contextlib.suppress(OSError):  # the folder that it moved is there already
        damage()
    assert orch.load(model_a).status == "loaded"
    assert orch.unload().status == "unloaded"
    fake.assert_no_overlap()


def test_folder_removed_while_a_server_is_being_killed(
    make: Make, fake: Fake, model_a: str, model_b: str, damage: Callable[[], None]
) -> None:

    fake.behave(ignore_term=-1, children=["setsid!"])
    orch = make(kill_grace_s=0.1)
    orch.load(model_a)
    loading = Background(orch.load, model_b)
    until_state(orch, State.KILLING)
    damage()
    assert loading.result().status == "loaded"
    assert orch.unload().status == "unloaded"
    fake.assert_no_overlap()


class Gated(ModelSource):
    """Fetches once the test says so."""

    fetching = threading.Event()
    go_on = threading.Event()

    def fetch(self, *args: Any, **known: Any) -> ModelFiles:
        self.fetching.set()
        assert self.go_on.wait(30)
        return super().fetch(*args, **known)


def test_folder_removed_while_a_model_is_being_fetched(
    make: Make, fake: Fake, model_a: str, damage: Callable[[], None]
) -> None:
    """The chat template is written into the folder right after this."""
    Gated.fetching.clear()
    Gated.go_on.clear()
    orch = make(parts=Parts(source=Gated))
    loading = Background(orch.load, model_a, chat_template_override="{{ messages }}")
    assert Gated.fetching.wait(30)
    damage()
    Gated.go_on.set()
    assert loading.result().status == "loaded"
    assert len(fake.running()) == 1


def test_a_folder_that_cannot_be_made_anew_prevents_a_load_but_no_unload(
    orch: Orchestrator, fake: Fake, model_a: str, state_dir: Path
) -> None:
    """Here a file has taken its place."""
    orch.load(model_a)
    shutil.rmtree(state_dir / "default")
    (state_dir / "default").write_text("a file")
    assert orch.unload().status == "unloaded"
    assert fake.running() == set()
    with pytest.raises(SlotOccupied) as refused:
        orch.load(model_a)
    assert str(state_dir / "default") in refused.value.message
    assert len(fake.entries("start")) == 1
    (state_dir / "default").unlink()
    assert orch.load(model_a).status == "loaded"


@pytest.mark.parametrize("keeper_dies", [False, True], ids=["keeper", "next owner"])
def test_a_dead_owners_server_is_found_without_its_folder(
    host: StartHost,
    orch: Orchestrator,
    fake: Fake,
    model_a: str,
    damage: Callable[[], None],
    keeper_dies: bool,
) -> None:
    """By its token, which names the folder that was there before."""
    backend = host(LOAD + "sleep_forever()", server=fake.wrapper())
    backend.receive()
    server = Watch(fake.wait_for("start").pid)
    damage()
    if keeper_dies:
        abandon(backend)
        assert is_running(server.pid)
    else:
        assert server.seconds_to_exit(backend.die()) < 1
    assert orch.load(model_a).status == "loaded"
    loaded = orch.status().loaded
    assert loaded is not None
    assert fake.running() == {loaded.pid}
    orch.unload()
    fake.assert_no_overlap()


def test_an_owner_in_another_network_namespace_is_kept_out_by_the_folder_only(
    orch: Orchestrator, host: StartHost, fake: Fake, model_a: str, state_dir: Path
) -> None:
    """Without the folder it takes over: it ends our server, and we start nothing beside it."""
    inside = ("unshare", "--net")
    orch.load(model_a)
    assert f"process {os.getpid()}" in host(TRY, inside=inside).receive()["owned"]
    shutil.rmtree(state_dir / "default")
    other = host("send(status=orch.unload().status)\nsleep_forever()", inside=inside)
    assert other.receive() == {"status": "unloaded"}
    assert fake.running() == set()
    until_state(orch, State.IDLE)
    with pytest.raises(SlotOccupied, match=rf"process {other.pid}\b"):
        orch.load(model_a)
    assert orch.unload().status == "unloaded"
    assert len(fake.entries("start")) == 1


def test_a_lock_replaced_in_the_step_that_takes_it_is_not_handed_out(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would inherit a lock that nobody looks at."""
    mine = Slot("s", state_dir)
    mine.claim()
    take = slot._try_lock

    def replaced(path: Path) -> int | None:
        replace_file(path)
        return take(path)

    with monkeypatch.context() as patch:
        patch.setattr(slot, "_try_lock", replaced)
        evidence, fd = mine.take_lock()
        assert (evidence.is_empty, fd) == (False, None)
    evidence, fd = mine.take_lock()
    assert evidence.is_empty
    assert fd is not None
    os.close(fd)
    mine.release()


# Who the owner is


def claim_in(state_dir: Path, *, start_new_session: bool) -> subprocess.Popen[bytes]:
    """Start a process that claims the slot `s` and waits."""
    program = (
        "import sys; sys.path[:] = sys.argv[2:]\n"
        "from orchestrator.server.slot import Slot\n"
        "Slot('s', sys.argv[1]).claim(); print(flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(state_dir), *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=start_new_session,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


@pytest.mark.parametrize("is_removed", [False, True], ids=["folder", "no folder"])
@pytest.mark.parametrize("key", ["slot.owned", "slot.owned_by_worker"])
def test_the_refusal_says_which_process_the_owner_is(
    state_dir: Path, key: str, is_removed: bool
) -> None:
    """Workers of one program share its process group, and are told so."""
    with claim_in(state_dir, start_new_session=key == "slot.owned") as owner:
        if is_removed:
            shutil.rmtree(state_dir / "s")
        with pytest.raises(SlotOwned) as refused:
            Slot("s", state_dir).claim()
        assert_sentence(key, refused.value.message, pid=owner.pid)
        assert refused.value.field == "slot"
        owner.kill()


def test_the_refusal_says_that_this_process_is_the_owner(state_dir: Path) -> None:
    mine = Slot("mine", state_dir)
    mine.claim()
    shutil.rmtree(mine.directory)
    with pytest.raises(SlotOwned) as refused:
        Slot("mine", state_dir).claim()
    assert_sentence("slot.owned_here", refused.value.message)
    mine.release()
    again = Slot("mine", state_dir)
    again.claim()
    again.release()


@pytest.mark.parametrize("held", ["owner.lock", "name"])
def test_a_copy_that_outlives_its_owner_is_reported(
    state_dir: Path, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork by other means than `os.fork` keeps descriptors. The owner is dead: here, reaped."""
    monkeypatch.setattr(slot, "_SUCCESSION_S", 0.05)
    wanted = Slot("s", state_dir)
    program = (
        "import fcntl, os, socket, sys, time\n"
        "name = socket.socket(socket.AF_UNIX)\n"
        "if sys.argv[2] == 'name': name.bind(bytes.fromhex(sys.argv[3])); name.listen()\n"
        "else: fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)\n"
        "if os.fork(): os._exit(0)\n"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    arguments = (str(wanted.owner_path), held, slot_name._address(wanted.directory).hex())
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        copy = int(owner.stdout.readline())
        owner.wait()
        with pytest.raises(SlotOwned) as refused:
            wanted.claim()
        assert_sentence("slot.owned_by_fork", refused.value.message)
        kill(copy)
        until(lambda: not is_running(copy), "the end of the copy")
    wanted.claim()
    wanted.release()


# The name


def test_a_fork_gives_up_the_name_without_the_folder(state_dir: Path) -> None:
    """A worker that outlives its parent must not keep the slot."""
    mine = Slot("s", state_dir)
    mine.claim()
    replace_folder(mine.directory)
    with reaped(in_a_fork(lambda: None)):
        mine.release()
        heir = Slot("s", state_dir)
        heir.claim()
        heir.release()


def test_another_user_cannot_keep_the_name_from_us(state_dir: Path) -> None:
    """Anybody may take any abstract name, so the kernel is asked whose it is."""
    wanted = Slot("s", state_dir)
    program = (
        "import os, socket, sys\n"
        "os.setuid(54321)\n"
        "name = socket.socket(socket.AF_UNIX)\n"
        "name.bind(bytes.fromhex(sys.argv[1])); name.listen()\n"
        "print(flush=True); input()"
    )
    address = slot_name._address(wanted.directory).hex()
    with subprocess.Popen(
        [sys.executable, "-c", program, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"\n"
        assert slot_name.holder(wanted.directory) == squatter.pid
        wanted.claim()
        wanted.release()
        squatter.kill()


def test_slots_of_other_folders_and_roots_have_other_names(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers may share a network, and have different folders at one path."""
    here = slot_name._address(state_dir / "s")
    assert here != slot_name._address(state_dir / "t")
    monkeypatch.setattr(process_table, "place", lambda _: (1, 2, 3))
    assert here != slot_name._address(state_dir / "s")
    assert len(here) < 108  # sun_path, unix(7)


@pytest.mark.parametrize("lack", ["no such names", "forbidden"])
def test_a_slot_is_claimed_by_its_lock_where_there_are_no_names(
    state_dir: Path, lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def forbidden(*_: object) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    if lack == "forbidden":
        monkeypatch.setattr(socket, "socket", forbidden)
    else:
        monkeypatch.setattr(slot_name, "sys", SimpleNamespace(platform="freebsd"))
    assert slot_name.bind(state_dir / "s") is None
    monkeypatch.setattr(process_table, "LINUX", True)
    mine = Slot("s", state_dir)
    mine.claim()
    with pytest.raises(SlotOwned):
        Slot("s", state_dir).claim()
    mine.release()
