"""What the owner needs from the world: effects and a clock. Tests put gates here.

An effect is started and returns at once; it reports exactly one completion through `post`, however
it ends, and it honours the token of its load by ending early, never by staying silent.
"""

from __future__ import annotations

from typing import Protocol

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.machine.commands import Effect
from orchestrator.machine.facts import Child, SlotEvidence

LogPosition = tuple[int, int]
"""A server's generation, and how many of its lines have been seen."""


class ClaimedSlot(Protocol):
    """A process slot that one orchestrator claims for itself."""

    name: str

    def claim(self) -> None:
        """Become the owner, or raise SlotOwned."""

    def release(self) -> None:
        """Stop being the owner."""


class SlotLock(Protocol):
    """The held answer "the slot is empty"; nobody else can find it empty meanwhile."""

    def release(self) -> None:
        """Let go; does nothing once the lock has been handed to a server."""


class Progress(Protocol):
    """Bytes of the phase under way, for display."""

    bytes_done: int
    bytes_total: int | None


class Effects(Protocol):
    """Everything that touches the operating system on behalf of one owner."""

    def take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        """Ask whether the slot is empty and hold the answer. Owner's thread."""

    def child_is_alive(self, child: Child) -> bool:
        """Ask the kernel, now. Owner's thread."""

    def start(self, effect: Effect, token: CancelToken, lock: SlotLock | None) -> None:
        """Begin one effect; a spawn is carried out at once. Owner's thread."""

    def progress(self, generation: Generation) -> Progress | None:
        """What is being done for a load so far; None when nothing is, or no bytes are counted."""

    def log_since(self, position: LogPosition) -> tuple[LogPosition, tuple[str, ...]]:
        """The lines after a position, of the present or last server, and where they end."""

    def log_tail(self, count: int) -> tuple[str, ...]:
        """The last lines of the present or last server."""

    def close(self) -> None:
        """Give everything back; the slot is empty or given up."""


class Clock(Protocol):
    def __call__(self) -> float:
        """Monotonic seconds."""
