"""What a load needs of this machine, looked up before anything is decided.

Whatever can be known without the new server is checked here, so that a load that cannot succeed
costs the running model nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from orchestrator.base.tokens import CancelToken, Generation, Ticket
from orchestrator.errors import OrchestratorError
from orchestrator.machine.commands import LookUp
from orchestrator.machine.facts import LoadRequested, ModelRequested, PrefetchRequested
from orchestrator.machine.plan import Plan, Planned, plan_load
from orchestrator.models.local import check_named_files
from orchestrator.models.source import ModelSource
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.sizes import Sizes
from orchestrator.runtime.snapshot import Snapshot
from orchestrator.settings.argv import build_argv
from orchestrator.settings.extra_args import check_known, template_of
from orchestrator.settings.files import HubModel, ModelFiles
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import NO_SERVER, ServerBinary, Target, keeps_commit
from orchestrator.settings.template import check_template

_NO_LOAD = Generation(0)
_LOG_S = 3.0


@dataclass(frozen=True, slots=True)
class Found:
    """A load's target; `kept` is explained in `LoadRequested`."""

    target: Target
    kept: ModelFiles | None

    def fact(self, ticket: Ticket, at: float) -> LoadRequested:
        return LoadRequested(ticket, self.target, at, kept=self.kept)

    def plan(self, snapshot: Snapshot, at: float) -> Planned:
        return plan_load(snapshot.state, snapshot.ctx, self.target, kept=self.kept, at=at)


class LookUps:
    """The look-ups of one orchestrator.

    Args:
        llama_server: Names the binary, see `Facade`.
        cache: Folder for the flags of binaries.

    Attributes:
        alias: Name of the models in answers of their servers; None = each its own.
    """

    def __init__(
        self, parts: Parts, source: ModelSource, llama_server: str, cache: Path, sizes: Sizes
    ) -> None:
        self._parts = parts
        self._source = source
        self._llama_server = llama_server
        self._cache = cache
        self._sizes = sizes
        self._turn = threading.Lock()
        self.alias: str | None = None

    def server(self) -> ServerBinary:
        return self._parts.server(self._llama_server)

    def catalogue(self, server: ServerBinary, *patience_s: float) -> Catalogue | None:
        with self._turn:  # many may ask at once what one run of the binary answers
            return self._parts.catalogue(server, self._cache, *patience_s)

    def answer(self, command: LookUp, snapshot: Snapshot) -> ModelRequested:
        """Look up the model of a call; it may take any time."""
        ticket, request, clock = command.ticket, command.request, self._parts.clock
        if command.purpose == "load":
            return self.find(request, snapshot, clock()).fact(ticket, clock())
        target = Target(request, self._source.look_up(request), NO_SERVER)
        return PrefetchRequested(ticket, target, clock())

    def find(self, request: LoadRequest, snapshot: Snapshot, at: float) -> Found:
        """Look up the model and the server, and refuse what this server cannot do."""
        self._source.check_args(request.llama_extra_args or ())
        model, server = self._source.look_up(request), self.server()
        wanted = Target(request, model, server, self.alias)
        found = Found(wanted, self._kept(request, model, snapshot))
        target = replace(found.target, model=found.kept or model)
        args = target.inheriting(dict(snapshot.ctx.committed_args)).extra_args
        if _needs_nothing(found, snapshot, at):
            return found
        self._check_template(request.chat_template_override, "chat_template_override")
        check_named_files(args)
        self._check_template(template_of(args), "llama_extra_args")
        needs = args or target.speculative_type or snapshot.ctx.policy.keeps_prompts
        # without such a need only the JSON log is asked for, for which no load waits long
        patience_s = () if needs else (min(_LOG_S, request.stall_timeout_s / 4),)
        if (catalogue := self.catalogue(server, *patience_s)) is not None:
            check_known(args, catalogue)
        server = replace(server, catalogue=catalogue)
        # raises if the binary lacks the drafting type
        build_argv(replace(target, server=server), template_file=None)
        return replace(found, target=replace(found.target, server=server))

    def target(self, request: LoadRequest, snapshot: Snapshot, at: float) -> Target:
        """Return what a load would start, with the sizes of a model that is not on disk yet."""
        target = self.find(request, snapshot, at).target
        if target.model.is_resolved or target.model.is_on_disk:
            return target
        return replace(target, model=self._ask(request))

    def _check_template(self, template: str | None, field: str) -> None:
        if template is not None:
            with self._turn:  # hundreds that compute at once would leave the owner no time
                check_template(template, field)

    def plan(self, request: LoadRequest, snapshot: Snapshot, at: float) -> Plan:
        """Return what a load would do; asks the Hub for what the cache does not answer."""
        found, running = self.find(request, snapshot, at), snapshot.ctx.running
        (plan, target), model = found.plan(snapshot, at), found.target.model
        has_moved = any(reason.field == "revision" for reason in plan.reload_reasons)
        is_known = model.is_settled or (model.is_on_disk and not has_moved)
        if running is not None and found.kept is not None:
            plan = replace(plan, note=self._moved(request, found.kept, since=running.at))
        elif plan.action != "none" and not is_known:
            asked = replace(found.target, model=self._ask(request))
            plan, target = replace(found, target=asked).plan(snapshot, at)
        if plan.action == "none":
            return plan
        room = self._sizes.room(target, running)
        return replace(plan, memory=room.memory, free=room.free, fits=room.fits)

    def _ask(self, request: LoadRequest, since: float = 0.0) -> ModelFiles:
        recent = self._source.recent(request, since)
        return recent or self._source.resolve(request, CancelToken(_NO_LOAD))

    def _moved(self, request: LoadRequest, kept: ModelFiles, since: float) -> str | None:
        """Return a remark if the revision has moved since the model was loaded, or may have."""
        ours = cast("HubModel", kept.hub)
        try:
            newest = cast("HubModel", self._ask(request, since).hub)
        except OrchestratorError as error:
            return f"a newer revision may be there: {error.message}"
        if newest.note is not None or newest.commit == ours.commit:
            return newest.note
        return (
            f"a newer revision is there: {newest.commit} ({ours.commit} is running); set "
            "force_reload to load it"
        )

    def _kept(
        self, request: LoadRequest, model: ModelFiles, snapshot: Snapshot
    ) -> ModelFiles | None:
        running = snapshot.ctx.running
        if running is None or model.hub is None or not keeps_commit(running.target, request):
            return None
        ours = running.target.model
        is_found = model.is_on_disk and model.variant == ours.variant
        if is_found and ours.hub is not None and model.hub.commit == ours.hub.commit:
            return replace(model, hub=replace(model.hub, is_settled=True))
        return self._source.look_up_at(request, ours)


def _needs_nothing(found: Found, snapshot: Snapshot, at: float) -> bool:
    """Whether this model is loaded already, so that its server need not be asked."""
    if snapshot.ctx.running is None and not snapshot.ctx.wanted:
        return False
    try:
        return found.plan(snapshot, at).plan.action == "none"
    except OrchestratorError:
        return False
