"""What was true after a step, and what one step did: frozen values that any thread may read.

The owner replaces its snapshot as a whole, so a reader needs no lock and never sees half a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.machine.commands import Command
from orchestrator.machine.context import Context
from orchestrator.machine.facts import Fact
from orchestrator.machine.states import State


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was true after a step; replaced as a whole, so reading it needs no lock.

    Attributes:
        since: When the state was entered, Unix seconds (for display only).
        entered_at: The same on the monotonic clock.
        story: The last transitions, oldest first.
    """

    state: State
    ctx: Context
    since: float
    entered_at: float
    story: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, for whoever counts: what came in, what was true before and after, what went out."""

    fact: Fact
    before: Snapshot
    after: Snapshot
    commands: tuple[Command, ...]


Observer = Callable[[StepReport], None]
