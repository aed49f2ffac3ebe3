"""Starting a child from a host that we know nothing about.

It may not be a Python interpreter, and its other threads may fork. A fork copies every descriptor
there is at that moment; one that falls into a spawn copies the pipe by which `Popen` learns of the
exec, and `Popen` then waits for as long as that worker lives. So a fork waits for the spawn, about
a millisecond; nothing else happens while it is made to wait.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from typing import Any

_spawning = threading.RLock()  # a signal handler may fork in the middle of a spawn

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_spawning.acquire,
        after_in_parent=_spawning.release,
        after_in_child=_spawning.release,
    )


def popen(command: tuple[str, ...], **settings: Any) -> subprocess.Popen[bytes]:
    """Start a process; as `subprocess.Popen`."""
    with _spawning:
        return subprocess.Popen(command, **settings)


def interpreter() -> str | None:
    """Return a Python to run our own programs with; None when there is none.

    In a frozen application or a server that embeds Python, `sys.executable` is that program.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    beside = os.path.join(sys.exec_prefix, "bin", version)
    found = [] if getattr(sys, "frozen", False) else [sys.executable or "", beside]
    for path in found:
        if re.match(r"python|pypy", os.path.basename(path)) and os.access(path, os.X_OK):
            return path
    return None
