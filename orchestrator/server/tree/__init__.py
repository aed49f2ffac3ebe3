"""The process tree as a port: this is the only module that chooses the platform's.

A keeper starts a server in a `Tree`, works for a `Host`, and hears it over a `Channel`; the next
owner comes in by a `Door`. `locks` are those of a slot, and `process` is about single processes.
Standard library only.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from orchestrator.server.tree import windows_locks as locks
    from orchestrator.server.tree import windows_process as process
    from orchestrator.server.tree.windows import in_this_process, of_this_process
    from orchestrator.server.tree.windows_channel import Channel, Door, can_listen
    from orchestrator.server.tree.windows_keeper import become_keeper, start_keeper
else:
    from orchestrator.server.tree import posix_locks as locks
    from orchestrator.server.tree import posix_process as process
    from orchestrator.server.tree.posix import in_this_process, of_this_process
    from orchestrator.server.tree.posix_keeper import become_keeper, start_keeper
    from orchestrator.server.tree.unix_channel import Channel, Door, can_listen

from orchestrator.server.tree.host import Host
from orchestrator.server.tree.port import (
    VERSION,
    CannotExecute,
    Helper,
    Message,
    Part,
    Tree,
    text_of,
)

__all__ = [
    "VERSION",
    "CannotExecute",
    "Channel",
    "Door",
    "Helper",
    "Host",
    "Message",
    "Part",
    "Tree",
    "become_keeper",
    "can_listen",
    "in_this_process",
    "locks",
    "of_this_process",
    "process",
    "start_keeper",
    "text_of",
]
