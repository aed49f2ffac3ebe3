"""The folder of all slots: which one it is, and whether it can be used."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Final

from orchestrator.base import paths
from orchestrator.base.private_file import this_user
from orchestrator.errors import StateDirError

_ROOT: Final = 0  # owns volumes of containers; the user whom everybody trusts


def default_state_dir() -> Path:
    """Return `$LLAMA_ORCHESTRATOR_STATE_DIR`, or the XDG state directory of this user, on Windows
    a folder of its local application data.

    Raises:
        StateDirError: It would be below the home folder, and this user has none.
    """
    if given := os.environ.get("LLAMA_ORCHESTRATOR_STATE_DIR"):
        return Path(given)
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "llama-orchestrator"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "llama-orchestrator"
    if (home := paths.home()) is None:
        raise StateDirError.because(
            "there is no home folder to have the state directory in: give state_dir, or set "
            "LLAMA_ORCHESTRATOR_STATE_DIR",
            field="state_dir",
        )
    return Path(home) / ".local/state/llama-orchestrator"


def cache_dir(state_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder for what is cached about this machine, shared by all slots."""
    return Path(state_dir or default_state_dir()) / "cache"


def prepare(state_dir: str | os.PathLike[str] | None) -> Path:
    """Return the state directory as an absolute path without links, created if necessary."""
    if state_dir is None:
        root = default_state_dir()
    else:
        try:
            root = Path(state_dir).expanduser()
            is_usable = state_dir != "" and root.parent.is_dir()
        except (TypeError, RuntimeError):  # not a path; no such user
            is_usable = False
        if not is_usable:
            raise StateDirError.because(
                f"state_dir is {state_dir!r}: give the path of a folder whose parent exists",
                field="state_dir",
            )
    make_folder(root, parents=state_dir is None)
    return Path(paths.real(root))


def make_folder(directory: Path, *, parents: bool = False) -> None:
    """Create a folder for this user only, unless it is there, and check that it can be written."""
    import tempfile

    try:
        directory.mkdir(mode=0o700, parents=parents, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except (OSError, ValueError) as error:
        raise unusable(directory, error) from error


def check_trusted(slot: Path) -> None:
    """Refuse the folder of a slot if another user may have written or replaced what is in it.

    Raises:
        StateDirError: This, or the folder cannot be read.
    """
    try:
        root, found = slot.parent.stat(), slot.lstat()
    except OSError as error:
        raise unusable(slot, error) from error
    if _may_write(root, stat.S_IWOTH) and not root.st_mode & stat.S_ISVTX:
        cure = "run chmod o-w, choose a new folder inside it"
        raise _unsafe(slot.parent, "may be written by every user", cure)
    _check_owner(slot.parent, root.st_uid, _ROOT)
    if not stat.S_ISDIR(found.st_mode):
        raise _unsafe(slot, "is a link", "remove it")
    if _may_write(found, stat.S_IWGRP | stat.S_IWOTH):
        raise _unsafe(slot, "may be written by other users", "run chmod go-w")
    _check_owner(slot, found.st_uid)


def _may_write(found: os.stat_result, others: int) -> bool:
    return os.name == "posix" and bool(found.st_mode & others)


def _check_owner(directory: Path, owner: int, *others: int) -> None:
    """Refuse a folder of another user than this one and these."""
    if (user := this_user(owner)) != owner and owner not in others:
        what = f"belongs to user {owner}, and this process to user {user}"
        raise _unsafe(directory, what, "run chown")


def _unsafe(path: Path, what: str, cure: str) -> StateDirError:
    message = f"{path} {what}: {cure}, or choose another state_dir"
    return StateDirError.because(message, field="state_dir")


def unusable(path: Path, error: Exception) -> StateDirError:
    why = getattr(error, "strerror", None) or str(error)
    return StateDirError.because(
        f"{path} cannot be written ({why}): check the disk, or choose another state_dir",
        field="state_dir",
    )
