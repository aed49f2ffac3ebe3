"""Several models by name on one machine: `ModelPool`, and `AsyncModelPool` for asyncio.

A call posts one fact and waits for one answer. `pool["name"]` is a view of one model, with the
methods of an orchestrator; what it loads and unloads goes through the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

from orchestrator.base import workers
from orchestrator.errors import DeadlineExceeded, Problem
from orchestrator.machine.plan import Plan
from orchestrator.pool.by_hand import ByHand, HandFields
from orchestrator.pool.calls import F, PoolFacade
from orchestrator.pool.catalogue import Catalogue, Changes, reader_of, with_entry
from orchestrator.pool.context import Turn
from orchestrator.pool.elsewhere import server_of
from orchestrator.pool.entries import Entry
from orchestrator.pool.foresight import has_room
from orchestrator.pool.owner import Granted, PoolCall
from orchestrator.pool.status import ModelStatus
from orchestrator.runtime.answers import (
    LeasedServer,
    LoadOutcome,
    LoadProgress,
    OnDisk,
    PastLoad,
    Status,
    UnloadOutcome,
    Variants,
)
from orchestrator.runtime.calls import unwrap
from orchestrator.runtime.events import Event, EventLog
from orchestrator.runtime.orchestrator import (
    AsyncOrchestrator,
    Orchestrator,
    batches,
    batches_async,
    follow,
    followed,
    lines_in_turns,
)
from orchestrator.settings.fields import StrPath
from orchestrator.settings.request import LoadRequest

if TYPE_CHECKING:
    from orchestrator.pool.remote import AsyncRemoteModelPool, RemoteModelPool

P = TypeVar("P", bound=PoolFacade[Any])


class ModelPool(PoolFacade[Orchestrator]):
    """Owns several models of one machine, for synchronous code. All methods are thread-safe.

        >>> with ModelPool("models.toml") as pool:  # doctest: +SKIP
        ...     with pool.lease("chat") as server:
        ...         print(server.base_url)  # for any OpenAI-compatible client

    A model is loaded by the first lease of it, and evicted when another one needs its room. All
    servers are stopped at the end of the block (see `on_host_exit`).
    """

    _facade = Orchestrator

    @staticmethod
    def connect(url: str, api_key: str | None = None) -> RemoteModelPool:
        """Return the pool of a running service, with the same methods and errors.

        For further workers, notebooks and other machines. Nothing is sent before the first call.

        Args:
            url: Of the service, e.g. `http://127.0.0.1:8642`.
            api_key: One of its API keys, if it has any.

        Raises:
            InvalidRequest: the URL or the key cannot be used; `field` says which.
        """
        from orchestrator.pool.remote import RemoteModelPool

        return RemoteModelPool(url, api_key)

    def start(self) -> Self:
        """Claim the slots, adopt what was kept, and begin the preloads. May be called again.

        Raises:
            SlotOwned: another pool or orchestrator owns the slot.
            ServerUnavailable: there is no usable llama-server.
        """
        self._started(again=True)
        return self

    def close(self, *, keep: bool = True) -> None:
        """End every server, or leave it to the next owner, and release the slots."""
        self._close_all(keep=keep)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> ModelView:
        """Return the view of one model. Raises ModelNotFound."""
        return ModelView(self, self._own(name))

    @contextlib.contextmanager
    def lease(self, name: str | None = None, *, turn: Turn | None = None) -> Iterator[LeasedServer]:
        """Hold a lease on the server of a model, which is loaded if it is not resident.

        Args:
            name: Of the model, or an alias; None is the default.
            turn: This lease is for one request of a service: of those at most as many are at a
                server as it has slots, and the others wait for their turn.

        Raises:
            ModelNotFound: there is no such model.
            TooLarge: it does not fit beside the pinned models.
            TooManyWaiting: `max_waiting` requests wait already.
            OrchestratorError: what a load raises.
        """
        entry = self.match(name).entry
        if entry.request is None:
            yield server_of(entry)
            return
        lease, call = self._lease_or_call(entry, turn)
        try:
            if call is not None:
                lease = _granted(self._wait(call)).lease
            assert lease is not None  # noqa: S101 (a lease is granted with its place)
            yield lease.server
        finally:
            self._leave(call, lease)

    def load(self, name: str | None = None, **how: Unpack[HandFields]) -> LoadOutcome:
        """Load a model, wait until it is resident, and return what was loaded and evicted.

        Args:
            **how: See `HandFields`.
        """
        entry, hand = self._own(name), ByHand.of(how)
        call = self._want(entry, "load", hand=hand)
        try:
            answer = self._wait(call, hand.deadline_s)
        except TimeoutError:
            raise _too_late(entry, hand) from None
        return self._outcome(entry, _granted(answer))

    def unload(self, name: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop a model, cancel who waits for it, and wait until its slot is verified empty."""
        unwrap(self._wait(self._ask_unload(name, cut=cut)))
        return UnloadOutcome("unloaded")

    def cancel(self, name: str | None = None, load_request_id: str | None = None) -> bool:
        """Cancel the load of a model; one that is resident stays. Return whether there was one.

        With a `load_request_id` only the loads that have it are cancelled; an id that is not known
        yet is remembered for 60 s, so that a cancel may arrive before its load.
        """
        if load_request_id is not None:
            return self._cancel_named(name, load_request_id)
        return bool(unwrap(self._wait(self._ask_cancel(name))))

    def plan(self, name: str | None = None, *, force_reload: bool = False) -> Plan:
        """Return what a load would do, what it would evict and whether it would fit."""
        return self._plan(name, force_reload=force_reload)

    def add(self, name: str, **fields: Any) -> ModelStatus:
        """Add a model at run time, with the keys of a `[models.NAME]` table.

        Raises:
            NameTaken: the name, or one of its aliases, is in use.
            InvalidRequest: `field` names what to change.
        """
        return self.model_status(self._put(name, _adding(name, fields)).name)

    def remove(self, name: str) -> None:
        """Remove a model: its waiters get `model_not_found`, and its server is stopped."""
        if (call := self._ask_remove(name)) is not None:
            unwrap(self._wait(call))

    def pin(self, name: str, *, pinned: bool = True) -> ModelStatus:
        """Pin a model or unpin it, until the catalogue's file is read again or the pool ends.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: it is of another server, or the pins exceed the budget or its group.
        """
        return self.model_status(self._pin(name, pinned).name)

    def reload(
        self,
        models: StrPath | Mapping[str, Any] | None = None,
        *,
        folder: StrPath = os.curdir,
    ) -> Changes:
        """Read the catalogue's file again. A mistake in it is an error and changes nothing.

        Args:
            models: Another catalogue to go on with, as a file or a mapping.
            folder: Where relative paths of that mapping start.
        """
        return self._reload(None if models is None else reader_of(models, folder))

    def events(self, after: int | None = None) -> Iterator[Event]:
        """Iterate over the transitions of all models, each with `model`; see `Orchestrator.events`.

        They have one sequence of ids.
        """
        self._started()
        log = self.feed.events
        return follow(log, log.last_id if after is None else after)

    def follow_logs(self, name: str, lines: int = 200) -> Iterator[str]:
        """Iterate over the output of a model's servers; see `Orchestrator.follow_logs`."""
        own, owner = self.match(name).entry.name, self._started()
        for batch in batches(partial(self.log_since, own), lambda: owner.has_ended, lines):
            yield from batch

    def _wait(self, call: PoolCall, deadline_s: float | None = None) -> Any:
        """Block for an answer; an interrupt or the deadline withdraws the caller."""
        try:
            if deadline_s is None:
                return self._parts.wait(call.settled)
            return call.settled.result(deadline_s)
        except BaseException:
            call.settled.cancel()
            raise


