"""How a keeper becomes a process of its own on Windows. Standard library only, but for the host's
part.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

from orchestrator.base import windows
from orchestrator.server.tree.host import Host
from orchestrator.server.tree.port import Helper, Message
from orchestrator.server.tree.windows_channel import Channel, Door, End
from orchestrator.server.tree.windows_process import pidfd

_FLAGS: Final = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
"""It has a console of its own, without a window: what is typed in the host's does not reach it, and
it can send a Ctrl-Break to its server."""


class _Started:
    """The process that was started: the keeper itself, or what starts it in a venv."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait(self) -> object:
        return self._process.poll()  # it goes on

    def kill(self) -> None:
        self._process.kill()

    def __del__(self) -> None:
        self._process.returncode = self._process.poll() or 0  # it is not ours to wait for


def start_keeper(
    command: tuple[str, ...], given: Message, door_path: str, environment: Mapping[str, str]
) -> tuple[Channel, Helper, bool]:
    """Start the interpreter of a keeper; see `posix_keeper.start_keeper`."""
    from orchestrator.base import launch

    name = windows.pipe_name()
    given |= {"pipe": name, "door": door_path}
    channel = Channel(End.serve(name))

    def start(flags: int) -> subprocess.Popen[bytes]:
        return launch.popen(
            (*command, json.dumps(given)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            creationflags=flags,
        )

    try:
        try:  # a job of the host's may end all of its processes
            process = start(_FLAGS | subprocess.CREATE_BREAKAWAY_FROM_JOB)
        except PermissionError:
            process = start(_FLAGS)
    except BaseException:
        channel.close()
        raise
    return channel, _Started(process), True


def become_keeper(given: Message) -> tuple[Channel, Host, Door | None, int | None]:
    """Return what `Keeper` needs."""
    os.chdir(os.path.dirname(sys.executable))  # no folder of the host's is in use any more
    for signum in (signal.SIGINT, signal.SIGBREAK):
        signal.signal(signum, signal.SIG_IGN)
    end = End.to(given["pipe"])
    pid = end.peer() or given["host"]
    return Channel(end), Host(pid, pidfd(pid)), Door.at(given["door"]), None
