"""The beginning of the host's shutdown, which no ASGI server reports to its apps.

A server ends the lifespan only after all requests, so those that do not end by themselves would
hold it up. But it is stopped by a signal: a handler over the server's own hears it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from types import FrameType
from typing import Any, Final, TypeVar

from orchestrator.errors import ShuttingDown

_T = TypeVar("_T")
_Handler = Callable[[int, FrameType | None], Any]
_TICK_S: Final = 0.25
_REMEMBERED_S: Final = 5.0  # for requests that the server accepts before it closes its listener


class Shutdown:
    """Ends waits and streams when one of these signals arrives.

    Nothing is heard where the server has no handler of its own, or event loop and signals are not
    in the main thread.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._covers: dict[signal.Signals, tuple[_Handler, _Handler]] = {}  # ours, over the other
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = set()
        self._heard_at: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a signal has arrived a moment ago: a host that lives on answers again."""
        heard_at = self._heard_at
        return heard_at is not None and time.monotonic() - heard_at < _REMEMBERED_S

    async def wait(self, work: Awaitable[_T]) -> _T:
        """Await `work`; raise ShuttingDown as soon as the shutdown begins."""
        try:
            async with asyncio.timeout(None) as scope:
                with self.ending(scope):
                    return await work
        except TimeoutError:
            if scope.expired():
                raise self.error() from None
            raise

    def error(self) -> ShuttingDown:
        """Return the error of a wait that has been ended."""
        return ShuttingDown.because("this service is shutting down")

    async def until(self, stream: AsyncGenerator[_T, None]) -> AsyncGenerator[_T | None, None]:
        """Yield what a stream yields, and None when it pauses, until the shutdown begins."""
        end: Any = object()
        async with contextlib.aclosing(stream):
            upcoming = asyncio.ensure_future(anext(stream, end))
            try:
                while not self.has_begun:
                    await asyncio.wait({upcoming}, timeout=_TICK_S)
                    if not upcoming.done():
                        yield None
                    elif (item := upcoming.result()) is end:
                        return
                    else:
                        yield item
                        upcoming = asyncio.ensure_future(anext(stream, end))
            finally:
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def lifespan(
        self, owner: contextlib.AbstractAsyncContextManager[Any]
    ) -> AsyncIterator[None]:
        """The lifespan of an app: its owner is open, and signals are heard."""
        self.listen()
        try:
            async with owner:
                yield
        finally:
            self.restore()

    async def listening(self) -> None:
        """For every route: not every server has its handlers at the lifespan."""
        self.listen()

    def restore(self) -> None:
        """Take our handlers away again, unless somebody has put others over them.

        Outside of the main thread they stay: they hand on what they hear.
        """
        if not _may_set_handlers():
            return
        for signum, (ours, other) in self._covers.items():
            if signal.getsignal(signum) is ours:
                signal.signal(signum, other)
        self._covers.clear()

    def listen(self) -> None:
        """Cover the handlers that the server has now.

        To be called before a response begins: a signal between its head and the first step of its
        stream would find no handler of ours, and the stream no end.
        """
        if not _may_set_handlers():
            return
        for signum in self._signals:
            handler = signal.getsignal(signum)
            if callable(handler) and handler is not self._covers.get(signum, (None,))[0]:
                self._cover(signum, handler)

    def _cover(self, signum: signal.Signals, other: _Handler) -> None:
        def hear(number: int, frame: FrameType | None) -> None:
            self._heard_at = time.monotonic()
            for loop, scope in tuple(self._waiting):
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    loop.call_soon_threadsafe(_expire, scope)
            other(number, frame)

        self._covers[signum] = hear, other
        signal.signal(signum, hear)

    @contextlib.contextmanager
    def ending(self, scope: asyncio.Timeout) -> Iterator[None]:
        """Let a scope expire when the shutdown begins. Every request below `/v1` pays for this."""
        if not self._covers:
            self.listen()
        waiting = asyncio.get_running_loop(), scope
        self._waiting.add(waiting)
        if self.has_begun:
            _expire(scope)
        try:
            yield
        finally:
            self._waiting.discard(waiting)


def _may_set_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()


def _expire(scope: asyncio.Timeout) -> None:
    with contextlib.suppress(RuntimeError):  # it has ended
        scope.reschedule(0.0)


HOST: Final = Shutdown(signal.SIGINT, signal.SIGTERM)
