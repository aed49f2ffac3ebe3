"""Effects begin and end; a server comes, and goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from orchestrator.errors import Problem
from orchestrator.machine.actions.outcomes import conclude, enqueue_own, plan_restart
from orchestrator.machine.actions.working import (
    MAX_REMEMBERED_SOURCES,
    Step,
    known,
    next_phase,
    promote_next,
)
from orchestrator.machine.commands import (
    Download,
    DropStale,
    Kill,
    Probe,
    ServerEnded,
    SetTimer,
    Spawn,
)
from orchestrator.machine.context import EffectInFlight, Running
from orchestrator.machine.facts import (
    BecameReady,
    Completion,
    Emptied,
    Exited,
    Fact,
    Fetched,
    NotReady,
    Promoted,
    Spawned,
    TimerFired,
)
from orchestrator.machine.recovery import after_exit


def begin_kill(s: Step[Fact]) -> None:
    """Empty the slot: at once, or when the leases are given back or their time is over."""
    if s.ctx.leases and s.ctx.child is not None:
        s.emit(SetTimer(s.ctx.child.generation, "drain", s.ctx.policy.drain_timeout_s))
    else:
        kill_when_drained(s)


def kill_when_drained(s: Step[Fact]) -> None:
    if s.ctx.effect is None and not s.ctx.leases:
        generation = s.ctx.job.generation if s.ctx.job else s.ctx.generation
        s.put(effect=EffectInFlight("kill", generation))
        s.emit(Kill(generation, s.ctx.child))


def begin_download(s: Step[Fact]) -> None:
    job = next_phase(s, "kill")
    s.put(effect=EffectInFlight("download", job.generation))
    s.emit(Download(job.generation, job.target))


def begin_spawn(s: Step[Fetched]) -> None:
    fact = s.fact
    job = next_phase(s, "download")
    target = replace(job.target, model=fact.model).inheriting(dict(s.ctx.committed_args))
    job = replace(job, target=target)
    s.put(job=job, effect=EffectInFlight("spawn", job.generation))
    s.emit(Spawn(job.generation, job.target))


def begin_probe(s: Step[Fact]) -> None:
    job = next_phase(s, "spawn")
    s.put(effect=EffectInFlight("probe", job.generation))
    s.emit(
        Probe(
            job.generation,
            known(s.ctx.child),
            job.target.request.stall_timeout_s,
            job.target.model.size_bytes,
            job.target.extra_args,
        )
    )


def record_child(s: Step[Spawned]) -> None:
    """From here on the slot holds this process until its exit is confirmed."""
    s.put(child=s.fact.child, effect=None)


def end_effect(s: Step[Fact]) -> None:
    s.put(effect=None)


def count_attempt(s: Step[Fact]) -> None:
    job = known(s.ctx.job)
    s.put(job=replace(job, attempts=job.attempts + 1, phase_at=s.fact.at))


def forget_child(s: Step[Emptied]) -> None:
    """The exit of everything in the slot is confirmed: the only place where a pid is dropped."""
    exit_ = s.fact.exit
    if s.ctx.child is not None and s.ctx.end_is_known != "told":
        by_itself = s.ctx.end_is_known == "found"
        how = how_it_exited(exit_.returncode if exit_ else None) if by_itself else "stopped"
        s.emit(ServerEnded(s.ctx.child.pid, how))
    s.put(child=None, end_is_known=None, running=None, effect=None)
    s.put(last_exit=exit_ or s.ctx.last_exit)


def commit(s: Step[BecameReady]) -> None:
    """The linearization point of a load: it holds, and its settings are kept for later ones."""
    fact = s.fact
    job = next_phase(s, "health")
    timings = replace(job.timings, total=fact.at - job.accepted_at)
    child = known(s.ctx.child)
    running = Running(
        job.generation, job.target, child, fact.server, timings, job.reload_reasons, fact.at
    )
    others = tuple(kept for kept in s.ctx.committed_args if kept[0] != job.target.source)
    committed = (*others, (job.target.source, job.target.extra_args))[-MAX_REMEMBERED_SOURCES:]
    s.put(job=None, running=running, effect=None, committed_args=committed)
    s.put(previous=None, last_error=job.after)  # what a load made good is still worth knowing
    conclude(s, job, running.loaded())
    for caller in job.callers:
        s.settle((caller,), running.loaded(joined=caller.joined))
    promote_next(s)


def record_exit(s: Step[Exited]) -> None:
    s.put(last_exit=s.fact.exit)


def tell_exit(s: Step[Exited]) -> None:
    """It has ended by itself, and is told once, whoever notices it first."""
    exit_ = s.fact.exit
    if s.ctx.end_is_known != "told":
        s.emit(ServerEnded(exit_.pid, how_it_exited(exit_.returncode)))
        s.put(end_is_known="told")


def note_death(s: Step[BecameReady | NotReady]) -> None:
    """Whoever waits for its health may see that it is dead before its exit is noticed."""
    fact = s.fact
    if isinstance(fact, BecameReady):
        is_dead = not fact.child_is_alive
    else:
        is_dead = fact.problem.category == "server_start_failed"
    if is_dead and s.ctx.end_is_known is None:
        s.put(end_is_known="found")


def lose_server(s: Step[Exited]) -> None:
    """The healthy server has ended by itself: it is not loaded any more, and it says why.

    If the policy says so, and nothing else is wanted, it is to be started again.
    """
    exit_, running = s.fact.exit, known(s.ctx.running)
    how = "with an unknown status" if exit_.returncode is None else how_it_ended(exit_.returncode)
    problem = Problem(
        "server_exited",
        f"the server ended by itself {how}",
        generation=running.generation,
        log_tail=exit_.log_tail,
    )
    policy, at = s.ctx.policy.restart, s.fact.at
    if policy is None or s.ctx.is_due:
        what = "something else is loaded" if s.ctx.is_due else "load the model again"
        s.put(recovery=None, last_error=replace(problem, message=f"{problem.message}: {what}"))
        return
    recovery = after_exit(
        policy,
        s.ctx.recovery,
        target=running.target,
        generation=running.generation,
        ran_s=at - running.at,
        at=at,
        problem=problem,
    )
    plan_restart(s, recovery)


def enqueue_restart(s: Step[Fact]) -> None:
    """Nobody asked for this load; it has a generation like any other."""
    recovery = known(s.ctx.recovery).trying()
    enqueue_own(s, recovery.target, (), recovery.problem, None)
    s.put(recovery=recovery)


def fence(s: Step[Completion | Exited | Promoted | TimerFired]) -> None:
    s.emit(DropStale(s.fact.generation, s.fact.trigger))


def how_it_exited(returncode: int | None) -> Literal["exit", "signal", "unknown"]:
    if returncode is None:
        return "unknown"
    return "signal" if returncode < 0 else "exit"


def how_it_ended(returncode: int) -> str:
    return f"by signal {-returncode}" if returncode < 0 else f"with exit status {returncode}"
