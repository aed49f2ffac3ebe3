"""What a model could be loaded as, looked up beside the machine: in a folder, or on the Hub.

Nothing here decides what runs. A listing nobody waits for any more is ended; so many run at once,
and no more.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Final

from orchestrator.base.tokens import CancelReason, CancelToken, Generation
from orchestrator.base.workers import Workers
from orchestrator.errors import Busy, Cancelled, OrchestratorError, Problem, ShuttingDown
from orchestrator.models.source import ModelSource
from orchestrator.models.variants import Variant
from orchestrator.settings.request import LoadRequest

MAX_AT_ONCE: Final = 8
_ENDS_WITHIN_S: Final = 5.0
_NONE: Final = Generation(0)  # a listing is no load


class Listings:
    """Every listing of one orchestrator."""

    def __init__(self, source: ModelSource, workers: Workers) -> None:
        self._source = source
        self._workers = workers
        self._work: dict[Future[list[Variant]], tuple[CancelToken, Future[None]]] = {}
        self._guard = threading.Lock()  # of the above, and nothing else

    def begin(self, request: LoadRequest) -> Future[list[Variant]]:
        """Begin one; cancelling the future ends it.

        Raises:
            Busy: too many are under way.
        """
        found: Future[list[Variant]] = Future()
        token = CancelToken(_NONE)
        with self._guard:
            if len(self._work) >= MAX_AT_ONCE:
                raise Busy.because(f"{MAX_AT_ONCE} listings are under way: ask again")
            done = self._workers.submit(lambda: self._run(request, token, found))
            self._work[found] = token, done
        found.add_done_callback(lambda _: token.set(CancelReason.USER))
        return found

    def close(self) -> None:
        """End all; returns when their processes are gone, or after `_ENDS_WITHIN_S`."""
        with self._guard:
            work = tuple(self._work.values())
        for token, _ in work:
            token.set(CancelReason.SHUTDOWN)
        wait([done for _, done in work], _ENDS_WITHIN_S)

    def _run(self, request: LoadRequest, token: CancelToken, found: Future[list[Variant]]) -> None:
        result: list[Variant] | OrchestratorError
        try:
            result = self._source.variants(request, token)
        except Cancelled:
            result = ShuttingDown.because("the orchestrator has been closed")
        except OrchestratorError as error:
            result = error
        except Exception as error:  # noqa: BLE001 (somebody waits for an answer)
            result = Problem("internal", f"{type(error).__name__}: {error}").error()
        with self._guard:
            del self._work[found]
        if not found.set_running_or_notify_cancel():
            return
        if isinstance(result, OrchestratorError):
            found.set_exception(result)
        else:
            found.set_result(result)
