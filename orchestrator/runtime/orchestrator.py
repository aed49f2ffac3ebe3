"""The public facades: `Orchestrator` for synchronous code, `AsyncOrchestrator` for asyncio.

A call takes its place in the order of calls, posts one fact and waits for one answer. Any number of
threads and event loops may call; one that goes away withdraws only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from orchestrator.base import workers
from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem, no_thread_as_error
from orchestrator.runtime import answers
from orchestrator.runtime.answers import (
    LeasedServer,
    LoadOutcome,
    PrefetchOutcome,
    UnloadOutcome,
    Variants,
)
from orchestrator.runtime.calls import Facade, MakeFact, RequestLike, request_of, unwrap
from orchestrator.runtime.events import Event, EventLog
from orchestrator.runtime.owner import Call, Owner
from orchestrator.runtime.ports import LogPosition
from orchestrator.settings.fields import LoadFields

if TYPE_CHECKING:
    from orchestrator.runtime.remote import AsyncRemoteOrchestrator, RemoteOrchestrator

_LOG_INTERVAL_S: Final = 0.1
_QUIET_INTERVAL_S: Final = 1.0  # for a follower of a server that has printed nothing for a while
_LINES_A_TURN: Final = 100


class Orchestrator(Facade):
    """Owns one llama-server process, for synchronous code. All methods are thread-safe.

        >>> with Orchestrator() as orch:  # doctest: +SKIP
        ...     outcome = orch.load("owner/name-GGUF", gguf_variant="Q4_K_M", max_seq_length=4096)
        ...     with orch.lease() as server:
        ...         print(server.base_url)  # for any OpenAI-compatible client

    The server is stopped at the end of the block (see `on_host_exit`). Where a method takes a
    `request`, pass a `LoadRequest` or a `model_path`, and further fields by name. Interrupting a
    call (Ctrl-C) withdraws that caller; a load goes on for its other callers.
    """

    @staticmethod
    def connect(url: str, api_key: str | None = None) -> RemoteOrchestrator:
        """Return the orchestrator of a running service, with the same methods and errors.

        For further workers, notebooks and other machines. Nothing is sent before the first call.

        Args:
            url: Of the service, e.g. `http://127.0.0.1:8642`.
            api_key: One of its API keys, if it has any.

        Raises:
            InvalidRequest: the URL or the key cannot be used; `field` says which.
        """
        from orchestrator.runtime.remote import RemoteOrchestrator

        return RemoteOrchestrator(url, api_key)

    def start(self, *, again: bool = True) -> Self:
        """Claim the slot. Without this, the first call does. May be called more than once.

        Args:
            again: Start again after a `close`, which no other call does.

        Raises:
            ShuttingDown: it has been closed, and `again` is False.
            SlotOwned: another orchestrator owns the slot.
            StateDirError: the state directory cannot be used.
        """
        self._start(again=again)
        return self

    def close(self, *, keep: bool = True) -> None:
        """Cancel all loads, stop the server and release the slot. May be called more than once.

        With `on_host_exit="keep"` a Healthy server is left to the next owner of the slot, unless
        `keep` is False. Calls are refused from then on, until `start`. What was stopped is not
        loaded again; numbers of generations and events go on.

        Raises:
            SlotOccupied: a process of the slot could not be killed.
        """
        self._close(keep=keep)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        """Load a model and wait until its server is Healthy.

        A running server that matches the request is kept; any other is replaced. A load in flight
        is joined if it has the same target, and otherwise superseded (see `on_busy`). Settings,
        flags, files and access to the Hub are checked before the running server is stopped.

        Args:
            request: A `LoadRequest`, or its `model_path`: a Hub repo `owner/name[:VARIANT]`, a
                `.gguf` file, or a folder with one.
            **fields: Fields of `LoadRequest`. They replace those of `request`.

        Raises:
            InvalidRequest, ModelNotFound: `field` names what to change.
            HubError, DiskFull: the model could not be downloaded.
            ServerStartFailed: the server did not become Healthy; see `reason` and `log_tail`.
            Superseded, Cancelled: the load was ended from elsewhere.
            Busy: `on_busy` is `reject` and another load is in flight, or too many are queued.
            TimedOut: `stall_timeout_s` or `deadline_s` has passed.
            SlotOccupied: a process of the slot could not be killed.
        """
        return answers.load_outcome(self._answer(self._load_fact(request_of(request, fields))))

    def submit(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Generation:
        """Begin a load and return its generation, for `outcome` and `cancel`.

        Raises what `load` raises up to the moment at which the load is accepted.
        """
        call = self._ask(self._load_fact(request_of(request, fields)))
        return Generation(unwrap(self._wait(call, call.accepted)))

    def prefetch(
        self, request: RequestLike = None, **fields: Unpack[LoadFields]
    ) -> PrefetchOutcome:
        """Download a model and wait until it is on disk. The running server keeps serving.

        Callers of the same model share one download. `cancel` ends it by `load_request_id`. Raises
        `Busy` if too many downloads are in flight, and else what `load` raises for a model.
        """
        wanted = request_of(request, fields)
        return answers.prefetch_outcome(wanted, self._answer(self._prefetch_fact(wanted)).model)

    def variants(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Variants:
        """Return the variants of a model, on disk or on the Hub, with their sizes.

        Uses `model_path`, `revision` and `hf_token` of the request. The Hub is given 20 s. Raises
        what `load` raises for a model.
        """
        self._check_usable()
        wanted = request_of(request, fields)
        listing = self._listings.begin(wanted)
        try:
            return Variants(wanted.model_path, listing.result())
        except BaseException:
            listing.cancel()
            raise

    def unload(self, model_path: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop the server, cancel the load in flight, and wait until the slot is empty.

        Args:
            model_path: Unload only this model: its file, `owner/name` or `owner/name:VARIANT`.
                None = whatever is loaded or loading.
            cut: Wait for no lease: end the requests that use the server.

        Raises:
            SlotOccupied: a process of the slot could not be killed.
        """
        return answers.unload_outcome(self._answer(self._unload_fact(model_path, cut)))

    def cancel(self, load_request_id: str | None = None, generation: int | None = None) -> bool:
        """Cancel one load that is in flight, and return whether there was one.

        A model that is loaded stays loaded. A `load_request_id` that is not known yet is remembered
        for 60 s, so that a cancel may arrive before its load.
        """
        return bool(self._answer(self._cancel_fact(load_request_id, generation)).cancelled)

    @contextlib.contextmanager
    def lease(self) -> Iterator[LeasedServer]:
        """Hold a lease on the loaded server, after waiting for a load in flight.

        A swap or an unload waits until the lease is released, for at most `drain_timeout_s`. Raises
        `NotLoaded` if no model is loaded or loading.
        """
        with self.leased_at_once() as server:
            if server is not None:
                yield server
                return
        call = self._ask(self._lease_fact)
        try:
            yield answers.leased_server(unwrap(self._wait(call, call.settled)))
        finally:  # the lease may have been granted when the wait was interrupted
            call.leave()

    def events(self, after: int | None = None) -> Iterator[Event]:
        """Iterate over the events from now on, or after the event with the id `after`.

        Blocks for each event and ends when the orchestrator closes. The last 1024 are kept.
        """
        log = self._start().events
        return follow(log, log.last_id if after is None else after)

    def follow_logs(self, lines: int = 200) -> Iterator[str]:
        """Iterate over the output of the servers until the orchestrator closes.

        Begins with the last lines. A slow reader misses lines that are no longer kept.
        """
        for batch in self.log_batches(lines):
            yield from batch

    def log_batches(self, lines: int = 200) -> Iterator[tuple[str, ...]]:
        """Iterate over what `follow_logs` yields, in batches of lines that are new together."""
        owner = self._start()
        yield from batches(owner.effects.log_since, lambda: owner.has_ended, lines)

    def settled(
        self, generation: int, timeout_s: float | None = None
    ) -> LoadOutcome | Problem | None:
        """Wait for the end of a load and return its `outcome`; None after `timeout_s` seconds.

        Raises:
            UnknownGeneration: as for `outcome`.
        """
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        changed = threading.Event()
        stop = self._start().events.subscribe(changed.set)
        try:
            while (found := self.outcome(generation)) is None:
                if not changed.wait(None if ends is None else max(0.0, ends - time.monotonic())):
                    break
                changed.clear()
            return found
        finally:
            stop()

    def _ask(self, make_fact: MakeFact) -> Call:
        call = self._start().call()
        with call.withdrawn_on_error():  # an interrupt may come at any moment
            self._send(call, make_fact)
        return call

    def _answer(self, make_fact: MakeFact) -> Any:
        call = self._ask(make_fact)
        return unwrap(self._wait(call, call.settled))


