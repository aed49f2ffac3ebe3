"""The facades of a pool in another process: `ModelPool.connect(url)` makes them.

Methods, results and errors are those of the pools that own servers; a lease is the service's `/v1`,
which holds the real one for each request. Requests are sent as for a single slot
(`runtime/connection.py`), below the path of the model they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from functools import partial
from typing import Any, Final, Self, Unpack, overload
from urllib.parse import quote

from orchestrator.base import workers
from orchestrator.base.tokens import Generation
from orchestrator.errors import InvalidRequest
from orchestrator.machine.plan import Plan
from orchestrator.pool.by_hand import HandFields
from orchestrator.pool.catalogue import Changes, no_model
from orchestrator.pool.status import ModelStatus, PoolStatus
from orchestrator.runtime.answers import LeasedServer, LoadOutcome, Status, UnloadOutcome
from orchestrator.runtime.asks import Ask, generation_in, quick
from orchestrator.runtime.connection import STATUS, Connected, Connection, RemoteSlot
from orchestrator.runtime.events import Event
from orchestrator.runtime.service import Service

_PREFIX: Final = "/api"
_DEFAULT: Final = "/inference"
_STATUS: Final = quick("/models", PoolStatus.from_dict)
_MODEL: Final = quick("", ModelStatus.from_dict)
_RELOAD: Final = Ask("POST", "/catalogue", Changes.from_dict)
_REMOVE: Final[Ask[None]] = Ask("DELETE", "", lambda _: None)


class _RemotePool(Connected):
    """What both facades share: where requests go, and the methods that block in both."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Talk to the service at a URL, with one of its API keys if it has any.

        Raises:
            InvalidRequest: the URL or the key cannot be used; `field` says which.
        """
        super().__init__(Connection(Service(url, api_key), _PREFIX))

    @overload
    def status(self, name: None = None) -> PoolStatus: ...
    @overload
    def status(self, name: str) -> Status: ...
    def status(self, name: str | None = None) -> PoolStatus | Status:
        """Return the budget, every model and who waits, or one slot; see `ModelPool.status`."""
        return self._connection.now(_STATUS) if name is None else self._at(name).now(STATUS)

    def model_status(self, name: str) -> ModelStatus:
        """Return one model, by any of its names. Raises ModelNotFound."""
        return self._at(name).now(_MODEL)

    def _at(self, name: str | None) -> Connection:
        """Return the connection for a model; None is the default. May block for a request."""
        if name is None:
            return self._connection.below(_DEFAULT)
        if "/" in name:  # only an alias has one, and no path of one step
            name = _named(self.status(), name)
        return self._connection.below(f"/models/{quote(name, safe='')}")

    async def _at_once(self, name: str | None) -> Connection:
        """As `_at`, without blocking the event loop."""
        is_alias = name is not None and "/" in name
        return await workers.waited(partial(self._at, name)) if is_alias else self._at(name)

    def _add(self, name: str, fields: Mapping[str, Any]) -> Ask[ModelStatus]:
        body = {**self._connection.located(fields), "name": name}
        return Ask("POST", "/models", ModelStatus.from_dict, body)

    def _leased(self, of: LoadOutcome | ModelStatus) -> LeasedServer:
        """Return the service's `/v1`, for a model that is loaded or another server's."""
        pid, generation = of.pid or 0, Generation(of.generation)
        return LeasedServer(f"{self.url}/v1", pid, generation, self.api_key, of.kind)


class RemoteModelPool(_RemotePool):
    """A `ModelPool` in another process. All methods are thread-safe.

        >>> with ModelPool.connect("http://127.0.0.1:8642") as pool:  # doctest: +SKIP
        ...     pool.load("chat")

    Its servers live on when this object is closed.
    """

    def start(self) -> Self:
        """Return this object: the service runs already, and nothing has to be started."""
        return self

    def close(self, *, keep: bool = True) -> None:
        """Leave the service as it is: no connection outlives its call."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> RemoteModelView:
        """Return the view of one model. Raises ModelNotFound."""
        return RemoteModelView(self, self.model_status(name).name)

    @contextlib.contextmanager
    def lease(self, name: str | None = None) -> Iterator[LeasedServer]:
        """Load a model if it is not resident, and yield the service's `/v1`.

        Requests name the model in their body. The service holds the real lease for each of them.
        """
        try:
            server = self._leased(self.load(name))
        except InvalidRequest as error:
            if name is None or error.field != "model":
                raise
            server = self._leased(self.model_status(name))  # another server's: there is no load
        yield server

    def load(self, name: str | None = None, **how: Unpack[HandFields]) -> LoadOutcome:
        """Load a model, and wait until it is resident; see `ModelPool.load`."""
        return self._at(name).now(_load(how))

    def submit(self, name: str | None = None, **how: Unpack[HandFields]) -> Generation:
        """Begin a load, and return the generation that it will have."""
        return self._at(name).now(_submit(how))

    def unload(self, name: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop a model, and wait until its slot is verified empty; see `ModelPool.unload`."""
        return self._at(name).now(_unload(cut))

    def cancel(self, name: str | None = None, load_request_id: str | None = None) -> bool:
        """Cancel the load of a model; see `ModelPool.cancel`."""
        return self._at(name).now(_cancel(load_request_id))

    def plan(self, name: str | None = None, *, force_reload: bool = False) -> Plan:
        """Return what a load would do; see `ModelPool.plan`."""
        return self._at(name).now(_plan(force_reload))

    def add(self, name: str, **fields: Any) -> ModelStatus:
        """Add a model at run time; see `ModelPool.add`. Not one of another server."""
        return self._connection.now(self._add(name, fields))

    def remove(self, name: str) -> None:
        """Remove a model; see `ModelPool.remove`."""
        self._at(name).now(_REMOVE)

    def pin(self, name: str, *, pinned: bool = True) -> ModelStatus:
        """Pin a model or unpin it; see `ModelPool.pin`."""
        return self._at(name).now(_pin(pinned))

    def reload(self) -> Changes:
        """Read the catalogue's file again; see `ModelPool.reload`."""
        return self._connection.now(_RELOAD)

    def events(
        self, after: int | None = None, *, progress: bool = False
    ) -> Generator[Event, None, None]:
        """Iterate over the events of all models from now on; see `ModelPool.events`.

        Args:
            after: Begin after the event with this id.
            progress: Also yield the steps of downloads and loads, as events of kind `progress`.
        """
        return self._connection.events(after, has_progress=progress)

    def follow_logs(self, name: str, lines: int = 200) -> Iterator[str]:
        """Iterate over the output of a model's servers; see `ModelPool.follow_logs`."""
        return self._at(name).followed_logs(lines)


class AsyncRemoteModelPool(_RemotePool):
    """An `AsyncModelPool` in another process.

        >>> async with AsyncModelPool.connect("http://127.0.0.1:8642") as pool:  # doctest: +SKIP
        ...     await pool.load("chat")

    As in `AsyncModelPool` what only reads has no `async`: it blocks for one short request.
    """

    async def start(self) -> Self:
        """Return this object: the service runs already, and nothing has to be started."""
        return self

    async def close(self, *, keep: bool = True) -> None:
        """Leave the service as it is: no connection outlives its call."""

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __getitem__(self, name: str) -> AsyncRemoteModelView:
        """Return the view of one model. Raises ModelNotFound."""
        return AsyncRemoteModelView(self, self.model_status(name).name)

    @contextlib.asynccontextmanager
    async def lease(self, name: str | None = None) -> AsyncIterator[LeasedServer]:
        """Load a model if it is not resident; see `RemoteModelPool.lease`."""
        try:
            server = self._leased(await self.load(name))
        except InvalidRequest as error:
            if name is None or error.field != "model":
                raise
            found = await (await self._at_once(name)).answer(_MODEL)
            server = self._leased(found)
        yield server

    async def load(self, name: str | None = None, **how: Unpack[HandFields]) -> LoadOutcome:
        """Load a model, and wait until it is resident; see `ModelPool.load`."""
        return await (await self._at_once(name)).answer(_load(how))

    async def submit(self, name: str | None = None, **how: Unpack[HandFields]) -> Generation:
        """Begin a load, and return the generation that it will have."""
        return await (await self._at_once(name)).answer(_submit(how))

    async def unload(self, name: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop a model, and wait until its slot is verified empty; see `ModelPool.unload`."""
        return await (await self._at_once(name)).answer(_unload(cut))

    async def cancel(self, name: str | None = None, load_request_id: str | None = None) -> bool:
        """Cancel the load of a model; see `ModelPool.cancel`."""
        return await (await self._at_once(name)).answer(_cancel(load_request_id))

    async def plan(self, name: str | None = None, *, force_reload: bool = False) -> Plan:
        """Return what a load would do; see `ModelPool.plan`."""
        return await (await self._at_once(name)).answer(_plan(force_reload))

    async def add(self, name: str, **fields: Any) -> ModelStatus:
        """Add a model at run time; see `RemoteModelPool.add`."""
        return await self._connection.answer(self._add(name, fields))

    async def remove(self, name: str) -> None:
        """Remove a model; see `ModelPool.remove`."""
        await (await self._at_once(name)).answer(_REMOVE)

    async def pin(self, name: str, *, pinned: bool = True) -> ModelStatus:
        """Pin a model or unpin it; see `ModelPool.pin`."""
        return await (await self._at_once(name)).answer(_pin(pinned))

    async def reload(self) -> Changes:
        """Read the catalogue's file again; see `ModelPool.reload`."""
        return await self._connection.answer(_RELOAD)

    def events(
        self, after: int | None = None, *, progress: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Iterate over the events of all models; see `RemoteModelPool.events`."""
        return self._connection.events_async(after, has_progress=progress)

    async def follow_logs(self, name: str, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over the output of a model's servers; see `ModelPool.follow_logs`."""
        output = (await self._at_once(name)).followed_logs_async(lines)
        async with contextlib.aclosing(output) as followed:
            async for line in followed:
                yield line


class RemoteModelView(RemoteSlot):
    """One model of a `RemoteModelPool`; see `ModelView`."""

    def __init__(self, pool: RemoteModelPool, name: str) -> None:
        super().__init__(pool._at(name))  # noqa: SLF001 (the same module)
        self._pool = pool
        self.name: str = name

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
        """Load it if it is not resident; see `RemoteModelPool.lease`."""
        return self._pool.lease(self.name)

    def events(
        self, after: int | None = None, *, progress: bool = False
    ) -> Generator[Event, None, None]:
        """Iterate over its events; see `RemoteModelPool.events`."""
        return self._connection.events(after, has_progress=progress)

    def follow_logs(self, lines: int = 200) -> Iterator[str]:
        """Iterate over the output of its servers; see `ModelPool.follow_logs`."""
        return self._connection.followed_logs(lines)


class AsyncRemoteModelView(RemoteSlot):
    """One model of an `AsyncRemoteModelPool`; see `AsyncModelView`."""

    def __init__(self, pool: AsyncRemoteModelPool, name: str) -> None:
        super().__init__(pool._at(name))  # noqa: SLF001 (the same module)
        self._pool = pool
        self.name: str = name

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
        """Load it if it is not resident; see `RemoteModelPool.lease`."""
        return self._pool.lease(self.name)

    def events(
        self, after: int | None = None, *, progress: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Iterate over its events; see `RemoteModelPool.events`."""
        return self._connection.events_async(after, has_progress=progress)

    def follow_logs(self, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over the output of its servers; see `ModelPool.follow_logs`."""
        return self._connection.followed_logs_async(lines)


def _load(how: HandFields) -> Ask[LoadOutcome]:
    return Ask("POST", "/load", LoadOutcome.from_dict, {**how})


def _submit(how: HandFields) -> Ask[Generation]:
    return Ask("POST", "/load?wait=false", generation_in, {**how})


def _unload(cut: bool) -> Ask[UnloadOutcome]:
    return Ask("POST", "/unload", UnloadOutcome.from_dict, {"cut": cut})


def _cancel(load_request_id: str | None) -> Ask[bool]:
    body = {} if load_request_id is None else {"load_request_id": load_request_id}
    return Ask("POST", "/cancel", lambda answer: bool(answer["cancelled"]), body)


def _pin(pinned: bool) -> Ask[ModelStatus]:
    return Ask("POST", "/pin", ModelStatus.from_dict, {"pinned": pinned})


def _plan(force_reload: bool) -> Ask[Plan]:
    return Ask("POST", "/plan", Plan.from_dict, {"force_reload": force_reload})


def _named(status: PoolStatus, asked: str) -> str:
    """Return the name of the entry that an alias stands for, with or without a preset."""
    for model in status.models:
        ends = ("", *(f":{preset}" for preset in model.presets))
        if any(asked == alias + end for alias in model.aliases for end in ends):
            return model.name
    raise no_model(asked, [model.name for model in status.models])
