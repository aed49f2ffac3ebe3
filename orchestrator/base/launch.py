"""Start child processes from a host program that we do not control.

Other threads of the host may fork at any time. A fork in the middle of `Popen` copies the pipe on
which `Popen` waits for the exec, and `Popen` then hangs until that fork exits. So a fork waits for
a spawn in progress, about a millisecond.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

no_fork: threading.RLock = threading.RLock()  # a signal handler may fork in the middle of a spawn
"""While it is held, a fork by another thread waits."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=no_fork.acquire,
        after_in_parent=no_fork.release,
        after_in_child=no_fork.release,
    )


def popen(command: tuple[str, ...], **settings: Any) -> subprocess.Popen[bytes]:
    """Start a process, as `subprocess.Popen` does."""
    with no_fork:
        return subprocess.Popen(command, **settings)


def output_file() -> BinaryIO:
    """Return a file for the output of a child; in memory if there is no temporary folder."""
    try:
        return cast("BinaryIO", tempfile.TemporaryFile())
    except OSError:
        if not hasattr(os, "memfd_create"):
            raise
        return open(os.memfd_create("output"), "w+b")


def beyond_streams(fd: int) -> int:
    """Move a descriptor away from 0 to 2, which children replace; a daemon may have none there."""
    if sys.platform == "win32" or fd > 2:
        return fd
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


class NoInterpreter(OSError):
    """There is no Python to run a program of ours with; the text is a part of a sentence."""


def interpreter() -> str:
    """Return the Python interpreter of this process, for programs of ours.

    In a program that embeds Python `sys.executable` is that program, or empty.

    Raises:
        NoInterpreter: There is none, as in a frozen application.
    """
    if getattr(sys, "frozen", False):
        raise NoInterpreter("this application is frozen and brings none")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (sys.executable or "", os.path.join(sys.exec_prefix, "bin", version)):
        if re.match(r"python|pypy", os.path.basename(path)) and os.access(path, os.X_OK):
            return path
    raise NoInterpreter(f"sys.executable is {sys.executable!r}")


def program(path: Path) -> tuple[str, ...]:
    """Return the command that runs a program of ours.

    Raises:
        NoInterpreter: There is none, or the program is inside an archive.
    """
    if not path.is_file():
        raise NoInterpreter(f"none can run {path}, which is not a file on disk")
    # -P: modules of this folder must not shadow the standard library's
    return (interpreter(), "-P", str(path))


def import_path() -> list[str]:
    """Return where this process imports from, to be used by a program of ours in place of its own.

    PYTHONPATH would not do: the host may have changed `sys.path` since, or ignores the variable.
    """
    found = []
    for folder in sys.path:
        with contextlib.suppress(OSError):  # the working directory is gone
            if isinstance(folder, str):
                found.append(os.path.abspath(folder))
    return found
