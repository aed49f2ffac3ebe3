"""Start child processes from a host program that we do not control.

Other threads of the host may fork at any time. A fork in the middle of `Popen` copies the pipe on
which `Popen` waits for the exec, and `Popen` then hangs until that fork exits. So a fork waits for
a spawn in progress, about a millisecond.
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
    """Start a process, as `subprocess.Popen` does."""
    with _spawning:
        return subprocess.Popen(command, **settings)


def interpreter() -> str | None:
    """Return a Python interpreter for our helper programs, or None if there is none.

    In a frozen application, or one that embeds Python, `sys.executable` is that application.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    beside = os.path.join(sys.exec_prefix, "bin", version)
    found = [] if getattr(sys, "frozen", False) else [sys.executable or "", beside]
    for path in found:
        if re.match(r"python|pypy", os.path.basename(path)) and os.access(path, os.X_OK):
            return path
    return None
