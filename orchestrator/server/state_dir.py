"""The folder of all slots: which one it is, and whether it can be used."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.base import paths
from orchestrator.errors import StateDirError


def default_state_dir() -> Path:
    """Return `$LLAMA_ORCHESTRATOR_STATE_DIR`, or the XDG state directory of this user.

    Raises:
        StateDirError: It would be below the home folder, and this user has none.
    """
    if given := os.environ.get("LLAMA_ORCHESTRATOR_STATE_DIR"):
        return Path(given)
    if base := os.environ.get("XDG_STATE_HOME"):
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
    make_private(root, parents=state_dir is None)
    return Path(paths.real(root))


def make_private(directory: Path, *, parents: bool = False) -> None:
    probe = directory / ".probe"
    try:
        directory.mkdir(mode=0o700, parents=parents, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise unusable(directory, error) from error


def unusable(path: Path, error: Exception) -> StateDirError:
    why = getattr(error, "strerror", None) or str(error)
    return StateDirError.because(
        f"{path} cannot be written ({why}): check the disk, or choose another state_dir",
        field="state_dir",
    )
