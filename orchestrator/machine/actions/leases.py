"""Leases, and the time without use after which a server is stopped."""

from __future__ import annotations

from orchestrator.machine.actions.working import (
    NOT_LOADED,
    Step,
    grant,
    known,
    refuse_waiting_leases,
    stop_at,
)
from orchestrator.machine.commands import SetTimer, Settle
from orchestrator.machine.facts import Fact, LeaseReleased, LeaseRequested


def grant_lease(s: Step[LeaseRequested]) -> None:
    grant(s, s.fact.ticket)


def grant_waiting_leases(s: Step[Fact]) -> None:
    for ticket in s.ctx.lease_waiters:
        grant(s, ticket)
    s.put(lease_waiters=())


def wait_for_lease(s: Step[LeaseRequested]) -> None:
    s.put(lease_waiters=(*s.ctx.lease_waiters, s.fact.ticket))


def refuse_lease(s: Step[LeaseRequested]) -> None:
    s.emit(Settle(s.fact.ticket, NOT_LOADED))


def rest(s: Step[Fact]) -> None:
    """Nothing is under way in the slot: there is nothing to go back to, and no lease to wait for
    unless a load awaits its model or a restart is planned.
    """
    recovery = s.ctx.recovery
    if recovery is not None and recovery.phase == "trying":
        recovery = None
    s.put(previous=None, recovery=recovery)
    if not s.ctx.wanted:
        refuse_waiting_leases(s)


def drop_lease(s: Step[LeaseReleased]) -> None:
    s.put(leases=s.ctx.leases - {s.fact.ticket})


def revoke_leases(s: Step[Fact]) -> None:
    s.put(leases=frozenset())


def await_idle(s: Step[Fact]) -> None:
    """From now on nobody uses the server: it has its whole time before it is stopped for that."""
    running = known(s.ctx.running)
    request = running.target.request
    ttl_s = s.ctx.policy.idle_ttl_s if request.idle_ttl_s is None else request.idle_ttl_s
    if ttl_s is None or request.pinned or s.ctx.leases:
        stop_at(s, None)
    else:
        stop_at(s, s.fact.at + ttl_s)
        s.emit(SetTimer(running.generation, "idle", ttl_s))