class AsyncOrchestrator(Facade):
    """Owns one llama-server process, for asyncio. Several event loops may use it at once.

        >>> async with AsyncOrchestrator() as orch:  # doctest: +SKIP
        ...     outcome = await orch.load("owner/name-GGUF", gguf_variant="Q4_K_M")
        ...     async with orch.lease() as server:
        ...         print(server.base_url)  # for any OpenAI-compatible client

    The methods are those of `Orchestrator`. Cancelling an `await` withdraws that caller; a load
    goes on for its other callers. Of the methods without `async` only `plan` and `options` block.
    """

    @staticmethod
    def connect(url: str, api_key: str | None = None) -> AsyncRemoteOrchestrator:
        """Return the orchestrator of a running service; see `Orchestrator.connect`."""
        from orchestrator.runtime.remote import AsyncRemoteOrchestrator

        return AsyncRemoteOrchestrator(url, api_key)

    async def start(self, *, again: bool = True) -> Self:
        """Claim the slot; see `Orchestrator.start`."""
        await self._started(again=again)
        return self

    async def close(self, *, keep: bool = True) -> None:
        """End as `Orchestrator.close` does, even if cancelled."""
        await asyncio.shield(self._on_a_thread(partial(self._close, keep=keep)))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def load(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        """Load a model and wait until its server is Healthy; see `Orchestrator.load`."""
        make_fact = self._load_fact(request_of(request, fields))
        return answers.load_outcome(await self._answer(make_fact))

    async def submit(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Generation:
        """Begin a load and return its generation for `settled`; see `Orchestrator.submit`."""
        call = await self._ask(self._load_fact(request_of(request, fields)))
        with call.withdrawn_on_error():
            accepted = await asyncio.wrap_future(call.accepted)
        return Generation(unwrap(accepted))

    async def prefetch(
        self, request: RequestLike = None, **fields: Unpack[LoadFields]
    ) -> PrefetchOutcome:
        """Download a model and wait until it is on disk; see `Orchestrator.prefetch`."""
        wanted = request_of(request, fields)
        answer = await self._answer(self._prefetch_fact(wanted))
        return answers.prefetch_outcome(wanted, answer.model)

    async def variants(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Variants:
        """Return the variants of a model; see `Orchestrator.variants`."""
        self._check_usable()
        wanted = request_of(request, fields)
        found = await asyncio.wrap_future(self._listings.begin(wanted))
        return Variants(wanted.model_path, found)

    async def unload(self, model_path: str | None = None, *, cut: bool = False) -> UnloadOutcome:
        """Stop the server and wait until the slot is empty; see `Orchestrator.unload`."""
        return answers.unload_outcome(await self._answer(self._unload_fact(model_path, cut)))

    async def cancel(
        self, load_request_id: str | None = None, generation: int | None = None
    ) -> bool:
        """Cancel one load that is in flight; see `Orchestrator.cancel`."""
        return bool((await self._answer(self._cancel_fact(load_request_id, generation))).cancelled)

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[LeasedServer]:
        """Hold a lease on the loaded server; see `Orchestrator.lease`."""
        with self.leased_at_once() as server:
            if server is not None:
                yield server
                return
        call = await self._ask(self._lease_fact)
        try:
            yield answers.leased_server(unwrap(await asyncio.wrap_future(call.settled)))
        finally:  # the lease may have been granted when the wait was cancelled
            call.leave()

    def events(self, after: int | None = None) -> AsyncGenerator[Event, None]:
        """Iterate over the events from now on; see `Orchestrator.events`."""
        return followed(self._event_log, self.last_event_id if after is None else after)

    async def follow_logs(self, lines: int = 200) -> AsyncGenerator[str, None]:
        """Iterate over the output of the servers until the orchestrator closes.

        Begins with the last lines. A slow reader misses lines that are no longer kept.
        """
        async with contextlib.aclosing(lines_in_turns(self.log_batches(lines))) as output:
            async for line in output:
                yield line

    async def log_batches(self, lines: int = 200) -> AsyncGenerator[tuple[str, ...], None]:
        """Iterate over what `follow_logs` yields, in batches of lines that are new together."""
        owner = await self._started()
        output = batches_async(owner.effects.log_since, lambda: owner.has_ended, lines)
        async with contextlib.aclosing(output) as found:
            async for batch in found:
                yield batch

    async def settled(
        self, generation: int, timeout_s: float | None = None
    ) -> LoadOutcome | Problem | None:
        """Wait for the end of a load and return its `outcome`; None after `timeout_s` seconds.

        Raises:
            UnknownGeneration: as for `outcome`.
        """
        owner = await self._started()
        with contextlib.suppress(TimeoutError), changes(owner.events) as changed:
            async with asyncio.timeout(timeout_s):
                while self.outcome(generation) is None:
                    await changed.wait()
                    changed.clear()
        return self.outcome(generation)

    async def _event_log(self) -> EventLog:
        return (await self._started()).events

    async def _started(self, *, again: bool = False) -> Owner:
        """Claiming a slot may block: processes of a dead owner have to be killed first."""
        if self._owner is None or (again and self._is_closed):
            await self._on_a_thread(partial(self._start, again=again))
        return self._start()

    def _on_a_thread(self, work: Callable[[], object]) -> asyncio.Future[object]:
        with no_thread_as_error():
            return asyncio.wrap_future(self._parts.workers().submit(work))

    async def _ask(self, make_fact: MakeFact) -> Call:
        ticket = Ticket(next(self._tickets))  # first: starting must not change the order
        call = (await self._started()).call(ticket)
        self._send(call, make_fact)
        return call

    async def _answer(self, make_fact: MakeFact) -> Any:
        call = await self._ask(make_fact)
        return unwrap(await asyncio.wrap_future(call.settled))  # cancelled with the `await`


@contextlib.contextmanager
def changes(log: EventLog) -> Iterator[asyncio.Event]:
    """Yield an event of this loop that is set at every change; the waiter clears it."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have been closed
            loop.call_soon_threadsafe(changed.set)

    stop = log.subscribe(wake)
    try:
        yield changed
    finally:
        stop()


async def followed(
    begin: Callable[[], Awaitable[EventLog]],
    position: int,
    is_meant: Callable[[Event], bool] = lambda _: True,
) -> AsyncGenerator[Event, None]:
    """Iterate over the events after a position until their log is closed."""
    log = await begin()
    with changes(log) as changed:
        while True:
            for event in log.since(position):
                position = event.id
                if is_meant(event):
                    yield event
            if log.is_closed and log.last_id <= position:
                return
            if log.last_id <= position:
                await changed.wait()
            changed.clear()


def follow(log: EventLog, position: int) -> Iterator[Event]:
    """Iterate over the events after a position, as `followed` does. Blocks."""
    while batch := log.wait(position):
        for event in batch:
            position = event.id
            yield event


LogSince = Callable[[LogPosition], tuple[LogPosition, tuple[str, ...]]]
"""Returns the output after a position, and the position after that."""


def batches(
    since: LogSince, has_ended: Callable[[], bool], lines: int
) -> Iterator[tuple[str, ...]]:
    """Iterate over the last lines of output and those to come, until the end of their owner."""
    position, new = since((0, 0))
    new = new[max(0, len(new) - lines) :]
    while new or not has_ended():
        if new:
            yield new
        time.sleep(_LOG_INTERVAL_S)
        position, new = since(position)


async def batches_async(
    since: LogSince, has_ended: Callable[[], bool], lines: int
) -> AsyncGenerator[tuple[str, ...], None]:
    """Iterate over output as `batches` does; it is read on a worker thread."""
    position, new = await workers.waited(partial(since, (0, 0)))
    new = new[max(0, len(new) - lines) :]
    pause_s = _LOG_INTERVAL_S
    while new or not has_ended():
        pause_s = _LOG_INTERVAL_S if new else min(2 * pause_s, _QUIET_INTERVAL_S)
        if new:
            yield new
        await asyncio.sleep(pause_s)
        position, new = await workers.waited(partial(since, position))


async def lines_in_turns(
    found: AsyncGenerator[tuple[str, ...], None],
) -> AsyncGenerator[str, None]:
    """Iterate over the lines of batches, and let others run between many of them."""
    async with contextlib.aclosing(found):
        async for batch in found:
            for count, line in enumerate(batch, 1):
                yield line
                if not count % _LINES_A_TURN:
                    await asyncio.sleep(0)
