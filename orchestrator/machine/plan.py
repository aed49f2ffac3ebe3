"""What a load would do: the answer of the table, without the effects."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record
from orchestrator.base.redaction import redact
from orchestrator.base.tokens import Ticket
from orchestrator.errors import Problem
from orchestrator.machine.commands import Accept, Loaded, Settle
from orchestrator.machine.context import Context
from orchestrator.machine.facts import LoadRequested, LookUpRequested
from orchestrator.machine.states import State
from orchestrator.machine.step import step
from orchestrator.settings.argv import build_argv
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.memory import Memory
from orchestrator.settings.target import ReloadReason, Target, differences

Action = Literal["none", "load", "reload"]


@dataclass(frozen=True, slots=True)
class Plan(Record):
    """What a load would do now.

    Attributes:
        action: `none` if the model is running or loading already, else `load` or `reload`.
        reload_reasons: The differences from the running server.
        argv: The command line that it would start, with secrets redacted.
        note: A remark, e.g. that the Hub has a newer revision than the one that runs.
        memory: What the server would take; None if nothing would be started.
        free: MiB by device that it would find, once the running server is stopped.
        evict: In a pool: the models that would be stopped for it.
        fits: Whether it would, perhaps with a smaller context where that is Auto; None if it is not
            known.
        names: Display names of the local paths in it.
    """

    action: Action
    reload_reasons: list[ReloadReason]
    argv: list[str]
    note: str | None = None
    memory: Memory | None = None
    free: dict[str, int] | None = None
    fits: bool | None = None
    evict: list[str] | None = None
    names: PathNames = field(default=(), compare=False, repr=False)

    def as_dict(self) -> dict[str, object]:
        optional = {"note", "evict"} | (set() if self.memory else {"memory", "free", "fits"})
        members = Record.as_dict(self)
        return {n: v for n, v in members.items() if v is not None or n not in optional}


class Planned(NamedTuple):
    """A plan, and what would be started."""

    plan: Plan
    target: Target


def plan_load(
    state: State,
    ctx: Context,
    target: Target,
    *,
    kept: ModelFiles | None = None,
    at: float = 0.0,
) -> Planned:
    """Return what a load of `target` would do in this state.

    Args:
        kept: See `LoadRequested`.
        at: Monotonic seconds.

    Raises:
        OrchestratorError: the load would be refused at once.
    """
    plan = partial(_plan, keeps_prompts=ctx.policy.keeps_prompts)
    ticket = Ticket(sys.maxsize)  # newer than every call
    asked = step(state, ctx, LookUpRequested(ticket, target.request, "load", at))
    stepped = step(state, asked.ctx, LoadRequested(ticket, target, at, kept=kept))
    before = [ctx.running.target] if ctx.running else []
    before += [job.target for job in stepped.ctx.wanted[:-1]]
    for command in (*asked.commands, *stepped.commands):
        match command:
            case Settle(answer=Problem() as problem) if command.ticket == ticket:
                raise problem.error()
            case Settle(answer=Loaded() as loaded) if command.ticket == ticket:
                return plan("none", loaded.target)
            case Accept(joined=True, generation=joined) if command.ticket == ticket:
                shared = next(job for job in stepped.ctx.wanted if job.generation == joined)
                return plan("none", shared.target)
    newest = stepped.ctx.wanted[-1]
    committed = {**dict(ctx.committed_args), **{t.source: t.extra_args for t in before}}
    effective = newest.target.inheriting(committed)
    if not before:
        return plan("load", effective)
    reasons = newest.reload_reasons or differences(before[-1], effective)
    return plan("reload", effective, reasons)


def _plan(
    action: Action,
    target: Target,
    reasons: tuple[ReloadReason, ...] = (),
    *,
    keeps_prompts: bool,
) -> Planned:
    template = "<chat template>" if target.request.chat_template_override else None
    prompts = "<prompts>" if keeps_prompts else None
    whole = build_argv(target, template_file=template, prompts_folder=prompts)
    argv = [redact(token) for token in whole]
    names = (*target.names, *(name for reason in reasons for name in reason.names))
    return Planned(Plan(action, list(reasons), argv, names=names), target)
