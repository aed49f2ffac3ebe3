"""What the pool's commands do to an abstract slot."""

from __future__ import annotations

from orchestrator.pool.commands import Start, Stop
from orchestrator.pool.ledger import Amounts
from tests.kit.pool.world import Scenario, Slot


def after_start(truth: Amounts, start: Start) -> Slot:
    """Return the slot of a new server; one that fits itself keeps to what is reserved."""
    takes = truth
    if start.is_fitted:
        takes = Amounts.of({name: min(n, start.reserved[name]) for name, n in truth.by_account})
    return Slot("spawn", "new", figure=truth, takes=Amounts(), fits=takes)


def after_stop(slot: Slot, stop: Stop) -> Slot:
    """Close the gate, drain, and begin to empty the slot."""
    match slot.phase:
        case "spawn" | "sized" | "loading" | "ghost":
            return slot._replace(phase="dying", gate="shut", why="stopped")
        case "up" | "drain":
            if slot.inside and not stop.cut:
                return slot._replace(phase="drain", gate="shut")
            return dying(slot, "stopped")
    return slot


def dying(slot: Slot, why: str) -> Slot:
    return slot._replace(phase="dying", gate="shut", inside=0, why=why, used=None)


def after_grant(scenario: Scenario, slot: Slot) -> Slot:
    return slot._replace(inside=slot.inside + 1, used=0.0 if scenario.uses_age else None)
