"""The public facades: `Orchestrator` for synchronous code, `AsyncOrchestrator` for asyncio.

Both are thin: a call takes its place in the order of calls, looks up what it names, posts one
fact and waits for its one answer. They may be used from any number of threads and event loops;
a caller that goes away withdraws only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Final, Self, Unpack, cast

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import (
    Answer,
    CancelAnswer,
    LeaseGranted,
    Loaded,
    Prefetched,
    Unloaded,
)
from orchestrator.runtime import answers
from orchestrator.runtime.answers import (
    LeasedServer,
    LoadOutcome,
    PrefetchOutcome,
    UnloadOutcome,
    Variants,
)
from orchestrator.runtime.calls import Facade, Wanted, request_of
from orchestrator.runtime.events import Event, EventLog
from orchestrator.runtime.owner import Call, Owner
from orchestrator.settings.fields import LoadFields
from orchestrator.settings.request import LoadRequest

_LOG_EVERY_S: Final = 0.2


class Orchestrator(Facade):
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

    def load(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        """Make this model Healthy with these settings, and return what runs.

        Args:
            request: What to load; a string or a path is its `model_path`.
            **fields: Fields of `LoadRequest` by name, to set or replace.

        Raises:
            OrchestratorError: see `orchestrator.errors` for the tree.
        """
        call = self._begin(self._ask_load, request_of(request, fields))
        return answers.load_outcome(cast("Loaded", self._result(call)))

    def submit(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> Generation:
        """Begin a load that nobody waits for, and return its generation for `outcome`."""
        call = self._begin(self._ask_load, request_of(request, fields))
        return _accepted(self._wait(call.accepted, call))

    def prefetch(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> PrefetchOutcome:
        """Make a model whole on disk while another may keep serving; a load then finds it there.

        Callers of the same model share one download; `cancel` by `load_request_id` ends it.

        Raises:
            Busy: as many models are being fetched as may be at once.
            OrchestratorError: see `orchestrator.errors`; HubError and DiskFull among them.
        """
        wanted = request_of(request, fields)
        call = self._begin(self._ask_prefetch, wanted)
        return answers.prefetch_outcome(wanted, cast("Prefetched", self._result(call)).model)

    def variants(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> Variants:
        """Return what a model on disk or on the Hub could be loaded as, with sizes.

        Of the request only the model, its revision and the token count. The Hub is given 20 s.

        Raises:
            OrchestratorError: as `load` would for such a model; HubError among them.
        """
        wanted = request_of(request, fields)
        looking = self._begin_listing(wanted)
        try:
            return Variants(wanted.model_path, looking.result())
        except BaseException:
            looking.cancel()
            raise

    def unload(self, model_path: str | None = None) -> UnloadOutcome:
        """Stop the server, ending any load in flight; returns when the slot is verified empty.

        Args:
            model_path: End this model and its loads only, by its file, its repo or `repo:VARIANT`;
                None ends whatever there is.
        """
        return _unload_outcome(self._result(self._ask_unload(model_path)))

    def cancel(self, load_request_id: str | None = None, generation: int | None = None) -> bool:
        """End one load that is in flight, never a resident model. True when there was one."""
        return cast(
            "CancelAnswer", self._result(self._ask_cancel(load_request_id, generation))
        ).cancelled

    @contextlib.contextmanager
    def lease(self) -> Iterator[LeasedServer]:
        """Keep the Healthy server from being stopped by a swap; waits for a load in flight.

        Raises:
            NotLoaded: no model is Healthy and none is on its way.
        """
        call = self._ask_lease()
        try:
            yield answers.leased_server(cast("LeaseGranted", self._result(call)))
        finally:  # also when the wait was interrupted in the moment of the grant
            self._end_lease(call)

    def events(self, after: int | None = None) -> Iterator[Event]:
        """Iterate over what happens from now on (or after event `after`), until closed."""
        log = self._start().events
        return _follow(log, log.last_id if after is None else after)

    def _result(self, call: Call) -> Answer:
        return _raised(self._wait(call.settled, call))

    def _begin(self, ask: Callable[[Call, LoadRequest], None], wanted: LoadRequest) -> Call:
        call = self._start().call()
        try:
            ask(call, wanted)
        except BaseException:
            call.settled.cancel()
            raise
        return call


class AsyncOrchestrator(Facade):
    """Owns one llama-server, for asyncio. Usable from several event loops at once."""

    async def start(self) -> Self:
        """Claim the slot now instead of at the first call; errors as `Orchestrator.start`."""
        await self._started()
        return self

    async def close(self) -> None:
        """Cancel loads, stop the server, wait until the slot is verified empty. Idempotent."""
        closing = asyncio.wrap_future(self._parts.workers.submit(self._close))
        await asyncio.shield(closing)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def load(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> LoadOutcome:
        """As `Orchestrator.load`; a cancelled `await` withdraws only its caller."""
        call = await self._begin(self._ask_load, request_of(request, fields))
        return answers.load_outcome(cast("Loaded", await _answer(call)))

    async def submit(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> Generation:
        """As `Orchestrator.submit`."""
        call = await self._begin(self._ask_load, request_of(request, fields))
        try:
            return _accepted(await asyncio.wrap_future(call.accepted))
        except asyncio.CancelledError:
            call.settled.cancel()
            raise

    async def prefetch(
        self, request: Wanted = None, **fields: Unpack[LoadFields]
    ) -> PrefetchOutcome:
        """As `Orchestrator.prefetch`; a cancelled `await` ends only its own interest."""
        wanted = request_of(request, fields)
        call = await self._begin(self._ask_prefetch, wanted)
        return answers.prefetch_outcome(wanted, cast("Prefetched", await _answer(call)).model)

    async def variants(self, request: Wanted = None, **fields: Unpack[LoadFields]) -> Variants:
        """As `Orchestrator.variants`; a cancelled `await` ends the listing."""
        wanted = request_of(request, fields)
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
            yield answers.leased_server(cast("LeaseGranted", await _answer(call)))
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
            await asyncio.wrap_future(self._parts.workers.submit(self._start))
        return self._start()

    async def _begin(self, ask: Callable[[Call, LoadRequest], None], wanted: LoadRequest) -> Call:
        """Take the call's place in the order of calls, and have its model looked up."""
        ticket = self._ticket()
        owner = await self._started()
        call = owner.call(ticket)
        try:
            await asyncio.wrap_future(self._parts.workers.submit(lambda: ask(call, wanted)))
        except BaseException:
            call.settled.cancel()
            raise
        return call


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


async def _answer(call: Call) -> Answer:
    """Wait for a call's answer; cancelling the wait cancels the call's future, which withdraws."""
    return _raised(await asyncio.wrap_future(call.settled))


def _raised(answer: Answer) -> Answer:
    if isinstance(answer, Problem):
        raise answer.error()
    return answer


def _unload_outcome(answer: Answer) -> UnloadOutcome:
    changed = cast("Unloaded", answer).changed
    return UnloadOutcome("unloaded" if changed else "not_loaded")


def _accepted(told: Generation | Problem) -> Generation:
    if isinstance(told, Problem):
        raise told.error()
    return told
