"""Leases, and the time without use after which a server is stopped."""

from __future__ import annotations

from typing import cast

from orchestrator.machine.actions.working import (
    NOT_LOADED,
    Step,
    grant,
    refuse_waiting_leases,
    stop_at,
)
from orchestrator.machine.commands import SetTimer, Settle
from orchestrator.machine.context import Running


def grant_lease(s: Step) -> None:
    grant(s, s.ticket)


def grant_waiting_leases(s: Step) -> None:
    for ticket in s.ctx.lease_waiters:
        grant(s, ticket)
    s.put(lease_waiters=())


def wait_for_lease(s: Step) -> None:
    s.put(lease_waiters=(*s.ctx.lease_waiters, s.ticket))


def refuse_lease(s: Step) -> None:
    s.emit(Settle(s.ticket, NOT_LOADED))


def rest(s: Step) -> None:
    """Nothing is under way in the slot: there is nothing to go back to, and no lease to wait for
    unless a load awaits its model or a restart is planned.
    """
    recovery = s.ctx.recovery
    if recovery is not None and recovery.phase == "trying":
        recovery = None
    s.put(previous=None, recovery=recovery)
    if not s.ctx.wanted:
        refuse_waiting_leases(s)


def drop_lease(s: Step) -> None:
    s.put(leases=s.ctx.leases - {s.ticket})


def revoke_leases(s: Step) -> None:
    s.put(leases=frozenset())


def await_idle(s: Step) -> None:
    """From now on nobody uses the server: it has its whole time before it is stopped for that."""
    running = cast("Running", s.ctx.running)
    request = running.target.request
    ttl_s = s.ctx.policy.idle_ttl_s if request.idle_ttl_s is None else request.idle_ttl_s
    if ttl_s is None or request.pinned or s.ctx.leases:
        stop_at(s, None)
    else:
        stop_at(s, s.fact.at + ttl_s)
        s.emit(SetTimer(running.generation, "idle", ttl_s))
