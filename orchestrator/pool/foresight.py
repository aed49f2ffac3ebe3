"""What a load would do to the other models, found by stepping a copy of the pool's memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, Literal

from orchestrator.base.tokens import Ticket
from orchestrator.errors import Problem
from orchestrator.pool import commands, facts
from orchestrator.pool.context import Context
from orchestrator.pool.entries import Entry
from orchestrator.pool.owner import uses_of
from orchestrator.pool.slots import PoolSlots
from orchestrator.pool.states import State
from orchestrator.pool.step import step

_TICKET: Final = Ticket(sys.maxsize)
_NO_ROOM: Final = ("too_large", "too_many_waiting")


def foreseen(
    slots: PoolSlots[Any], ctx: Context, entry: Entry, now: float, force: bool
) -> tuple[list[str], Problem | None]:
    """Return who would be evicted for a load, and why it would fail. Blocks."""
    made = _made(slots, ctx, entry, now, "load", force)
    evict = [c.name for c in made if isinstance(c, commands.Stop) and c.room_for == entry.name]
    refused = [c.problem for c in made if isinstance(c, commands.Refuse) and c.ticket == _TICKET]
    return evict, refused[0] if refused else None


def has_room(slots: PoolSlots[Any], ctx: Context, entry: Entry, now: float) -> bool:
    """Return whether a request finds its model, or begins to load it at once. Blocks."""
    known = ctx.find(entry.name)
    if known is not None and known.state in (State.STARTING, State.RESIDENT):
        return True
    for command in _made(slots, ctx, entry, now, "request"):
        match command:
            case commands.Start(name=entry.name) | commands.Stop(room_for=entry.name):
                return True
            case commands.Refuse() if command.ticket == _TICKET:
                return command.problem.category not in _NO_ROOM
    return False


def _made(
    slots: PoolSlots[Any],
    ctx: Context,
    entry: Entry,
    now: float,
    kind: Literal["request", "load"],
    force: bool = False,
) -> Sequence[commands.Command]:
    """Return what the machine would do if this were wanted now."""
    uses = uses_of(ctx, slots.gate)
    wanted = facts.Wanted(entry.name, _TICKET, kind, now, is_forced=force, uses=uses)
    after, made = step(ctx, wanted)
    for command in made:
        if isinstance(command, commands.Measure) and entry.request is not None:
            need, size = slots.need_of(entry.name, entry.request)
            measured = facts.Measured(entry.name, command.edition, need, now, size, uses)
            made = step(after, measured).commands
    return made
