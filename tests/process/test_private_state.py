"""A state folder that other users have made, may write, or have put links into (B109).

They could choose which file a template replaces, which process is killed as an old server, and
which server is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator import StateDirError
from orchestrator.base.private_file import read_file, replace_file, write_json
from orchestrator.models.hub.records import Records
from orchestrator.server import process_table
from orchestrator.server.slot import Slot
from tests.kit.process.support import Fake, StartHost, Watch
from tests.kit.sentences import assert_sentence


def refused(state_dir: Path) -> StateDirError:
    with pytest.raises(StateDirError) as error:
        Slot("s", state_dir).claim()
    assert error.value.field == "state_dir"
    return error.value


@pytest.fixture
def as_other(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make this process somebody who has made nothing of what is there."""
    return lambda: monkeypatch.setattr(os, "geteuid", lambda: 4242)


def test_a_folder_of_another_user_is_refused(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the folder that holds those of the slots may be root's, as volumes of containers are."""
    Slot("s", state_dir)
    mine = state_dir.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    error = refused(state_dir)
    values = {"path": error.message.partition(" belongs")[0], "owner": f"user {mine},"}
    assert_sentence("slot.foreign", error.message, **values)
    if mine == 0:
        assert values["path"] == str(state_dir / "s")


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_a_folder_that_every_user_may_write_is_refused(state_dir: Path, mode: int) -> None:
    state_dir.chmod(mode)
    assert_sentence("slot.everyone", refused(state_dir).message, path=state_dir)


@pytest.mark.parametrize("mode", [0o1777, 0o775, 0o755])
def test_a_folder_in_which_nobody_can_replace_ours_is_used(state_dir: Path, mode: int) -> None:
    state_dir.chmod(mode)
    slot = Slot("s", state_dir)
    slot.claim()
    assert slot.directory.stat().st_mode & 0o777 == 0o700
    slot.release()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_slot_that_other_users_may_write_is_refused(state_dir: Path, mode: int) -> None:
    (state_dir / "s").mkdir()
    (state_dir / "s").chmod(mode)
    assert_sentence("slot.others", refused(state_dir).message, path=state_dir / "s")


def test_a_link_in_place_of_a_slot_is_refused(state_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (state_dir / "s").symlink_to(target)
    assert_sentence("slot.link", refused(state_dir).message, path=state_dir / "s")
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("name", ["owner.lock", "server.lock"])
def test_a_link_in_place_of_a_lock_is_not_followed(
    state_dir: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "target"
    slot = Slot("s", state_dir)
    (slot.directory / name).symlink_to(target)
    with pytest.raises(StateDirError, match="symbolic link"):
        slot.claim()
    assert not target.exists()
    (slot.directory / name).unlink()
    slot.claim()
    slot.release()


def test_a_link_in_place_of_the_record_is_neither_believed_nor_written(
    state_dir: Path, tmp_path: Path
) -> None:
    """Else whoever can write a file anywhere chooses the process that is killed."""
    slot = Slot("s", state_dir)
    slot.claim()
    me = process_table.identify(os.getpid())
    assert me is not None
    target = tmp_path / "target"
    text = json.dumps({"version": 1, "host": asdict(me), "server": asdict(me)})
    target.write_text(text)
    slot.record_path.symlink_to(target)
    assert slot.recall() is None
    slot.remember(me)
    assert target.read_text() == text
    assert slot.recall() == me
    slot.forget()
    slot.release()


def test_what_another_user_wrote_is_not_read(tmp_path: Path, as_other: Callable[[], None]) -> None:
    """Such as the mark by which a file counts as hashed."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    records = Records(tmp_path / "records")
    records.add_hashed(model, "etag")
    assert records.is_hashed(model, "etag")
    as_other()
    assert not records.is_hashed(model, "etag")
    with pytest.raises(PermissionError, match="belongs to user"):
        read_file(model)


def test_a_fifo_in_place_of_a_file_is_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OSError, match="not a file"):
        read_file(tmp_path / "file")
    write_json(tmp_path / "file", [1])
    assert read_file(tmp_path / "file") == b"[1]"


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file/full").mkdir(parents=True)
    with pytest.raises(OSError, match="file"):
        replace_file(tmp_path / "file", "text")
    with pytest.raises(UnicodeEncodeError):
        replace_file(tmp_path / "other", "\udc80")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_keeper_ends_the_server_of_a_folder_that_others_may_write_by_now(
    host: StartHost, fake: Fake, state_dir: Path
) -> None:
    """Trust is asked for when a slot is claimed: what was started must be ended in any case."""
    backend = host('send(pid=orch.load(a["model"]).pid)\nsleep_forever()')
    server = Watch(backend.receive()["pid"])
    (state_dir / "default").chmod(0o777)
    assert server.seconds_to_exit(backend.die()) < 1
    assert fake.running() == set()
