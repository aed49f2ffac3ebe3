"""The servers of a state directory, by the token in their environment."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from orchestrator.server import process_table
from orchestrator.server.slot import TOKEN_NAME


def servers_of(directory: Path) -> set[int]:
    """Every living process that carries a token of a slot in this state directory."""
    found = set()
    for pid, row in process_table.everyone().items():
        if row.is_zombie:
            continue
        try:
            token = psutil.Process(pid).environ().get(TOKEN_NAME, "")
        except (psutil.Error, OSError):
            continue
        if token.startswith(str(directory.resolve()) + os.sep):
            found.add(pid)
    return found
