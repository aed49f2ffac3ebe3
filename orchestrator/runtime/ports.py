"""What the owner needs from the operating system. Tests implement these protocols with gates.

`Effects.start` returns at once. Every effect posts exactly one completion, however it ends; when
the token of its load is set it ends early, but never silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.machine.commands import Effect, LookUp, Warm
from orchestrator.machine.facts import Child, SlotEvidence
from orchestrator.server.prompts import PromptStore

Clock = Callable[[], float]  # monotonic seconds
LogPosition = tuple[int, int]  # the generation of a server, and a number of its output lines


class SlotLock(Protocol):
    """Proof that the slot is empty: while it is held, no server can start in the slot."""

    def release(self) -> None:
        """Release the lock. Does nothing once a server has inherited it."""


class Progress(Protocol):
    """Bytes processed in the present phase, for display."""

    bytes_done: int
    bytes_total: int | None


class Effects(Protocol):
    """Everything that touches the operating system on behalf of one owner."""

    @property
    def prompts(self) -> PromptStore | None:
        """Those that are kept for when a model comes back, if they are."""

    def take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        """Check whether the slot is empty, and lock it if so. Owner's thread."""

    def child_is_alive(self, child: Child) -> bool:
        """Ask the kernel. Owner's thread."""

    def can_be_kept(self, child: Child) -> bool:
        """Whether this server goes on if we end now. Owner's thread."""

    def start(self, effect: Effect, token: CancelToken, lock: SlotLock | None) -> None:
        """Start an effect; a spawn is carried out before this returns. Owner's thread."""

    def warm(self, command: Warm, token: CancelToken) -> None:
        """Begin to read files ahead, until the token is set or a spawn begins. Owner's thread."""

    def look_up(self, command: LookUp) -> None:
        """Look up a model, which may take for ever; posts one `LookedUp`. Owner's thread."""

    def progress(self, generation: Generation) -> Progress | None:
        """Return the bytes of the effect in flight; None if there is none, or it has no bytes."""

    def log_since(self, position: LogPosition) -> tuple[LogPosition, tuple[str, ...]]:
        """Return the output after `position` of the present or last server, and the new end."""

    def log_tail(self, count: int) -> tuple[str, ...]:
        """Return the last lines of the present or last server."""

    def close(self, *, keep: bool = False) -> None:
        """Release everything. The slot is empty, or could not be emptied, or its server is left to
        the next owner.
        """