class AsyncModelPool(PoolFacade[AsyncOrchestrator]):
    """Owns several models of one machine, for asyncio; see `ModelPool`. Cancelling an `await`
    withdraws that caller.
    """

    _facade = AsyncOrchestrator

    @staticmethod
    def connect(url: str, api_key: str | None = None) -> AsyncRemoteModelPool:
        """Return the pool of a running service; see `ModelPool.connect`."""
        from orchestrator.pool.remote import AsyncRemoteModelPool

        return AsyncRemoteModelPool(url, api_key)

    async def start(self) -> Self:
        """Claim the slots; see `ModelPool.start`."""
        await workers.waited(partial(self._started, again=True))
        return self

    async def close(self, *, keep: bool = True) -> None:
        """End as `ModelPool.close` does, even if cancelled."""
        await asyncio.shield(workers.waited(partial(self._close_all, keep=keep)))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __getitem__(self, name: str) -> AsyncModelView:
        """Return the view of one model. Raises ModelNotFound."""
        return AsyncModelView(self, self._own(name))

    @contextlib.asynccontextmanager
    async def lease(
        self, name: str | None = None, *, turn: Turn | None = None
    ) -> AsyncIterator[LeasedServer]:
        """Hold a lease on the server of a model; see `ModelPool.lease`."""
        entry = self.match(name).entry
        if entry.request is None:
            yield server_of(entry)
            return
        await self._ready()
        lease, call = self._lease_or_call(entry, turn)
        try:
            if call is not None:
                lease = _granted(await asyncio.wrap_future(call.settled)).lease
            assert lease is not None  # noqa: S101 (a lease is granted with its place)
            yield lease.server
        finally:
            self._leave(call, lease)

    async def load(self, name: str | None = None, **how: Unpack[HandFields]) -> LoadOutcome:
        """Load a model; see `ModelPool.load`."""
        entry, hand = self._own(name), ByHand.of(how)
        await self._ready()
        call = self._want(entry, "load", hand=hand)
        try:
            async with asyncio.timeout(hand.deadline_s):
                answer = await asyncio.wrap_future(call.settled)
        except TimeoutError:
            raise _too_late(entry, hand) from None
        return self._outcome(entry, _granted(answer))

    async def unload(self, name: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop a model; see `ModelPool.unload`."""
        await self._ready()
        unwrap(await asyncio.wrap_future(self._ask_unload(name, cut=cut).settled))
        return UnloadOutcome("unloaded")

    async def cancel(self, name: str | None = None, load_request_id: str | None = None) -> bool:
        """Cancel the load of a model; see `ModelPool.cancel`."""
        await self._ready()
        if load_request_id is not None:
            return self._cancel_named(name, load_request_id)
        return bool(unwrap(await asyncio.wrap_future(self._ask_cancel(name).settled)))

    async def plan(self, name: str | None = None, *, force_reload: bool = False) -> Plan:
        """Return what a load would do; see `ModelPool.plan`."""
        return await workers.waited(partial(self._plan, name, force_reload=force_reload))

    async def add(self, name: str, **fields: Any) -> ModelStatus:
        """Add a model at run time; see `ModelPool.add`."""
        await self._ready()
        return self.model_status(self._put(name, _adding(name, fields)).name)

    async def add_sent(
        self, name: str, fields: Mapping[str, Any], *, is_strict: bool
    ) -> ModelStatus:
        """Add a model for a caller over HTTP.

        Args:
            is_strict: Whether its extra args are judged; see `Facade.check_sent`.
        """
        await self._ready()
        checks = (self._scout.check_sent,) if is_strict else ()
        add = partial(self._put, name, _adding(name, fields, is_remote=True), *checks)
        return self.model_status((await workers.waited(add)).name)

    async def remove(self, name: str) -> None:
        """Remove a model; see `ModelPool.remove`."""
        await self._ready()
        if (call := self._ask_remove(name)) is not None:
            unwrap(await asyncio.wrap_future(call.settled))

    async def pin(self, name: str, *, pinned: bool = True) -> ModelStatus:
        """Pin a model or unpin it; see `ModelPool.pin`."""
        await self._ready()
        return self.model_status((await workers.waited(partial(self._pin, name, pinned))).name)

    def on_disk(self) -> OnDisk:
        """Return the models that need no download, and the room for others. Blocks."""
        return self._scout.on_disk()

    async def variants(self, request: LoadRequest) -> Variants:
        """Return the variants of any model, on disk or on the Hub; see `Orchestrator.variants`."""
        return await self._scout.variants(request)

    async def taken_by(self, entry: Entry) -> Entry:
        """Return the entry that takes a request for this one: of its `spillover` the first whose
        server answers, if this pool has no room for it now; else this one.
        """
        if not entry.spillover:
            return entry
        await self._ready()
        return await workers.waited(partial(self._taken_by, entry))

    def _taken_by(self, entry: Entry) -> Entry:
        if has_room(self._slots, self._ctx, entry, self._clock()):
            return entry
        found = (self.catalogue.models.get(name) for name in entry.spillover)
        others = (other for other in found if other is not None and other.base_url is not None)
        return next((one for one in others if self._watch.problem(one) is None), entry)

    def lose(self, entry: Entry, why: str) -> None:
        """Take no spillover to the server of this entry until it answers again."""
        self._watch.lose(entry, Problem("bad_gateway", why))

    async def reload(
        self,
        models: StrPath | Mapping[str, Any] | None = None,
        *,
        folder: StrPath = os.curdir,
    ) -> Changes:
        """Read the catalogue's file again, or another one; see `ModelPool.reload`."""
        read = None if models is None else reader_of(models, folder)
        return await workers.waited(partial(self._reload, read))

    def events(self, after: int | None = None) -> AsyncGenerator[Event, None]:
        """Iterate over the transitions of all models; see `ModelPool.events`."""
        return followed(self.event_log, self.feed.events.last_id if after is None else after)

    async def event_log(self) -> EventLog:
        """Return the log of all transitions, once the pool has started."""
        await self._ready()
        return self.feed.events

    async def follow_logs(self, name: str, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over the output of a model's servers; see `ModelPool.follow_logs`."""
        async with contextlib.aclosing(lines_in_turns(self.log_batches(name, lines))) as output:
            async for line in output:
                yield line

    async def log_batches(
        self, name: str, lines: int = 200
    ) -> AsyncGenerator[tuple[str, ...], None]:
        """Iterate over what `follow_logs` yields, in batches of lines that are new together."""
        own = self.match(name).entry.name
        await self._ready()
        owner = self._started()
        output = batches_async(partial(self.log_since, own), lambda: owner.has_ended, lines)
        async with contextlib.aclosing(output) as found:
            async for batch in found:
                yield batch

    async def _ready(self) -> None:
        """Claiming the slots may block."""
        if self._owner is None:
            await self.start()


class _View(Generic[P, F]):
    """What the views of both pools share: reading, which never blocks."""

    def __init__(self, pool: P, entry: Entry) -> None:
        self._pool = pool
        self.name: str = entry.name

    @property
    def _facade(self) -> F:
        facade: F = self._pool.facade_of(self.name)
        return facade

    def status(self) -> Status:
        """Return the state of its slot; see `Orchestrator.status`."""
        return self._pool.slot_status(self.name)

    def progress(self) -> LoadProgress:
        """Return the phase and the bytes of the load in flight."""
        return self._facade.progress()

    def logs(self, lines: int = 200) -> tuple[str, ...]:
        """Return the last lines of output of its present or last server, oldest first."""
        return self._facade.logs(lines)

    def history(self, limit: int = 20) -> list[PastLoad]:
        """Return its last loads, newest first."""
        return self._facade.history(limit)


class ModelView(_View[ModelPool, Orchestrator]):
    """One model of a `ModelPool`, like an `Orchestrator` that has this target only."""

    def load(self, **how: Unpack[HandFields]) -> LoadOutcome:
        """Load it through the pool; see `ModelPool.load`."""
        return self._pool.load(self.name, **how)

    def unload(self, *, cut: bool = False) -> UnloadOutcome:
        """Stop it; see `ModelPool.unload`."""
        return self._pool.unload(self.name, cut=cut)

    def cancel(self) -> bool:
        """Cancel its load; see `ModelPool.cancel`."""
        return self._pool.cancel(self.name)

    def plan(self, *, force_reload: bool = False) -> Plan:
        """Return what a load would do; see `ModelPool.plan`."""
        return self._pool.plan(self.name, force_reload=force_reload)

    def lease(self) -> contextlib.AbstractContextManager[LeasedServer]:
        """Hold a lease on its server; see `ModelPool.lease`."""
        return self._pool.lease(self.name)

    def events(self, after: int | None = None) -> Iterator[Event]:
        """Iterate over its events; see `ModelPool.events`."""
        return (event for event in self._pool.events(after) if event.model == self.name)

    def follow_logs(self, lines: int = 200) -> Iterator[str]:
        """Iterate over the output of its servers; see `Orchestrator.follow_logs`."""
        return self._pool.follow_logs(self.name, lines)


class AsyncModelView(_View[AsyncModelPool, AsyncOrchestrator]):
    """One model of an `AsyncModelPool`, like an `AsyncOrchestrator` that has this target only."""

    async def load(self, **how: Unpack[HandFields]) -> LoadOutcome:
        """Load it through the pool; see `ModelPool.load`."""
        return await self._pool.load(self.name, **how)

    async def unload(self, *, cut: bool = False) -> UnloadOutcome:
        """Stop it; see `ModelPool.unload`."""
        return await self._pool.unload(self.name, cut=cut)

    async def cancel(self) -> bool:
        """Cancel its load; see `ModelPool.cancel`."""
        return await self._pool.cancel(self.name)

    async def plan(self, *, force_reload: bool = False) -> Plan:
        """Return what a load would do; see `ModelPool.plan`."""
        return await self._pool.plan(self.name, force_reload=force_reload)

    def lease(self) -> contextlib.AbstractAsyncContextManager[LeasedServer]:
        """Hold a lease on its server; see `ModelPool.lease`."""
        return self._pool.lease(self.name)

    def events(self, after: int | None = None) -> AsyncGenerator[Event, None]:
        """Iterate over its events; see `ModelPool.events`."""
        position = self._pool.feed.events.last_id if after is None else after
        return followed(self._pool.event_log, position, lambda event: event.model == self.name)

    def follow_logs(self, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over the output of its servers; see `Orchestrator.follow_logs`."""
        return self._pool.follow_logs(self.name, lines)


def _adding(
    name: str, fields: Mapping[str, Any], *, is_remote: bool = False
) -> Callable[[Catalogue], Catalogue]:
    return partial(with_entry, name=name, fields=fields, is_remote=is_remote)


def _too_late(entry: Entry, hand: ByHand) -> DeadlineExceeded:
    message = f"{entry.name} was not resident within {hand.deadline_s:g} s"
    return DeadlineExceeded.because(message, field="deadline_s")


def _granted(answer: Any) -> Granted:
    granted: Granted = unwrap(answer)
    return granted
