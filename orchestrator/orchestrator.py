"""The public facades: `Orchestrator` for synchronous code, `AsyncOrchestrator` for asyncio.

Both are thin: a call takes its place in the order of calls, looks up what it names, posts one
fact and waits for its one answer. They may be used from any number of threads and event loops;
a caller that goes away withdraws only itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar, cast

from orchestrator import paths, views
from orchestrator.argv import build_argv
from orchestrator.context import Context, Policy
from orchestrator.download import Hub, is_hub
from orchestrator.effects import ProcessEffects
from orchestrator.errors import (
    InvalidRequest,
    OrchestratorError,
    Problem,
    ShuttingDown,
    WrongProcess,
)
from orchestrator.events import Event, EventLog
from orchestrator.listing import Listings
from orchestrator.messages import (
    Answer,
    CancelAnswer,
    CancelRequested,
    LeaseGranted,
    LeaseReleased,
    LeaseRequested,
    Loaded,
    LoadRequested,
    ShutdownRequested,
    Unloaded,
    UnloadRequested,
)
from orchestrator.models import given_projector, is_local, locate
from orchestrator.owner import Call, Owner
from orchestrator.plan import Plan, checked_seconds, plan_load
from orchestrator.prefetch import Prefetches, download_key
from orchestrator.recovery import RestartPolicy
from orchestrator.request import LoadRequest, ModelFiles, Target
from orchestrator.roots import Folder, model_roots
from orchestrator.server_args import CACHE_TYPES, accepted_modes
from orchestrator.servers import ask_catalogue, find_server
from orchestrator.slot import Slot, cache_dir
from orchestrator.snapshot import Observer
from orchestrator.states import State
from orchestrator.tokens import Generation, Ticket
from orchestrator.variants import Variant
from orchestrator.views import (
    LeasedServer,
    LoadOutcome,
    LoadProgress,
    Options,
    PastLoad,
    PrefetchOutcome,
    Status,
    UnloadOutcome,
    Variants,
)

_T = TypeVar("_T")
_LOG_EVERY_S: Final = 0.2


class _Base:
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
        protect_server: Give every server a random key, so that nobody but `lease()` and the
            pass-through can use it: `base_url` alone is not enough any more.

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
        protect_server: bool = False,
    ) -> None:
        _check_choice("abandoned_load", abandoned_load, "cancel", "continue")
        _check_choice("drain_policy", drain_policy, "wait", "cut")
        self._llama_server = os.fspath(llama_server)
        self._slot_name = slot
        self._state_dir = state_dir
        self._kill_grace_s = checked_seconds("kill_grace_s", kill_grace_s)
        drain_s = checked_seconds("drain_timeout_s", drain_timeout_s)
        drain_s = drain_s if drain_policy == "wait" else 0.0
        if idle_ttl_s is not None:
            idle_ttl_s = checked_seconds("idle_ttl_s", idle_ttl_s, zero=False)
        self._policy = Policy(drain_s, abandoned_load, _restart_policy(restart), idle_ttl_s)
        self._server_env = dict(server_env or {})
        self._roots = model_roots(models_dir)
        self._is_protected = protect_server
        paths.kept_in(self._cache.parent, "<state>")
        self._hub = Hub(self._cache / "hub")
        self._prefetches = Prefetches(self._hub)
        self._listings = Listings(self._hub, self._roots)
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
        slot = Slot(self._slot_name, self._state_dir)
        slot.claim()
        try:
            owner = Owner(
                lambda post: ProcessEffects(
                    slot,
                    post,
                    kill_grace_s=self._kill_grace_s,
                    server_env=self._server_env,
                    hub=self._hub,
                    roots=self._roots,
                    protect_server=self._is_protected,
                ),
                policy=self._policy,
                observers=self._observers,
                tickets=self._tickets,
            )
        except BaseException:
            slot.release()
            raise
        owner.start(slot.name)
        self._intake = ThreadPoolExecutor(4, thread_name_prefix=f"llama-intake-{slot.name}")
        self._pid = os.getpid()
        self._owner = owner  # last: who sees it needs no lock and uses all of the above
        atexit.register(self._close)

    def _close(self) -> None:
        """End everything: cancel loads, stop the server, give the slot back. Idempotent.

        Raises:
            SlotOccupied: something of the slot would not die; the slot is given up all the same.
        """
        if self._owner is not None and self._pid != os.getpid():
            return  # a fork may have copied the lock while it was held
        with self._life:
            self._is_closed, owner = True, self._owner
            self._prefetches.close()
            self._listings.close()
            if owner is None or owner.has_ended:
                return
            call = owner.call()
            owner.ask(call, ShutdownRequested(call.ticket, owner.clock()))
            answer = _wait(call.settled, call)  # who interrupts this may close again
            owner.stop()
            self._intake.shutdown(wait=False)
            atexit.unregister(self._close)
        if isinstance(answer, Problem):
            raise answer.error()

    # ----------------------------------------------------------------------- only reading

    def status(self) -> Status:
        """Return what is true right now. Never blocks; a decision belongs into a request."""
        owner = self._owner
        under_way = self._prefetches.under_way()
        if owner is None:
            return views.not_started(under_way)
        return views.status(owner.snapshot, owner.clock(), under_way)

    def progress(self) -> LoadProgress:
        """Return how far the load in flight is."""
        owner = self._owner
        if owner is None:
            return LoadProgress(None, None, None, None)
        return views.progress(owner.snapshot, owner.effects.progress())

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

    def plan(self, request: LoadRequest | str, **fields: Any) -> Plan:
        """Return what `load` would do with this request now, and why, without doing it.

        Looks the model and the server up on disk before it returns, also in `AsyncOrchestrator`;
        where a slow disk must not hold the event loop up, call it by `asyncio.to_thread`.

        Raises:
            OrchestratorError: as `load` would at once: a setting, the model or the server.
        """
        target, owner = self._target(_request(request, fields)), self._owner
        if owner is None and not self._is_closed:
            return plan_load(State.IDLE, Context(self._policy), target)
        snapshot, now = self._start().snapshot, time.monotonic()
        return plan_load(snapshot.state, snapshot.ctx, target, at=now)

    def outcome(self, generation: int) -> LoadOutcome | Problem | None:
        """Return what became of a load; None while it is in flight.

        Raises:
            KeyError: no such generation, or so old that it has been forgotten.
        """
        if self._is_untouched:
            raise KeyError(generation)
        return views.outcome(self._start().history.records[Generation(generation)].answer)

    def past_load(self, generation: int) -> PastLoad:
        """Return one load, ended or in flight; raises KeyError as `outcome`."""
        if self._is_untouched:
            raise KeyError(generation)
        owner = self._start()
        snapshot = owner.snapshot  # first: a load that it shows has a record
        return views.past_load(owner.history.records[Generation(generation)], snapshot)

    def history(self, limit: int = 20) -> list[PastLoad]:
        """Return the last loads, newest first, those in flight among them."""
        owner = self._owner
        if owner is None:
            return []
        snapshot, records = (
            owner.snapshot,
            tuple(owner.history.records.values()),
        )  # copied in one go
        newest = sorted(records, key=lambda r: r.job.generation, reverse=True)[: max(0, limit)]
        return [views.past_load(record, snapshot) for record in newest]

    def options(self) -> Options:
        """Return the values that settings may have. Asks the server binary, once.

        Raises:
            ServerUnavailable: there is none.
        """
        catalogue = ask_catalogue(find_server(self._llama_server), self._cache)
        return Options(list(CACHE_TYPES), accepted_modes(catalogue))

    @property
    def _is_untouched(self) -> bool:
        """Nobody has used it yet: there is nothing to read, and reading claims no slot."""
        return self._owner is None and not self._is_closed

    # ------------------------------------------------------------------------------ asking

    def _ticket(self) -> Ticket:
        return Ticket(next(self._tickets))

    def _target(self, request: LoadRequest) -> Target:
        if self._roots is not None:
            self._roots.check_args(request.llama_extra_args or ())
        target = Target(request, self._model(request), find_server(self._llama_server))
        if target.speculative_type is not None:
            server = replace(target.server, catalogue=ask_catalogue(target.server, self._cache))
            target = replace(target, server=server)
            build_argv(target, template_file=None)  # refuses what this binary cannot do
        return target

    def _model(self, request: LoadRequest) -> ModelFiles:
        """Return the files of a model, or where it comes from if it is not here yet."""
        if not is_local(request.model_path, self._roots) and is_hub(request.model_path):
            projector = given_projector(request, self._roots)
            model = self._hub.look_up(request)
            return replace(model, projector=projector) if projector is not None else model
        if request.revision is not None:
            message = f"revision is of a Hub model, and {request.model_path} is not one"
            raise InvalidRequest.because(message, field="revision")
        return locate(request, self._roots)

    @property
    def _cache(self) -> Path:
        """What is worth keeping about this machine, whatever the slot."""
        return cache_dir(self._state_dir)

    def _ask_load(self, call: Call, request: LoadRequest) -> None:
        """Look up what the request names and post it; a refusal is an answer to the call.

        Looked up before anything is stopped: a load that cannot succeed costs nobody anything.
        """
        owner = cast("Owner", self._owner)
        try:
            target = self._target(request)
        except OrchestratorError as error:
            owner.refuse(call, error.problem)
        except BaseException as error:
            owner.refuse(call, Problem("internal", repr(error)))
            raise
        else:
            if request.on_busy == "supersede":
                self._supersede_prefetches(request)
            if request.prefetch and not target.model.is_on_disk:
                self._prefetch_first(call, request)
            else:
                owner.ask(call, LoadRequested(call.ticket, target, owner.clock()))

    def _supersede_prefetches(self, newer: LoadRequest) -> None:
        """Loads that still download give way like those that are further on."""
        message = f"superseded by a newer load of {newer.model_path}"
        self._prefetches.end(
            lambda other: other.is_load and download_key(other.request) != download_key(newer),
            Problem("superseded", message),
        )

    def _prefetch_first(self, call: Call, request: LoadRequest) -> None:
        """Post the load when its model is on disk; what runs is left alone until then."""
        owner = cast("Owner", self._owner)
        fetching = self._prefetches.begin(request, is_load=True)

        def go_on(found: Future[ModelFiles]) -> None:
            if found.cancelled():
                return
            error = found.exception()
            if isinstance(error, OrchestratorError):
                owner.refuse(call, error.problem)
            else:
                self._ask_load(call, replace(request, prefetch=False))

        fetching.add_done_callback(go_on)
        call.settled.add_done_callback(
            lambda settled: fetching.cancel() if settled.cancelled() else None
        )

    def _begin_listing(self, request: LoadRequest) -> Future[list[Variant]]:
        if self._is_closed:
            raise ShuttingDown.because("this orchestrator has been closed: make a new one")
        return self._listings.begin(request)

    def _begin_prefetch(self, request: LoadRequest) -> Future[ModelFiles]:
        if self._is_closed:
            raise ShuttingDown.because("this orchestrator has been closed: make a new one")
        model = self._model(request)
        if model.hub is not None:
            return self._prefetches.begin(request, is_load=False)
        here: Future[ModelFiles] = Future()
        here.set_result(model)
        return here

    def _ask_unload(self, model_path: str | None, ticket: Ticket | None = None) -> Call:
        owner = self._start()
        call = owner.call(ticket)
        model = model_path.strip() if model_path is not None else None
        self._prefetches.end(
            lambda other: (
                other.is_load and (not model or model.lower() == other.request.model_path.lower())
            ),
            Problem("cancelled", "ended by an unload"),
        )
        owner.ask(call, UnloadRequested(call.ticket, model or None, owner.clock()))
        return call

    def _ask_cancel(self, request_id: str | None, generation: int | None) -> Call:
        if (request_id is None) == (generation is None):
            raise InvalidRequest.because(
                "give exactly one of load_request_id and generation", field="load_request_id"
            )
        owner = self._start()
        call = owner.call()
        if request_id is not None and self._prefetches.end(
            lambda other: other.request.load_request_id == request_id,
            Problem("cancelled", "cancelled by the caller"),
        ):
            owner.answer(call, CancelAnswer(cancelled=True))
            return call
        owner.ask(call, CancelRequested(call.ticket, request_id, generation, owner.clock()))
        return call

    def _ask_lease(self) -> Call:
        owner = self._start()
        call = owner.call()
        owner.ask(call, LeaseRequested(call.ticket, owner.clock()))
        return call

    def _end_lease(self, call: Call) -> None:
        owner = cast("Owner", self._owner)
        owner.post(LeaseReleased(call.ticket, owner.clock()))


class Orchestrator(_Base):
    """Owns one llama-server, for synchronous code. Safe from any number of threads.

    Example:
        >>> with Orchestrator() as orch:  # doctest: +SKIP
        ...     outcome = orch.load("model.gguf", max_seq_length=4096)
        ...     with orch.lease() as server:
        ...         print(server.base_url)
    """

    def start(self) -> Self:
        """Claim the slot now instead of at the first call.

        Raises:
            SlotOwned: another orchestrator has it.
            StateDirError: the slot's directory cannot be used.
        """
        self._start()
        return self

    def close(self) -> None:
        """Cancel loads, stop the server, wait until the slot is verified empty. Idempotent."""
        self._close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, request: LoadRequest | str, **fields: Any) -> LoadOutcome:
        """Make this model Healthy with these settings, and return what runs.

        Args:
            request: What to load; a string is its `model_path`.
            **fields: Fields of `LoadRequest` to set or replace.

        Raises:
            OrchestratorError: see `orchestrator.errors` for the tree.
        """
        return views.load_outcome(cast("Loaded", _result(self._begin_load(request, fields))))

    def submit(self, request: LoadRequest | str, **fields: Any) -> Generation:
        """Begin a load that nobody waits for, and return its generation for `outcome`.

        Raises:
            InvalidRequest: with `prefetch` there is no generation before the download has ended.
        """
        call = self._begin_load(_submitted(request, fields), {})
        return _accepted(_wait(call.accepted, call))

    def prefetch(self, request: LoadRequest | str, **fields: Any) -> PrefetchOutcome:
        """Make a model whole on disk while another may keep serving; a load then finds it there.

        Who asks for the same shares one download; `cancel` by `load_request_id` ends it.

        Raises:
            OrchestratorError: see `orchestrator.errors`; HubError and DiskFull among them.
        """
        wanted = _request(request, fields)
        fetching = self._begin_prefetch(wanted)
        try:
            return views.prefetch_outcome(wanted, fetching.result())
        except BaseException:
            fetching.cancel()
            raise

    def variants(self, request: LoadRequest | str, **fields: Any) -> Variants:
        """Return what a model on disk or on the Hub could be loaded as, with sizes.

        Of the request only the model, its revision and the token count. The Hub is given 20 s.

        Raises:
            OrchestratorError: as `load` would for such a model; HubError among them.
        """
        wanted = _request(request, fields)
        looking = self._begin_listing(wanted)
        try:
            return Variants(wanted.model_path, looking.result())
        except BaseException:
            looking.cancel()
            raise

    def unload(self, model_path: str | None = None) -> UnloadOutcome:
        """Stop the server, ending any load in flight; returns when the slot is verified empty."""
        return _unload_outcome(_result(self._ask_unload(model_path)))

    def cancel(self, load_request_id: str | None = None, generation: int | None = None) -> bool:
        """End one load that is in flight, never a resident model. True when there was one."""
        return cast(
            "CancelAnswer", _result(self._ask_cancel(load_request_id, generation))
        ).cancelled

    @contextlib.contextmanager
    def lease(self) -> Iterator[LeasedServer]:
        """Keep the Healthy server from being stopped by a swap; waits for a load in flight.

        Raises:
            NotLoaded: no model is Healthy and none is on its way.
        """
        call = self._ask_lease()
        try:
            yield views.leased_server(cast("LeaseGranted", _result(call)))
        finally:  # also when the wait was interrupted in the moment of the grant
            self._end_lease(call)

    def events(self, after: int | None = None) -> Iterator[Event]:
        """Iterate over what happens from now on (or after event `after`), until closed."""
        log = self._start().events
        return _follow(log, log.last_id if after is None else after)

    def _begin_load(self, request: LoadRequest | str, fields: dict[str, Any]) -> Call:
        owner = self._start()
        wanted = _request(request, fields)
        call = owner.call()
        try:
            self._ask_load(call, wanted)
        except BaseException:
            call.settled.cancel()
            raise
        return call


class AsyncOrchestrator(_Base):
    """Owns one llama-server, for asyncio. Usable from several event loops at once."""

    async def start(self) -> Self:
        """Claim the slot now instead of at the first call; errors as `Orchestrator.start`."""
        await self._started()
        return self

    async def close(self) -> None:
        """Cancel loads, stop the server, wait until the slot is verified empty. Idempotent."""
        closing = asyncio.get_running_loop().run_in_executor(None, self._close)
        await asyncio.shield(closing)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def load(self, request: LoadRequest | str, **fields: Any) -> LoadOutcome:
        """As `Orchestrator.load`; a cancelled `await` withdraws only its caller."""
        call = await self._begin_load(request, fields)
        return views.load_outcome(cast("Loaded", await _answer(call)))

    async def submit(self, request: LoadRequest | str, **fields: Any) -> Generation:
        """As `Orchestrator.submit`."""
        call = await self._begin_load(_submitted(request, fields), {})
        try:
            return _accepted(await asyncio.wrap_future(call.accepted))
        except asyncio.CancelledError:
            call.settled.cancel()
            raise

    async def prefetch(self, request: LoadRequest | str, **fields: Any) -> PrefetchOutcome:
        """As `Orchestrator.prefetch`; a cancelled `await` ends only its own interest."""
        wanted = _request(request, fields)
        fetching = await asyncio.to_thread(self._begin_prefetch, wanted)
        return views.prefetch_outcome(wanted, await asyncio.wrap_future(fetching))

    async def variants(self, request: LoadRequest | str, **fields: Any) -> Variants:
        """As `Orchestrator.variants`; a cancelled `await` ends the listing."""
        wanted = _request(request, fields)
        found = await asyncio.wrap_future(self._begin_listing(wanted))
        return Variants(wanted.model_path, found)

    async def unload(self, model_path: str | None = None) -> UnloadOutcome:
        """As `Orchestrator.unload`."""
        ticket = self._ticket()
        await self._started()
        return _unload_outcome(await _answer(self._ask_unload(model_path, ticket)))

    async def cancel(
        self, load_request_id: str | None = None, generation: int | None = None
    ) -> bool:
        """As `Orchestrator.cancel`."""
        await self._started()
        call = self._ask_cancel(load_request_id, generation)
        return cast("CancelAnswer", await _answer(call)).cancelled

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedServer]:
        """As `Orchestrator.lease`."""
        await self._started()
        call = self._ask_lease()
        try:
            yield views.leased_server(cast("LeaseGranted", await _answer(call)))
        finally:
            self._end_lease(call)

    def events(self, after: int | None = None) -> AsyncGenerator[Event, None]:
        """As `Orchestrator.events`."""
        return self._follow(self.last_event_id if after is None else after)

    async def follow_logs(self, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over what the servers print: the last lines, then every new one, until closed.

        A reader that is slower than the server loses what the ring has lost.
        """
        owner = await self._started()
        position, new = owner.effects.log_since((0, 0))
        new = new[max(0, len(new) - lines) :]
        while True:
            for line in new:
                yield line
            if not new:
                if owner.has_ended:
                    return
                await asyncio.sleep(_LOG_EVERY_S)
            position, new = owner.effects.log_since(position)

    async def settled(
        self, generation: int, timeout_s: float | None = None
    ) -> LoadOutcome | Problem | None:
        """Wait for what becomes of a load that was submitted; None when it is still in flight.

        Args:
            timeout_s: Seconds; None waits as long as it takes.

        Raises:
            KeyError: as `outcome`.
        """
        owner = await self._started()
        with contextlib.suppress(TimeoutError), _changes(owner.events) as changed:
            async with asyncio.timeout(timeout_s):
                while self.outcome(generation) is None:
                    await changed.wait()
                    changed.clear()
        return self.outcome(generation)

    async def _follow(self, position: int) -> AsyncGenerator[Event, None]:
        log = (await self._started()).events
        with _changes(log) as changed:
            while True:
                for event in log.since(position):
                    position = event.id
                    yield event
                if log.is_closed and log.last_id <= position:
                    return
                if log.last_id <= position:
                    await changed.wait()
                changed.clear()

    async def _started(self) -> Owner:
        """Start in another thread: to claim a slot may mean to end what a dead owner left in it."""
        if self._owner is None:
            await asyncio.get_running_loop().run_in_executor(None, self._start)
        return self._start()

    async def _begin_load(self, request: LoadRequest | str, fields: dict[str, Any]) -> Call:
        wanted, ticket = _request(request, fields), self._ticket()
        owner = await self._started()
        call = owner.call(ticket)
        try:
            looking = self._intake.submit(self._ask_load, call, wanted)
        except RuntimeError:  # closed in this moment
            owner.refuse(call, Problem("shutting_down", "the orchestrator has been closed"))
            return call
        try:
            await asyncio.wrap_future(looking)
        except asyncio.CancelledError:
            call.settled.cancel()
            raise
        return call


