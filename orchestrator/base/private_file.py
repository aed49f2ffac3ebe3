"""Files that only this user may write, in folders that others may reach.

A link at the place of a file is not followed, a file of another user is not read, and what is
written has a name that cannot be guessed until it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import sys
import time
from pathlib import Path
from typing import Any, Final

_OPEN: Final = sum(
    getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
)
"""O_NONBLOCK because to open a FIFO in place of a file would wait for a writer."""
_RENAME_S: Final = 1.0
_RENAME_AGAIN_S: Final = 0.01


def open_file(path: Path | str, flags: int) -> int:
    """Open a file; a new one is private. Raises OSError if it is a link or another user's."""
    fd = os.open(path, flags | _OPEN, 0o600)
    found = os.fstat(fd)
    is_file, is_ours = stat.S_ISREG(found.st_mode), found.st_uid == this_user(found.st_uid)
    if is_file and is_ours:
        return fd
    os.close(fd)
    if is_file:
        raise OSError(errno.EPERM, f"it belongs to user {found.st_uid}", str(path))
    raise OSError(errno.EINVAL, "not a file", str(path))


def this_user(without: int) -> int:
    """Return the id of this process's user, or another value where users have no numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else without


def read_file(path: Path, most: int = 1 << 24) -> bytes:
    """Return the first bytes of a file; raises OSError as `open_file` does."""
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read(most)


def replace_file(path: Path | str, text: str) -> None:
    """Replace a file, or a link at its place, atomically; raises OSError."""
    temporary = f"{path}.{secrets.token_hex(8)}"
    with contextlib.ExitStack() as undo:
        fd = open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        undo.callback(os.unlink, temporary)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode())
        _rename(temporary, path)
        undo.pop_all()


def _rename(source: str, target: Path | str) -> None:
    if sys.platform == "win32":  # there it fails while somebody reads the target
        ends = time.monotonic() + _RENAME_S
        while time.monotonic() < ends:
            with contextlib.suppress(PermissionError):
                os.replace(source, target)
                return
            time.sleep(_RENAME_AGAIN_S)
    os.replace(source, target)


def write_json(path: Path, members: Any) -> None:
    """Replace a file that is only a cache: one that cannot be written costs time the next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps(members))
