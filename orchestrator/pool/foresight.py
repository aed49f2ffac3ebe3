"""What a load would do to the other models, found by stepping a copy of the pool's memory."""

from __future__ import annotations

import sys
from typing import Any

from orchestrator.base.tokens import Ticket
from orchestrator.errors import Problem
from orchestrator.pool import commands, facts
from orchestrator.pool.context import Context
from orchestrator.pool.entries import Entry
from orchestrator.pool.owner import uses_of
from orchestrator.pool.slots import PoolSlots
from orchestrator.pool.step import step


def foreseen(
    slots: PoolSlots[Any], ctx: Context, entry: Entry, now: float, force: bool
) -> tuple[list[str], Problem | None]:
    """Return who would be evicted for a load, and why it would fail. Blocks."""
    uses = uses_of(ctx, slots.gate)
    ticket = Ticket(sys.maxsize)
    wanted = facts.Wanted(entry.name, ticket, "load", now, is_forced=force, uses=uses)
    after, made = step(ctx, wanted)
    for command in made:
        if isinstance(command, commands.Measure) and entry.request is not None:
            need, size = slots.need_of(entry.name, entry.request)
            measured = facts.Measured(entry.name, command.edition, need, now, size, uses)
            made = step(after, measured).commands
    evict = [c.name for c in made if isinstance(c, commands.Stop) and c.room_for == entry.name]
    refused = [c.problem for c in made if isinstance(c, commands.Refuse) and c.ticket == ticket]
    return evict, refused[0] if refused else None