def _request(request: LoadRequest | str, changes: dict[str, Any]) -> LoadRequest:
    if isinstance(request, LoadRequest):
        kept = {f.name: getattr(request, f.name) for f in fields(request)}
        return LoadRequest.from_dict({**kept, **changes}) if changes else request
    return LoadRequest.from_dict({"model_path": request, **changes})


def _submitted(request: LoadRequest | str, changes: dict[str, Any]) -> LoadRequest:
    wanted = _request(request, changes)
    if wanted.prefetch:
        message = "prefetch and submit do not go together: prefetch first, then submit the load"
        raise InvalidRequest.because(message, field="prefetch")
    return wanted


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


def _unload_outcome(answer: Answer) -> UnloadOutcome:
    changed = cast("Unloaded", answer).changed
    return UnloadOutcome("unloaded" if changed else "not_loaded")


@contextlib.contextmanager
def _changes(log: EventLog) -> Iterator[asyncio.Event]:
    """Have an event set in this loop whenever something happens; who waits for it clears it."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed under us
            loop.call_soon_threadsafe(changed.set)

    stop = log.subscribe(wake)
    try:
        yield changed
    finally:
        stop()


def _follow(log: EventLog, position: int) -> Iterator[Event]:
    while batch := log.wait(position):
        for event in batch:
            position = event.id
            yield event


def _wait(future: Future[_T], call: Call) -> _T:
    """Wait for what a call is told; an interrupted wait withdraws the caller."""
    try:
        return future.result()
    except BaseException:
        call.settled.cancel()
        raise


def _result(call: Call) -> Answer:
    return _raised(_wait(call.settled, call))


async def _answer(call: Call) -> Answer:
    """Wait for a call's answer; cancelling the wait cancels the call's future, which withdraws."""
    return _raised(await asyncio.wrap_future(call.settled))


def _raised(answer: Answer) -> Answer:
    if isinstance(answer, Problem):
        raise answer.error()
    return answer


def _accepted(told: Generation | Problem) -> Generation:
    if isinstance(told, Problem):
        raise told.error()
    return told
