"""The facades of an orchestrator in another process: `Orchestrator.connect(url)` makes them.

Methods, results and errors are those of the facades that own a server.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any, Final, Self, TypeVar, Unpack

from orchestrator.base import workers
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.actions.working import NOT_LOADED
from orchestrator.machine.plan import Plan
from orchestrator.runtime.answers import (
    LeasedServer,
    LoadOutcome,
    Options,
    PastLoad,
    PrefetchOutcome,
    Status,
    UnloadOutcome,
    Variants,
)
from orchestrator.runtime.asks import Ask, generation_in, load_state, waits
from orchestrator.runtime.calls import RequestLike, request_of
from orchestrator.runtime.connection import MAX_LOADS, STATUS, Connection, RemoteSlot
from orchestrator.runtime.events import Event
from orchestrator.runtime.service import Json, Service
from orchestrator.settings.fields import LoadFields

_T = TypeVar("_T")
_PREFIX: Final = "/api/inference"
_OF_VARIANTS: Final = ("model_path", "revision", "hf_token")


class _Remote(RemoteSlot):
    """What both facades share: the requests, and the methods that block in both."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Talk to the service at a URL, with one of its API keys if it has any.

        Raises:
            InvalidRequest: the URL or the key cannot be used; `field` says which.
        """
        super().__init__(Connection(Service(url, api_key), _PREFIX))

    def options(self) -> Options:
        """Return the values that the server binary accepts; see `Orchestrator.options`."""
        return self._connection.now(Ask("GET", "/options", Options.from_dict))

    def plan(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Plan:
        """Return what `load` would do with the same arguments; see `Orchestrator.plan`."""
        return self._connection.now(
            self._post("/plan", request_of(request, fields), Plan.from_dict)
        )

    def outcome(self, generation: int) -> LoadOutcome | Problem | None:
        """Return the result of a load, or its problem; see `Orchestrator.outcome`."""
        return self._connection.now(load_state(generation))

    def past_load(self, generation: int) -> PastLoad:
        """Return a load that is in flight or has ended; see `Orchestrator.past_load`."""
        self.outcome(generation)  # raises if there is none
        return next(one for one in self.history(MAX_LOADS) if one.generation == generation)

    def _load(self, request: RequestLike, fields: LoadFields) -> Ask[LoadOutcome]:
        return self._post("/load", request_of(request, fields), LoadOutcome.from_dict)

    def _submit(self, request: RequestLike, fields: LoadFields) -> Ask[Generation]:
        return self._post("/load?wait=false", request_of(request, fields), generation_in)

    def _prefetch(self, request: RequestLike, fields: LoadFields) -> Ask[PrefetchOutcome]:
        return self._post("/prefetch", request_of(request, fields), PrefetchOutcome.from_dict)

    def _variants(self, request: RequestLike, fields: LoadFields) -> Ask[Variants]:
        wanted = self._body(request_of(request, fields))
        body = {n: v for n in _OF_VARIANTS if (v := wanted[n]) is not None}
        return Ask("POST", "/variants", Variants.from_dict, body)

    def _unload(self, model_path: str | None, cut: bool) -> Ask[UnloadOutcome]:
        body: Json = {"cut": cut}
        if model_path is not None:
            body["model_path"] = self._connection.from_here(model_path)
        return Ask("POST", "/unload", UnloadOutcome.from_dict, body)

    def _cancel(self, load_request_id: str | None, generation: int | None) -> Ask[bool]:
        given = {"load_request_id": load_request_id, "generation": generation}
        body = {name: value for name, value in given.items() if value is not None}
        return Ask("POST", "/cancel", lambda answer: bool(answer["cancelled"]), body)

    def _post(self, path: str, request: Any, parse: Callable[[Json], _T]) -> Ask[_T]:
        return Ask("POST", path, parse, self._body(request))

    def _body(self, request: Any) -> Json:
        return self._connection.located({**request.as_dict(), "hf_token": request.hf_token})

    def _leased(self, status: Status) -> LeasedServer | None:
        """Return the server of a status; None while a load is in flight or a restart is due.

        Raises:
            NotLoaded: there is none.
        """
        loaded, recovery = status.loaded, status.recovery
        if loaded is not None and status.loading is None:
            where = f"{self.url}/v1"
            return LeasedServer(where, loaded.pid, loaded.generation, self.api_key, loaded.kind)
        if status.loading is None and (recovery is None or recovery.phase == "cooling_down"):
            raise NOT_LOADED.error()
        return None


class RemoteOrchestrator(_Remote):
    """An `Orchestrator` in another process. All methods are thread-safe.

        >>> with Orchestrator.connect("http://127.0.0.1:8642") as orch:  # doctest: +SKIP
        ...     orch.load("owner/name-GGUF", gguf_variant="Q4_K_M")

    Its server lives on when this object is closed.
    """

    def start(self, *, again: bool = True) -> Self:
        """Return this object: the service runs already, and nothing has to be started."""
        return self

    def close(self) -> None:
        """Leave the service as it is: no connection outlives its call."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        """Load a model and wait until its server is Healthy; see `Orchestrator.load`."""
        return self._connection.now(self._load(request, fields))

    def submit(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Generation:
        """Begin a load and return its generation; see `Orchestrator.submit`."""
        return self._connection.now(self._submit(request, fields))

    def prefetch(
        self, request: RequestLike = None, **fields: Unpack[LoadFields]
    ) -> PrefetchOutcome:
        """Download a model and wait until it is on disk; see `Orchestrator.prefetch`."""
        return self._connection.now(self._prefetch(request, fields))

    def variants(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Variants:
        """Return the variants of a model; see `Orchestrator.variants`."""
        return self._connection.now(self._variants(request, fields))

    def unload(self, model_path: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop the server and wait until the slot is empty; see `Orchestrator.unload`."""
        return self._connection.now(self._unload(model_path, cut))

    def cancel(self, load_request_id: str | None = None, generation: int | None = None) -> bool:
        """Cancel one load that is in flight; see `Orchestrator.cancel`."""
        return self._connection.now(self._cancel(load_request_id, generation))

    def settled(
        self, generation: int, timeout_s: float | None = None
    ) -> LoadOutcome | Problem | None:
        """Wait for the end of a load; see `Orchestrator.settled`."""
        for ask in waits(generation, timeout_s):
            if (found := self._connection.now(ask)) is not None:
                return found
        return None

    @contextlib.contextmanager
    def lease(self) -> Iterator[LeasedServer]:
        """Yield the address below which the service passes requests on: its `/v1`.

        Waits for a load in flight. The service holds the real lease for each request.

        Raises:
            NotLoaded: no model is loaded or loading.
        """
        found = self._leased(self.status())
        if found is None:
            with self._connection.changes() as wait:
                while (found := self._leased(self.status())) is None:
                    wait()
        yield found

    def events(
        self, after: int | None = None, *, progress: bool = False
    ) -> Generator[Event, None, None]:
        """Iterate over the events from now on; see `Orchestrator.events`.

        Args:
            after: Begin after the event with this id.
            progress: Also yield the steps of a download or a load, as events of kind `progress`.
        """
        return self._connection.events(after, has_progress=progress)

    def follow_logs(self, lines: int = 200) -> Iterator[str]:
        """Iterate over the output of the servers; see `Orchestrator.follow_logs`."""
        return self._connection.followed_logs(lines)


