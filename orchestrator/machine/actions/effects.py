"""Effects begin and end, servers come and go, and leases keep a server from being stopped."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine import commands, facts
from orchestrator.machine.actions.working import MAX_REMEMBERED, NOT_LOADED, Step, require
from orchestrator.machine.context import EffectInFlight, EffectKind, Job, Running
from orchestrator.machine.facts import Exit
from orchestrator.settings.target import Target


def begin_kill(s: Step[facts.Fact]) -> None:
    """Empty the slot at once, or after the leases are released or the drain times out."""
    if s.ctx.gate == "open":
        generation = _close_gate(s, drains=True)
        s.emit(commands.SetTimer(generation, "drain", s.ctx.policy.drain_timeout_s))
    else:
        kill_when_drained(s)


def kill_when_drained(s: Step[facts.Fact]) -> None:
    if s.ctx.effect is None and s.ctx.gate is None:
        generation = s.ctx.job.generation if s.ctx.job else s.ctx.generation
        s.put(effect=EffectInFlight("kill", generation))
        s.emit(commands.Kill(generation, s.ctx.child, _whose_prompts(s)))


def _whose_prompts(s: Step[facts.Fact]) -> Target | None:
    """Return what the running server was started with, if it is stopped for a load."""
    running, is_wanted = s.ctx.running, s.ctx.loading is not None and s.ctx.child_end is None
    keeps = s.ctx.policy.keeps_prompts and is_wanted and running is not None
    return running.target if keeps and running and running.target.can_keep_prompts else None


def begin_download(s: Step[facts.Fact]) -> None:
    job = _next_phase(s, "kill", "download")
    s.emit(commands.Download(job.generation, job.target))


def begin_spawn(s: Step[facts.Fetched]) -> None:
    job = _next_phase(s, "download", "spawn")
    target = replace(job.target, model=s.fact.model).inheriting(dict(s.ctx.committed_args))
    s.put(job=replace(job, target=target))
    s.emit(commands.Spawn(job.generation, target))


def begin_probe(s: Step[facts.Fact]) -> None:
    job = _next_phase(s, "spawn", "probe")
    target, child = job.target, require(s.ctx.child)
    stall_s, size = target.request.stall_timeout_s, target.model.size_bytes
    unchanged = target.files if job.is_adoption else ()
    s.emit(commands.Probe(job.generation, child, stall_s, size, target.extra_args, unchanged))


def _next_phase(s: Step[facts.Fact], ended: str, begins: EffectKind | None) -> Job:
    """Add the time of the phase that has ended, and return the load in flight."""
    job = require(s.ctx.job)
    job = replace(job, phase_at=s.fact.at, timings=job.spent(ended, s.fact.at))
    s.put(job=job, effect=EffectInFlight(begins, job.generation) if begins else None)
    return job


def record_child(s: Step[facts.Spawned | facts.Found]) -> None:
    s.put(child=s.fact.child, effect=None)


def adopt(s: Step[facts.Found]) -> None:
    """Go on with a server that was found, as with the load that started it."""
    found, at = s.fact, s.fact.at
    job = Job(found.generation, require(found.target), (), at, phase_at=at, is_adoption=True)
    s.put(generation=max(s.ctx.generation, found.generation), job=job)


def end_effect(s: Step[facts.Fact]) -> None:
    s.put(effect=None)


def count_attempt(s: Step[facts.Fact]) -> None:
    job = require(s.ctx.job)
    s.put(job=replace(job, attempts=job.attempts + 1, phase_at=s.fact.at))


def forget_child(s: Step[facts.Emptied]) -> None:
    """Every process of the slot has exited: this is the only place that clears the pid."""
    exit_, child = s.fact.exit, s.ctx.child
    if child is not None and s.ctx.child_end != "reported":
        is_ours = s.ctx.child_end is None
        how = "stopped" if is_ours else _how(s, exit_.returncode if exit_ else None)
        s.emit(commands.ServerEnded(child.pid, how))
    last_exit = s.ctx.last_exit
    if exit_ is not None and child is not None:  # else it has been told before
        last_exit = _told(s, exit_)
    s.put(child=None, child_end=None, running=None, effect=None, last_exit=last_exit)


def record_memory(s: Step[facts.Sized]) -> None:
    s.put(job=replace(require(s.ctx.job), memory=s.fact.memory))


def commit(s: Step[facts.BecameReady]) -> None:
    """The load has succeeded; its settings are now those that later loads inherit."""
    fact = s.fact
    job = _next_phase(s, "health", None)
    timings = replace(job.timings, total=fact.at - job.accepted_at)
    child = require(s.ctx.child)
    running = Running(
        job.generation,
        job.target,
        child,
        fact.server,
        timings,
        job.reload_reasons,
        fact.at,
        adopted=job.is_adoption,
        memory=job.memory,
    )
    lease = commands.LeaseGranted(job.target, child, fact.server)
    s.emit(commands.OpenGate(lease))  # before anybody hears of the server
    source = job.target.source
    others = tuple(args for args in s.ctx.committed_args if args[0] != source)
    committed = (*others, (source, job.target.extra_args))[-MAX_REMEMBERED:]
    s.put(job=None, running=running, gate="open", committed_args=committed, previous=None)
    s.put(last_error=job.after)  # a failure that was repaired stays visible
    s.conclude(job, running.loaded())
    s.settle(job.callers, running.loaded(already=job.is_adoption))
    s.promote_next()


def record_exit(s: Step[facts.Exited]) -> None:
    s.put(last_exit=_told(s, s.fact.exit))


def _told(s: Step[facts.Exited | facts.Emptied], exit_: Exit) -> Exit:
    """Return an exit as it is told: one that hung was ended by us."""
    return replace(exit_, reason="hung") if s.ctx.child_end == "hung" else exit_


def report_exit(s: Step[facts.Exited]) -> None:
    exit_ = s.fact.exit
    s.emit(commands.ServerEnded(exit_.pid, _how(s, exit_.returncode)))
    s.put(child_end="reported")


def _how(s: Step[facts.Exited | facts.Emptied], returncode: int | None) -> commands.End:
    """Return how a server ended that we did not stop."""
    return "hung" if s.ctx.child_end == "hung" else _ending(returncode)[0]


def record_hang(s: Step[facts.Hung]) -> None:
    """Its end is reported when it has ended."""
    s.put(last_exit=s.fact.exit, child_end="hung")


def record_death(s: Step[facts.BecameReady | facts.NotReady]) -> None:
    """The probe may find the server dead before its exit is noticed."""
    if isinstance(s.fact, facts.BecameReady):
        is_dead = not s.fact.child_is_alive
    else:
        is_dead = s.fact.problem.category == "server_start_failed"
    if is_dead and s.ctx.child_end is None:
        s.put(child_end="found")


def plan_recovery(s: Step[facts.Exited | facts.Hung]) -> None:
    """The healthy server has ended by itself, or hangs: plan a restart, unless a load is due."""
    exit_, running = s.fact.exit, require(s.ctx.running)
    text, number = f"the server {_ending(exit_.returncode)[1]}", running.generation
    if isinstance(s.fact, facts.Hung):
        text = f"the server hung: neither an answer nor any work for {s.fact.silent_s:.3g} s"
    problem = Problem("server_exited", text, generation=number, log_tail=exit_.log_tail)
    if s.ctx.policy.restart is None or s.ctx.is_due:
        follows = "another load follows" if s.ctx.is_due else "load the model again"
        s.put(last_error=replace(problem, message=f"{problem.message}: {follows}"))
    else:
        ran_s = s.fact.at - running.at
        s.plan_restart(running.target, running.generation, problem, ran_s)


def enqueue_restart(s: Step[facts.Fact]) -> None:
    recovery = require(s.ctx.recovery)
    s.enqueue_own(recovery.target, recovery.problem)
    s.put(recovery=replace(recovery, phase="trying"))


def forget_restart(s: Step[facts.TimerFired]) -> None:
    """The load that is due takes its place."""
    s.put(recovery=None)


def drop_stale(s: Step[facts.Report]) -> None:
    s.emit(commands.DropStale(s.fact.generation, s.fact.trigger))


def _ending(returncode: int | None) -> tuple[Literal["exit", "signal", "unknown"], str]:
    if returncode is None:
        return "unknown", "ended with an unknown status"
    if returncode < 0:
        return "signal", f"was killed by signal {-returncode}"
    return "exit", f"exited with status {returncode}"


def grant_lease(s: Step[facts.LeaseRequested]) -> None:
    _grant(s, s.fact.ticket)


def grant_waiting_leases(s: Step[facts.Fact]) -> None:
    for ticket in s.ctx.lease_waiters:
        _grant(s, ticket)
    s.put(lease_waiters=())


def _grant(s: Step[facts.Fact], ticket: Ticket) -> None:
    running = require(s.ctx.running)
    lease = commands.LeaseGranted(running.target, running.child, running.server)
    s.emit(commands.Settle(ticket, lease))


def wait_for_lease(s: Step[facts.LeaseRequested]) -> None:
    s.put(lease_waiters=(*s.ctx.lease_waiters, s.fact.ticket))


def refuse_lease(s: Step[facts.LeaseRequested]) -> None:
    s.answer(NOT_LOADED)


def enter_idle(s: Step[facts.Fact]) -> None:
    """The slot is at rest: nothing is left to restore, and a restart is over or still planned."""
    recovery = s.ctx.recovery
    if recovery is not None and recovery.phase == "trying":
        recovery = None
    s.put(previous=None, recovery=recovery)
    if not s.ctx.wanted:
        s.refuse_waiting_leases()


def revoke_leases(s: Step[facts.Fact]) -> None:
    """Wait for no lease any more, and grant none."""
    if s.ctx.gate == "open":
        _close_gate(s, drains=False)
    elif s.ctx.gate == "draining":
        s.put(gate=None)
        s.emit(commands.StopTimer(require(s.ctx.child).generation, "drain"))


def _close_gate(s: Step[facts.Fact], *, drains: bool) -> Generation:
    running = require(s.ctx.running)
    s.put(gate="draining" if drains else None)
    s.emit(commands.CloseGate(running.generation, drains))
    if running.idle_ttl_s is not None:
        s.emit(commands.StopTimer(running.generation, "idle"))
    return running.generation


def cut_leases(s: Step[facts.UnloadRequested]) -> None:
    """End the requests that use the server, instead of waiting for them, if the unload says so."""
    if s.fact.cut:
        revoke_leases(s)


def start_idle_timer(s: Step[facts.Fact]) -> None:
    """Start the idle time over, unless the server is pinned or has no idle time."""
    running = require(s.ctx.running)
    request = running.target.request
    ttl_s = s.ctx.policy.idle_ttl_s if request.idle_ttl_s is None else request.idle_ttl_s
    if request.pinned:
        ttl_s = None
    s.put(running=replace(running, wanted_at=s.fact.at, idle_ttl_s=ttl_s))
    if ttl_s is not None:
        s.emit(commands.SetTimer(running.generation, "idle", ttl_s))


def wait_until_idle(s: Step[facts.TimerFired]) -> None:
    s.emit(commands.SetTimer(s.fact.generation, "idle", require(s.fact.idle_in_s)))
