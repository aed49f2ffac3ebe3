"""List the variants of models, in a folder or on the Hub, beside the state machine.

A listing that no caller waits for any more is ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final

from orchestrator.base.tokens import CancelReason, CancelToken, Generation
from orchestrator.base.workers import Workers
from orchestrator.errors import Busy, Cancelled, ShuttingDown, no_thread_as_error, problem_of
from orchestrator.models.source import ModelSource
from orchestrator.models.variants import Variant
from orchestrator.settings.request import LoadRequest

MAX_AT_ONCE: Final = 8
_ENDS_WITHIN_S: Final = 5.0
_NO_LOAD: Final = Generation(0)


class Listings:
    """The listings of one orchestrator.

    Args:
        workers: Returns those of this process: an unused orchestrator may be made before a fork.
    """

    def __init__(self, source: ModelSource, workers: Callable[[], Workers]) -> None:
        self._source = source
        self._workers = workers
        self._in_flight: dict[Future[list[Variant]], tuple[CancelToken, Future[list[Variant]]]] = {}
        self._guard = threading.Lock()  # of the above

    def begin(self, request: LoadRequest) -> Future[list[Variant]]:
        """Start a listing; cancelling the future ends it.

        Raises:
            Busy: too many are in flight.
        """
        found: Future[list[Variant]] = Future()
        token = CancelToken(_NO_LOAD)
        with self._guard:
            if len(self._in_flight) >= MAX_AT_ONCE:
                raise Busy.because(f"{MAX_AT_ONCE} listings are in flight: try again later")
            with no_thread_as_error():
                done = self._workers().submit(lambda: self._source.variants(request, token))
            self._in_flight[found] = token, done
        done.add_done_callback(lambda _: self._settle(found, done))
        found.add_done_callback(lambda _: token.set(CancelReason.USER))
        return found

    def close(self) -> None:
        """End all listings, and wait up to `_ENDS_WITHIN_S` for their processes to exit."""
        with self._guard:
            in_flight = tuple(self._in_flight.values())
        for token, _ in in_flight:
            token.set(CancelReason.SHUTDOWN)
        wait([done for _, done in in_flight], _ENDS_WITHIN_S)

    def _settle(self, found: Future[list[Variant]], done: Future[list[Variant]]) -> None:
        with self._guard:
            del self._in_flight[found]
        if not found.set_running_or_notify_cancel():
            return
        if (error := done.exception()) is None:
            found.set_result(done.result())
        elif isinstance(error, Cancelled):
            message = "the orchestrator has been closed"
            found.set_exception(ShuttingDown.because(message))
        else:
            found.set_exception(problem_of(error).error())
