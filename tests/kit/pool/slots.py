"""What the pool's commands do to an abstract slot."""

from __future__ import annotations

from orchestrator.pool.commands import Start, Stop
from orchestrator.pool.ledger import Amounts
from tests.kit.pool.world import Model, Scenario, Slot, amounts


def after_start(model: Model, truth: Amounts, start: Start) -> Slot:
    """Return the slot of a new server; one that fits itself takes what it has, or what it says."""
    takes = truth
    if start.is_fitted:
        takes = amounts(model.fits_to) if model.fits_to else start.reserved
    return Slot("spawn", "new", figure=truth, fits=takes)


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
