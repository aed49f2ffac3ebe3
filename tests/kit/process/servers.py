"""The servers of a state directory, by the token in their environment."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from orchestrator.server import process_table
from orchestrator.server.slot import TOKEN_NAME


def servers_of(directory: Path) -> set[int]:
    """Return every running process that carries a token of a slot in this state directory."""
    found = set()
    for pid in process_table.pids():
        try:
            token = psutil.Process(pid).environ().get(TOKEN_NAME, "")
        except (psutil.Error, OSError):  # also a zombie: it has no environment any more
            continue
        if token.startswith(str(directory.resolve()) + os.sep):
            found.add(pid)
    return found
