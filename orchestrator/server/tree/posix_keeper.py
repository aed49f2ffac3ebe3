"""How a keeper becomes a process of its own. Standard library only, but for the host's part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping
from typing import Final

from orchestrator.server.tree.host import Host
from orchestrator.server.tree.port import Helper, Message
from orchestrator.server.tree.posix_process import pidfd
from orchestrator.server.tree.unix_channel import Channel, Door

_HEARD: Final = ("SIGCHLD", "SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE", "SIGXFSZ")
"""Signals that do nothing but wake it: it ends after its host, not before."""


def start_keeper(
    command: tuple[str, ...], given: Message, door_path: str, environment: Mapping[str, str]
) -> tuple[Channel, Helper, bool]:
    """Start the interpreter of a keeper, which forks and exits.

    Args:
        command: To which `given` is added, with what it inherits.
        door_path: Where the next owner is to find it.

    Returns:
        Its channel, the process that exits, and whether there is a door.

    Raises:
        OSError: It cannot be started.
    """
    import subprocess  # of the host's part: a keeper starts sooner without it

    from orchestrator.base import launch

    with launch.no_fork, contextlib.ExitStack() as ends:  # a fork must not keep them open
        ours, theirs = Channel.pair()
        ends.callback(theirs.close)
        door = Door.at(door_path)
        if door is not None:
            ends.callback(door.close)
        if (host_fd := pidfd(os.getpid())) is not None:
            ends.callback(os.close, host_fd)
        door_fd = None if door is None else door.fd
        given |= {"socket": theirs.fileno(), "door": door_fd, "host_fd": host_fd}
        if door is None:
            given["keep_s"] = 0.0
        try:
            helper = launch.popen(
                (*command, json.dumps(given)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[fd for fd in (theirs.fileno(), door_fd, host_fd) if fd is not None],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    return ours, helper, door is not None


def become_keeper(given: Message) -> tuple[Channel, Host, Door | None, int | None]:
    """Be no child of the host any more, and return what `Keeper` needs."""
    if os.fork():
        os._exit(0)  # the host may end all of its children
    os.chdir("/")
    for fd in (given["socket"], given["host_fd"], given["door"]):
        if fd is not None:
            os.set_inheritable(fd, False)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for name in _HEARD:
        signal.signal(getattr(signal, name), lambda *_: None)  # not ignored: servers inherit that
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    door = None if given["door"] is None else Door(socket.socket(fileno=given["door"]))
    channel = Channel(socket.socket(fileno=given["socket"]))
    return channel, Host(given["host"], given["host_fd"]), door, woken
