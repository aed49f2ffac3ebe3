"""Waits until the GPUs have taken back what a server that has ended held.

Drivers free the memory of a process some time after its exit; a server that is started before that
finds too little. A tool of the driver is asked until two answers are the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from typing import Final

from orchestrator.base.log import event_log

SETTLE_S: Final = 2.0
_POLL_S: Final = 0.01
TOOLS: Final = (
    ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"),
    ("rocm-smi", "--showmeminfo", "vram", "--csv"),
)
_log = event_log("orchestrator.server")


def settle(ends: float, is_over: Callable[[], bool]) -> None:
    """Return when two answers in a row are the same, where there is a tool at all.

    Args:
        ends: When to give up, monotonic seconds.
        is_over: Whether nobody waits for this any more.
    """
    command = _command(os.environ.get("PATH", os.defpath))
    before: bytes | None = None
    begun = time.monotonic()
    while command is not None and (answer := _ask(command, ends, is_over)) is not None:
        if answer == before:
            _log("debug", "gpu.settled", after_s=round(time.monotonic() - begun, 3))
            return
        before = answer


@cache
def _command(path: str) -> tuple[str, ...] | None:
    for tool, *arguments in TOOLS:
        if (found := shutil.which(tool, path=path)) is not None:
            return found, *arguments
    return None


def _ask(command: tuple[str, ...], ends: float, is_over: Callable[[], bool]) -> bytes | None:
    """Return what the tool says; None if it says nothing, or not in time."""
    if time.monotonic() >= ends or is_over():
        return None
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as tool:
            while True:
                try:
                    answer, _ = tool.communicate(timeout=_POLL_S)
                except subprocess.TimeoutExpired:
                    if time.monotonic() >= ends or is_over():
                        tool.kill()
                        return None
                else:
                    return answer if tool.returncode == 0 and answer else None
    except OSError:
        return None
