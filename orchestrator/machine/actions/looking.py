"""The model of a call is looked up on disk, which takes its time: until then it is no load."""

from __future__ import annotations

from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem
from orchestrator.machine import commands, facts
from orchestrator.machine.actions.working import MAX_REMEMBERED, Step, require
from orchestrator.machine.context import LookUp
from orchestrator.machine.guards import look_up_of


def refuse_look_up(s: Step[facts.LookUpRequested]) -> None:
    message = (
        f"the models of {s.ctx.policy.max_looking} calls are being looked up: try again later, and "
        "check that their disks answer"
    )
    s.answer(Problem("busy", message, field="model_path"))


def begin_look_up(s: Step[facts.LookUpRequested]) -> None:
    fact, name = s.fact, s.fact.request.load_request_id
    if name is not None:
        others = tuple(seen for seen in s.ctx.seen_ids if seen != name)
        s.put(seen_ids=(*others, name)[-MAX_REMEMBERED:])
    look_up = LookUp(fact.ticket, fact.request, fact.purpose, fact.at)
    s.put(look_ups=(*s.ctx.look_ups, look_up))
    s.emit(commands.LookUp(fact.ticket, fact.request, fact.purpose))
    limit_s, _ = _limit(look_up)
    s.emit(commands.SetTimer(Generation(fact.ticket), "look_up", limit_s))


def fail_look_up(s: Step[facts.LookUpFailed]) -> None:
    s.answer(s.fact.problem)


def time_out_look_up(s: Step[facts.TimerFired]) -> None:
    look_up = require(look_up_of(s.ctx, Ticket(s.fact.generation)))
    limit_s, name = _limit(look_up)
    message = (
        f"{look_up.request.model_path} could not be read within {name} = {limit_s:g} seconds: "
        "check that its disk answers"
    )
    category = "deadline" if name == "deadline_s" else "stalled"
    s.end_look_ups((look_up,), Problem(category, message, field=name))


def drop_late_look_up(s: Step[facts.LookedUp]) -> None:
    s.emit(commands.DropStale(Generation(0), s.fact.trigger))


def _limit(look_up: LookUp) -> tuple[float, str]:
    """Return the seconds that a look-up may take, and the field that says so."""
    stall_s, deadline_s = look_up.request.stall_timeout_s, look_up.request.deadline_s
    if deadline_s is not None and deadline_s <= stall_s:
        return deadline_s, "deadline_s"
    return stall_s, "stall_timeout_s"
