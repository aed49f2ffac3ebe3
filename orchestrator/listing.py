"""What a model could be loaded as, looked up beside the machine: in a folder, or on the Hub.

Nothing here decides what runs. A listing nobody waits for any more is ended; so many run at once,
and no more.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Final

from orchestrator import models
from orchestrator.download import Hub, is_hub
from orchestrator.errors import Busy, Cancelled, OrchestratorError, Problem, ShuttingDown
from orchestrator.request import LoadRequest
from orchestrator.roots import ModelRoots
from orchestrator.tokens import CancelReason, CancelToken, Generation
from orchestrator.variants import Variant

MAX_AT_ONCE: Final = 8
_NONE: Final = Generation(0)  # a listing is no load


class Listings:
    """Every listing of one orchestrator.

    Args:
        roots: Folders that local models have to be in; None = anywhere.
    """

    def __init__(self, hub: Hub, roots: ModelRoots | None) -> None:
        self._hub = hub
        self._roots = roots
        self._work: dict[Future[list[Variant]], tuple[CancelToken, threading.Thread]] = {}
        self._guard = threading.Lock()  # of the above, and nothing else

    def begin(self, request: LoadRequest) -> Future[list[Variant]]:
        """Begin one; cancelling the future ends it.

        Raises:
            Busy: too many are under way.
        """
        found: Future[list[Variant]] = Future()
        token = CancelToken(_NONE)
        thread = threading.Thread(
            target=self._run, args=(request, token, found), name="llama-listing", daemon=True
        )
        with self._guard:
            if len(self._work) >= MAX_AT_ONCE:
                raise Busy.because(f"{MAX_AT_ONCE} listings are under way: ask again")
            self._work[found] = token, thread
            thread.start()
        found.add_done_callback(lambda _: token.set(CancelReason.USER))
        return found

    def close(self) -> None:
        """End all; returns when their processes are gone."""
        with self._guard:
            work = tuple(self._work.values())
        for token, _ in work:
            token.set(CancelReason.SHUTDOWN)
        for _, thread in work:
            thread.join()

    def _run(self, request: LoadRequest, token: CancelToken, found: Future[list[Variant]]) -> None:
        result: list[Variant] | OrchestratorError
        try:
            result = self._look(request, token)
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

    def _look(self, request: LoadRequest, token: CancelToken) -> list[Variant]:
        if not models.is_local(request.model_path, self._roots) and is_hub(request.model_path):
            return self._hub.variants(request, token)
        return models.variants_of(request, self._roots)
