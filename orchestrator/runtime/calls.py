"""What both facades share: construction, the owner's life, looking up and asking, and reading.

A call takes its place in the order of calls, looks up what it names and posts one fact; nothing
here decides, and what only reads takes no lock. How a call waits for its answer is the facade's.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, TypeVar, Unpack, cast

from orchestrator.base import paths
from orchestrator.base.tokens import CancelToken, Generation, Ticket
from orchestrator.errors import (
    InvalidRequest,
    MalformedRequest,
    OrchestratorError,
    Problem,
    ShuttingDown,
    WrongProcess,
)
from orchestrator.machine.commands import Prefetched
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.facts import (
    CancelRequested,
    LeaseReleased,
    LeaseRequested,
    LoadRequested,
    PrefetchRequested,
    ShutdownRequested,
    UnloadRequested,
)
from orchestrator.machine.plan import Plan, plan_load
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from orchestrator.models.listings import Listings
from orchestrator.models.roots import Folder, model_roots
from orchestrator.models.variants import Variant
from orchestrator.runtime import answers
from orchestrator.runtime.answers import LoadOutcome, LoadProgress, Options, PastLoad, Status
from orchestrator.runtime.history import History, LoadRecord
from orchestrator.runtime.names import KnownNames
from orchestrator.runtime.owner import Call, Owner
from orchestrator.runtime.parts import Parts, ServerSettings
from orchestrator.runtime.snapshot import Observer
from orchestrator.server.slot import cache_dir
from orchestrator.settings.argv import build_argv
from orchestrator.settings.checks import checked_seconds
from orchestrator.settings.drafting import accepted_modes
from orchestrator.settings.fields import SETTINGS, LoadFields, StrPath
from orchestrator.settings.flags import CACHE_TYPES
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import NO_SERVER, Target

_T = TypeVar("_T")
Wanted = LoadRequest | StrPath | None
"""What a call is about: a request, a `model_path`, or nothing but fields by name."""
_NO_LOAD: Final = Generation(0)


class Facade:
    """What both facades share: construction, the owner's life, and everything that only reads.

    Args:
        llama_server: A path, `"auto"` (LLAMA_SERVER_PATH, PATH, embedded) or `"embedded"`.
        slot: Name of the process slot; one orchestrator per slot, one server per orchestrator.
        state_dir: Folder of the slots; default: this user's state directory.
        kill_grace_s: Seconds between SIGTERM and SIGKILL; 0 = SIGKILL at once.
        drain_timeout_s: Seconds a swap or an unload waits for leases to be given back.
        drain_policy: `wait` for them so long, or `cut` what uses the server at once.
        abandoned_load: `cancel` or `continue` a load whose last caller has gone away.
        restart: `never`, or `on-crash`: a healthy server that ends by itself is started again,
            with the waits of `RestartPolicy` (which may be given instead).
        idle_ttl_s: Seconds without use after which a model is unloaded; None = never. A request's
            own `idle_ttl_s` wins, and a `pinned` model stays.
        server_env: Variables the server gets beside the allow-listed ones.
        models_dir: One or several folders that local models are confined to; names that are not
            absolute are looked for in them. Empty = anywhere.
        parts: What it is made of; None = what runs real servers.
        protect_server: Give every server a random key, so that nobody but `lease()` and the
            pass-through can use it: `base_url` alone is not enough any more. Keys instead of True
            are taken by every server beside its own, for local clients that are given one.

    Raises:
        InvalidRequest: a setting is not usable; names the field.
    """

    def __init__(
        self,
        *,
        llama_server: str | os.PathLike[str] = "auto",
        slot: str = "default",
        state_dir: str | os.PathLike[str] | None = None,
        kill_grace_s: float = 5.0,
        drain_timeout_s: float = 30.0,
        drain_policy: Literal["wait", "cut"] = "wait",
        abandoned_load: Literal["cancel", "continue"] = "cancel",
        restart: Literal["never", "on-crash"] | RestartPolicy = "never",
        idle_ttl_s: float | None = None,
        server_env: Mapping[str, str] | None = None,
        models_dir: Folder | Iterable[Folder] = (),
        protect_server: bool | Iterable[str] = False,
        parts: Parts | None = None,
    ) -> None:
        _check_choice("abandoned_load", abandoned_load, "cancel", "continue")
        _check_choice("drain_policy", drain_policy, "wait", "cut")
        self._llama_server = os.fspath(llama_server)
        self._slot_name = slot
        self._state_dir = state_dir
        self._parts = parts or Parts()
        grace_s = checked_seconds("kill_grace_s", kill_grace_s)
        drain_s = checked_seconds("drain_timeout_s", drain_timeout_s)
        drain_s = drain_s if drain_policy == "wait" else 0.0
        if idle_ttl_s is not None:
            idle_ttl_s = checked_seconds("idle_ttl_s", idle_ttl_s, zero=False)
        self._policy = Policy(drain_s, abandoned_load, _restart_policy(restart), idle_ttl_s)
        keys = _server_keys(protect_server)
        self._servers = ServerSettings(grace_s, dict(server_env or {}), keys)
        roots = model_roots(models_dir)
        state = paths.names_of_own(self._cache.parent, "<state>")
        self._known = KnownNames((state, roots.names if roots else ()))
        self._source = self._parts.source(self._cache / "hub", roots)
        self._listings = Listings(self._source, self._parts.workers)
        self._owner: Owner | None = None
        self._pid = 0
        self._is_closed = False
        self._life = threading.Lock()  # starting and closing, nothing else
        self._tickets = itertools.count(1)
        self._observers: list[Observer] = []

    # -------------------------------------------------------------------------------- life

    def _start(self) -> Owner:
        """Claim the slot and start the owner, once; later calls return it."""
        owner = self._owner
        if owner is None:
            with self._life:
                if self._owner is None:
                    self._claim()
                owner = cast("Owner", self._owner)
        if self._pid != os.getpid():
            raise WrongProcess.because(
                f"this orchestrator belongs to process {self._pid}: make one in this process, "
                "with a slot of its own",
                field="slot",
            )
        if self._is_closed:
            raise ShuttingDown.because("this orchestrator has been closed: make a new one")
        return owner

    def _claim(self) -> None:
        if self._is_closed:
            raise ShuttingDown.because("this orchestrator has been closed: make a new one")
        parts = self._parts
        slot = parts.slot(self._slot_name, self._state_dir)
        slot.claim()
        try:
            owner = parts.owner(
                lambda post: parts.effects(slot, post, self._source, self._servers),
                policy=self._policy,
                observers=self._observers,
                tickets=self._tickets,
            )
        except BaseException:
            slot.release()
            raise
        owner.start(slot.name)
        self._pid = os.getpid()
        self._owner = owner  # last: who sees it needs no lock and uses all of the above
        parts.at_exit(self._close)

    def _close(self) -> None:
        """End everything: cancel loads, stop the server, give the slot back. Idempotent.

        Raises:
            SlotOccupied: something of the slot would not die; the slot is given up all the same.
        """
        if self._owner is not None and self._pid != os.getpid():
            return  # a fork may have copied the lock while it was held
        with self._life:
            self._is_closed, owner = True, self._owner
            self._listings.close()
            if owner is None or owner.has_ended:
                return
            call = owner.call()
            owner.ask(call, ShutdownRequested(call.ticket, owner.clock()))
            answer = self._wait(call.settled, call)  # who interrupts this may close again
            owner.stop()
            self._parts.not_at_exit(self._close)
        if isinstance(answer, Problem):
            raise answer.error()

    # ----------------------------------------------------------------------- only reading

    def status(self) -> Status:
        """Return what is true right now. Never blocks; a decision belongs into a request."""
        owner = self._owner
        if owner is None:
            return answers.not_started()
        return answers.status(owner.snapshot, owner.clock(), owner.effects.progress)

    def progress(self) -> LoadProgress:
        """Return how far the load in flight is."""
        owner = self._owner
        if owner is None:
            return LoadProgress(None, None, None, None)
        return answers.progress(owner.snapshot, owner.effects.progress)

    def observe(self, observer: Observer) -> None:
        """Have `observer` called after every step from now on, with what it did.

        It runs on the owner's thread: it must be quick, and must not call the orchestrator back.
        """
        self._observers.append(observer)

    @property
    def lease_count(self) -> int:
        """How many leases are held right now."""
        return len(self._owner.snapshot.ctx.leases) if self._owner else 0

    @property
    def last_event_id(self) -> int:
        """Number of the newest event; 0 when nothing has happened yet."""
        return self._owner.events.last_id if self._owner else 0

    def logs(self, lines: int = 200) -> tuple[str, ...]:
        """Return the last lines the present (or last) server printed, oldest first."""
        return self._owner.effects.log_tail(lines) if self._owner else ()

    def plan(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> Plan:
        """Return what `load` would do with this request now, and why, without doing it.

        Looks the model and the server up on disk before it returns, also in `AsyncOrchestrator`,
        and asks the Hub for a model that is not whole in its cache (for one that was asked for
        within the last minute, not again). Where that must not hold the event loop up, call it by
        `asyncio.to_thread`.

        Raises:
            OrchestratorError: as `load` would before anything is stopped: a setting, the model, the
                server, the Hub.
        """
        wanted = request_of(request, fields)
        target = self._target(wanted)
        plan = self._plan(target)
        model = target.model
        if plan.action == "none" or model.is_settled or model.is_on_disk:
            return plan
        known = self._source.recent(wanted)
        known = known or self._source.resolve(wanted, CancelToken(_NO_LOAD))
        return self._plan(replace(target, model=known))

    def _plan(self, target: Target) -> Plan:
        if self._owner is None and not self._is_closed:
            return plan_load(State.IDLE, Context(self._policy), target)
        owner = self._start()
        snapshot, now = owner.snapshot, owner.clock()
        return plan_load(snapshot.state, snapshot.ctx, target, at=now)

    def outcome(self, generation: int) -> LoadOutcome | Problem | None:
        """Return what became of a load; None while it is in flight.

        Raises:
            KeyError: no such generation, or so old that it has been forgotten.
        """
        return self.past_load(generation).outcome

    def past_load(self, generation: int) -> PastLoad:
        """Return one load, ended or in flight; raises KeyError as `outcome`."""
        if self._is_untouched:
            raise KeyError(generation)
        in_flight, ended = self._loads(self._start())
        number = Generation(generation)
        return answers.past_load(ended[number]) if number in ended else in_flight[number]

    def history(self, limit: int = 20) -> list[PastLoad]:
        """Return the last loads, newest first, those in flight among them."""
        if self._owner is None:
            return []
        in_flight, ended = self._loads(self._owner)
        newest = sorted({*in_flight, *ended}, reverse=True)[: max(0, limit)]
        return [answers.past_load(ended[g]) if g in ended else in_flight[g] for g in newest]

    @staticmethod
    def _loads(
        owner: Owner,
    ) -> tuple[dict[Generation, PastLoad], dict[Generation, LoadRecord]]:
        """Return the loads in flight and those that have ended. In this order: what ends meanwhile
        is in both, and what has ended counts.
        """
        in_flight = answers.loads_in_flight(owner.snapshot, owner.clock())
        return in_flight, dict(owner.history.records)  # copied in one go

    def options(self) -> Options:
        """Return the values that settings may have. Asks the server binary, once.

        Raises:
            ServerUnavailable: there is none.
        """
        catalogue = self._parts.catalogue(self._parts.server(self._llama_server), self._cache)
        return Options(list(CACHE_TYPES), accepted_modes(catalogue))

    def known_paths(self) -> tuple[paths.PathNames, ...]:
        """Return what every path is called that it could tell of now, for whoever shows its texts
        to strangers; the same tuple as before as long as nothing that has paths has changed.
        """
        owner = self._owner
        if owner is None:
            return self._known.now(Context(self._policy), History())
        return self._known.now(owner.snapshot.ctx, owner.history)

    @property
    def _is_untouched(self) -> bool:
        """Nobody has used it yet: there is nothing to read, and reading claims no slot."""
        return self._owner is None and not self._is_closed

    # ------------------------------------------------------------------------------ asking

    def _ticket(self) -> Ticket:
        return Ticket(next(self._tickets))

    def _target(self, request: LoadRequest) -> Target:
        self._source.check_args(request.llama_extra_args or ())
        model, server = self._source.look_up(request), self._parts.server(self._llama_server)
        target = Target(request, model, server)
        if target.speculative_type is not None:
            catalogue = self._parts.catalogue(server, self._cache)
            server = replace(server, catalogue=catalogue)
            target = replace(target, server=server)
            build_argv(target, template_file=None)  # refuses what this binary cannot do
        return target

    @property
    def _cache(self) -> Path:
        """What is worth keeping about this machine, whatever the slot."""
        return cache_dir(self._state_dir)

    def _ask_load(self, call: Call, request: LoadRequest) -> None:
        """Look up what the request names and post it; a refusal is an answer to the call.

        Looked up before anything is stopped: a load that cannot succeed costs nobody anything.
        """
        owner = cast("Owner", self._owner)
        self._ask_about(
            call, lambda: LoadRequested(call.ticket, self._target(request), owner.clock())
        )

    def _ask_prefetch(self, call: Call, request: LoadRequest) -> None:
        """As `_ask_load`; what is local is here."""

        owner = cast("Owner", self._owner)

        def fact_or_answer() -> PrefetchRequested | Prefetched:
            model = self._source.look_up(request)
            if model.hub is None:
                return Prefetched(model)
            target = Target(request, model, NO_SERVER)
            return PrefetchRequested(call.ticket, target, owner.clock())

        self._ask_about(call, fact_or_answer)

    def _ask_about(
        self, call: Call, look_up: Callable[[], LoadRequested | PrefetchRequested | Prefetched]
    ) -> None:
        owner = cast("Owner", self._owner)
        try:
            found = look_up()
        except OrchestratorError as error:
            owner.answer(call, error.problem)
        except BaseException as error:
            owner.answer(call, Problem("internal", repr(error)))
            raise
        else:
            if isinstance(found, Prefetched):
                owner.answer(call, found)
            else:
                owner.ask(call, found)

    def _begin_listing(self, request: LoadRequest) -> Future[list[Variant]]:
        if self._is_closed:
            raise ShuttingDown.because("this orchestrator has been closed: make a new one")
        return self._listings.begin(request)

    def _ask_unload(self, model_path: str | None, ticket: Ticket | None = None) -> Call:
        owner = self._start()
        call = owner.call(ticket)
        model = model_path.strip() if model_path is not None else None
        owner.ask(call, UnloadRequested(call.ticket, model or None, owner.clock()))
        return call

    def _ask_cancel(self, request_id: str | None, generation: int | None) -> Call:
        if (request_id is None) == (generation is None):
            raise InvalidRequest.because(
                "give exactly one of load_request_id and generation", field="load_request_id"
            )
        owner = self._start()
        call = owner.call()
        owner.ask(call, CancelRequested(call.ticket, request_id, generation, owner.clock()))
        return call

    def _wait(self, future: Future[_T], call: Call) -> _T:
        """Wait for what a call is told; an interrupted wait withdraws the caller."""
        try:
            return self._parts.wait(future)
        except BaseException:
            call.settled.cancel()
            raise

    def _ask_lease(self) -> Call:
        owner = self._start()
        call = owner.call()
        owner.ask(call, LeaseRequested(call.ticket, owner.clock()))
        return call

    def _end_lease(self, call: Call) -> None:
        owner = cast("Owner", self._owner)
        owner.post(LeaseReleased(call.ticket, owner.clock()))


def request_of(request: Wanted, given: LoadFields) -> LoadRequest:
    """Return the request of a call: the one given, with these changes, or made of its fields.

    Raises:
        MalformedRequest: a field is unknown, missing, given twice, or has the wrong type.
        InvalidRequest: a field has a value that cannot be honoured.
    """
    if isinstance(request, LoadRequest):
        values = {name: getattr(request, name) for name in SETTINGS}
        return LoadRequest.from_dict({**values, **given}) if given else request
    if request is None:
        return LoadRequest(**given)
    if "model_path" in given:
        message = "model_path is given twice: by its place and by its name"
        raise MalformedRequest.because(message, field="model_path")
    return LoadRequest.from_dict({"model_path": request, **given})


def _server_keys(protect_server: object) -> tuple[str, ...] | None:
    """Return the keys that open a server beside its own; None = it needs no key.

    Raises:
        InvalidRequest: not a key that can be given to a server (field `protect_server`).
    """
    if isinstance(protect_server, bool):
        return () if protect_server else None
    keys = (protect_server,) if isinstance(protect_server, str) else protect_server
    given = tuple(keys) if isinstance(keys, Iterable) else (None,)
    for key in given:
        if not isinstance(key, str) or not key.isprintable() or not key.isascii() or "," in key:
            message = "protect_server is True, False, or keys of printable ASCII without a comma"
            raise InvalidRequest.because(message, field="protect_server")
        if not key.strip():
            raise InvalidRequest.because("an API key must not be empty", field="protect_server")
    return given


def _check_choice(field: str, value: object, *choices: str) -> None:
    if value not in choices:
        message = f"{field} is {value!r}: use {' or '.join(choices)}"
        raise InvalidRequest.because(message, field=field)


def _restart_policy(restart: object) -> RestartPolicy | None:
    """Return the policy a caller means, checked.

    Raises:
        InvalidRequest: names the field.
    """
    if restart == "never":
        return None
    policy = RestartPolicy() if restart == "on-crash" else restart
    if not isinstance(policy, RestartPolicy):
        message = f"restart is {restart!r}: use never, on-crash or a RestartPolicy"
        raise InvalidRequest.because(message, field="restart")
    for name in ("backoff_s", "backoff_max_s", "cool_down_s", "stable_after_s"):
        checked_seconds(f"restart.{name}", policy[name])
    if not isinstance(policy.limit, int) or isinstance(policy.limit, bool) or policy.limit < 1:
        message = f"restart.limit is {policy.limit!r}: use a whole number from 1"
        raise InvalidRequest.because(message, field="restart.limit")
    return policy