class AsyncRemoteOrchestrator(_Remote):
    """An `AsyncOrchestrator` in another process.

        >>> async with AsyncOrchestrator.connect("http://127.0.0.1:8642") as orch:  # doctest: +SKIP
        ...     await orch.load("owner/name-GGUF", gguf_variant="Q4_K_M")

    As in `AsyncOrchestrator` the methods that only read have no `async`: each blocks for one short
    request. Its server lives on when this object is closed.
    """

    async def start(self, *, again: bool = True) -> Self:
        """Return this object: the service runs already, and nothing has to be started."""
        return self

    async def close(self) -> None:
        """Leave the service as it is: no connection outlives its call."""

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def load(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        """Load a model and wait until its server is Healthy; see `Orchestrator.load`."""
        return await self._connection.answer(self._load(request, fields))

    async def submit(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Generation:
        """Begin a load and return its generation; see `Orchestrator.submit`."""
        return await self._connection.answer(self._submit(request, fields))

    async def prefetch(
        self, request: RequestLike = None, **fields: Unpack[LoadFields]
    ) -> PrefetchOutcome:
        """Download a model and wait until it is on disk; see `Orchestrator.prefetch`."""
        return await self._connection.answer(self._prefetch(request, fields))

    async def variants(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Variants:
        """Return the variants of a model; see `Orchestrator.variants`."""
        return await self._connection.answer(self._variants(request, fields))

    async def unload(self, model_path: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop the server and wait until the slot is empty; see `Orchestrator.unload`."""
        return await self._connection.answer(self._unload(model_path, cut))

    async def cancel(
        self, load_request_id: str | None = None, generation: int | None = None
    ) -> bool:
        """Cancel one load that is in flight; see `Orchestrator.cancel`."""
        return await self._connection.answer(self._cancel(load_request_id, generation))

    async def settled(
        self, generation: int, timeout_s: float | None = None
    ) -> LoadOutcome | Problem | None:
        """Wait for the end of a load; see `Orchestrator.settled`."""
        for ask in waits(generation, timeout_s):
            if (found := await self._connection.answer(ask)) is not None:
                return found
        return None

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedServer]:
        """Yield the address of the service's `/v1`; see `RemoteOrchestrator.lease`."""
        found = await self._found()
        if found is None:
            async with self._connection.changes_async() as wait:
                while (found := await self._found()) is None:
                    await workers.waited(wait)
        yield found

    def events(
        self, after: int | None = None, *, progress: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Iterate over the events from now on; see `RemoteOrchestrator.events`."""
        return self._connection.events_async(after, has_progress=progress)

    def follow_logs(self, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over the output of the servers; see `Orchestrator.follow_logs`."""
        return self._connection.followed_logs_async(lines)

    async def _found(self) -> LeasedServer | None:
        return self._leased(await self._connection.answer(STATUS))
