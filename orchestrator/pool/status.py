"""What a pool says about itself: frozen data with the names of the HTTP bodies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

from orchestrator.base.record import Record
from orchestrator.errors import Problem
from orchestrator.machine.states import State as SlotState
from orchestrator.pool.context import Context, Entry
from orchestrator.pool.entries import Entry as Described
from orchestrator.pool.ledger import is_place
from orchestrator.pool.states import State
from orchestrator.runtime.answers import Status
from orchestrator.settings.fields import Kind
from orchestrator.settings.memory import Memory


@dataclass(frozen=True, slots=True)
class DeviceStatus(Record):
    """The budget of one device."""

    device: str
    total_mib: int
    reserved_mib: int


@dataclass(frozen=True, slots=True)
class ModelStatus(Record):
    """One entry of the catalogue.

    Attributes:
        state: Of its slot; Healthy for another server, which is not ours to start.
        memory: What is reserved for it, else what it would need; None before that is known.
        leases: Requests that use its server now.
        waiting: Requests that wait for it.
        last_used_at: Unix seconds; None if it has not been used since it was loaded.
        last_error: Why its last load has failed.
    """

    name: str
    kind: Kind
    aliases: list[str]
    presets: list[str]
    state: SlotState
    pinned: bool
    group: str | None
    memory: Memory | None
    leases: int
    waiting: int
    generation: int
    pid: int | None
    last_used_at: float | None
    last_error: Problem | None


@dataclass(frozen=True, slots=True)
class WaitingStatus(Record):
    """The requests that wait for one model, and how long the first of them has waited."""

    model: str
    count: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class PoolStatus(Record):
    """A pool at one moment: its budget, its models in the order of the catalogue, who waits."""

    budget: list[DeviceStatus]
    models: list[ModelStatus]
    waiting: list[WaitingStatus]


def devices_of(ctx: Context, names: Container[str]) -> list[DeviceStatus]:
    """Return the budget, and what these models hold of it."""
    reserved = ctx.ledger.total(name for name, _ in ctx.ledger.reservations if name in names)
    return [
        DeviceStatus(device, mib, reserved[device])
        for device, mib in ctx.devices.by_account
        if not is_place(device)
    ]


def waiting_of(ctx: Context, now: float) -> list[WaitingStatus]:
    since: dict[str, list[float]] = {}
    for waiter in ctx.waiting:
        if waiter.ticket is not None:
            since.setdefault(waiter.name, []).append(waiter.since)
    return [
        WaitingStatus(name, len(some), round(max(0.0, now - min(some)), 3))
        for name, some in since.items()
    ]


class PoolSnapshot:
    """The memory of the pool's machine at one moment, indexed by name.

    Args:
        now: Monotonic seconds.
    """

    def __init__(self, ctx: Context, now: float) -> None:
        self.ctx = ctx
        self.now = now
        self.entries: dict[str, Entry] = {entry.name: entry for entry in ctx.entries}
        self.waiting: Counter[str] = Counter(w.name for w in ctx.waiting if w.ticket is not None)

    def state_of(self, name: str) -> State:
        entry = self.entries.get(name)
        return entry.state if entry is not None else State.ABSENT

    def model(
        self,
        described: Described,
        slot: Status | None = None,
        used_at: float | None = None,
        generation: int = 0,
        problem: Problem | None = None,
    ) -> ModelStatus:
        """Return one model.

        Args:
            slot: The status of its slot; None if it is at rest.
            used_at: When its last lease ended, monotonic seconds; None while there is one.
            generation: Of the last load of a slot that is at rest.
            problem: Why the server of a model elsewhere is of no use now.
        """
        name, entry = described.name, self.entries.get(described.name)
        loaded = slot.loaded if slot is not None else None
        state = slot.state if slot is not None else SlotState.IDLE
        if described.request is None and problem is None:
            state = SlotState.HEALTHY
        ago_s = 0.0 if used_at is None else self.now - used_at
        return ModelStatus(
            name=name,
            kind=described.kind,
            aliases=list(described.aliases),
            presets=[preset.name for preset in described.presets],
            state=state,
            pinned=described.pinned,
            group=described.group,
            memory=self._memory(entry, loaded.memory if loaded is not None else None),
            leases=slot.leases if slot is not None else 0,
            waiting=self.waiting[name],
            generation=slot.generation if slot is not None else generation,
            pid=loaded.pid if loaded is not None else None,
            last_used_at=None if loaded is None else round(time.time() - ago_s, 3),
            last_error=entry.failure if entry is not None else problem,
        )

    def _memory(self, entry: Entry | None, taken: Memory | None) -> Memory | None:
        """Return what is reserved, and the server's own figure; else what a start would reserve."""
        if entry is None or (need := entry.definition.need) is None:
            return None
        is_absent = entry.state is State.ABSENT
        amounts = need.amounts if is_absent else self.ctx.ledger.of(entry.name).of_devices()
        own = taken.server_mib if taken is not None else None
        fitted = taken is not None and taken.fitted
        return Memory.of(need.source, dict(amounts.by_account), server_mib=own, fitted=fitted)
