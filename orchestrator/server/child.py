"""A server that has been started: its process, its exit and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.base import waitable
from orchestrator.base.tokens import Generation
from orchestrator.machine.facts import Exit
from orchestrator.server.output import OutputRing
from orchestrator.server.pin import Pin


@dataclass(slots=True, eq=False)
class ServerProcess:
    """One server, from its spawn until its slot is verified empty. Only the warden changes it.

    Attributes:
        family: Returns the pids of the server and everything it started.
        output_fd: Its output, until that has ended.
        api_key: The key it requires on every route but /health.
        listeners: Called on every output and at the exit.
    """

    generation: Generation
    pin: Pin
    family: Callable[[], set[int]]
    output: OutputRing = field(init=False)
    output_fd: int | None = None
    exit: Exit | None = None
    api_key: str | None = field(default=None, repr=False)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = OutputRing(self.notify)

    @property
    def pid(self) -> int:
        return self.pin.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it is running, as the kernel reports it now."""
        return self.exit is None and not self.pin.has_exited

    def notify(self) -> None:
        for listener in tuple(self.listeners):
            listener()

    def close(self) -> None:
        """Give back its descriptors; everything has exited."""
        self.pin.close()
        if self.output_fd is not None:
            waitable.close(self.output_fd)
            self.output_fd = None
        self.output.close()
