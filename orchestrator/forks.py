"""Starting a child while other threads of the host may fork.

A fork copies every descriptor there is at that moment. One that falls into a spawn copies the pipe
by which `Popen` learns of the exec, and `Popen` then waits for as long as that worker lives. So a
fork waits for the spawn, about a millisecond; nothing else happens while it is made to wait.
"""

from __future__ import annotations

import os
import subprocess
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
