"""A server and its process group, where nothing contains more, and for a keeper that is a thread.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from orchestrator.server.tree.port import CannotExecute, Tree
from orchestrator.server.tree.posix_process import exit_status


def of_this_process() -> Tree:
    """Return the tree below this process, which does nothing else."""
    if sys.platform == "linux":
        from orchestrator.server.tree.linux import SubreaperTree

        with contextlib.suppress(OSError, ImportError, AttributeError):
            return SubreaperTree()
    return PlainTree()


def in_this_process() -> Tree:
    """Return a tree for a keeper that is a thread."""
    return PlainTree()


class PlainTree:
    """A server and its process group; what leaves the group must be looked for by others."""

    contains = False
    exit_fd = None

    def __init__(self) -> None:
        self.leader: int | None = None
        self._status: int | None = None
        self._popen: Any = None

    def start(self, spec: dict[str, Any], output: int, lock: int) -> int:
        import subprocess

        try:
            self._popen = subprocess.Popen(
                spec["argv"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=spec["env"],
                cwd=spec["cwd"],
                pass_fds=(lock,),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise CannotExecute.of(error) from error
        self.leader, self._status = int(self._popen.pid), None
        return self.leader

    def signal(self, signum: int) -> None:
        if self.leader is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.leader, signum)

    def exit_status(self) -> tuple[bool, int | None]:
        if self.leader is None:
            return True, self._status
        if sys.platform != "linux":
            self._status = self._popen.poll()
            return self._status is not None, self._status
        has_exited, self._status = exit_status(self.leader)
        return has_exited, self._status

    def reap_orphans(self) -> None:
        """There are none that would come to us."""

    def is_empty(self) -> bool:
        if self.leader is None:
            return True
        if not self.exit_status()[0]:
            return False
        self.signal(signal.SIGKILL)  # the rest of its group, while its pid is still its own
        self._popen.wait()
        self.leader = None
        return True

    def pids(self) -> list[int]:
        return [] if self.leader is None else [self.leader]
