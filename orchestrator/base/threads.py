"""Starting threads where the host may refuse them, by a limit of processes or of memory."""

from __future__ import annotations

import threading


class NoThread(RuntimeError):
    """The host starts no further thread; nothing of what it was meant for will happen."""

    def __init__(self) -> None:
        super().__init__(
            "this process cannot start a thread: raise its limit of processes (ulimit -u, "
            "pids.max, TasksMax) or its memory limit"
        )


def start(thread: threading.Thread) -> None:
    """Start a thread; raises NoThread."""
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread from error
