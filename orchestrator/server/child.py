"""A server that has been started: its process, its exit and its output."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.base.tokens import Generation
from orchestrator.machine.facts import Exit
from orchestrator.server import process_table
from orchestrator.server.output import OutputRing
from orchestrator.server.process_table import Pin, ProcessId


@dataclass(slots=True, eq=False)
class ServerProcess:
    """One server, from spawn until its slot is verified empty. Only the warden changes it.

    Attributes:
        api_key: What it asks everybody for, but for /health.
    """

    generation: Generation
    process: ProcessId
    pin: Pin | None
    popen: subprocess.Popen[bytes]
    output: OutputRing
    family: Callable[[], set[int]]
    stdout_fd: int | None = None
    exit: Exit | None = None
    is_reaped: bool = False
    api_key: str | None = field(default=None, repr=False)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def must_be_polled(self) -> bool:
        """No pidfd tells of its exit."""
        return self.exit is None and (self.pin is None or self.pin.fd is None)

    @property
    def is_alive(self) -> bool:
        """Asked of the kernel now, not of what has been noticed so far."""
        if self.exit is not None:
            return False
        return not self.pin.has_exited if self.pin else process_table.is_alive(self.process)

    def tell(self) -> None:
        for listener in tuple(self.listeners):
            listener()
