"""Downloads beside the machine: a model is made whole on disk while another keeps serving.

Nothing here decides what runs. Who asks for the same shares one download; one that nobody wants
any more is ended; a load that comes after it finds the model cached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from orchestrator.download import Hub
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.fetch_process import FetchProgress
from orchestrator.request import LoadRequest, ModelFiles
from orchestrator.tokens import CancelReason, CancelToken, Generation

_NONE: Final = Generation(0)  # a prefetch is no load


@dataclass(frozen=True, slots=True, eq=False)
class Interest:
    """One call that waits for a download; `is_load` when a load is to follow."""

    request: LoadRequest
    is_load: bool
    found: Future[ModelFiles]


@dataclass(slots=True, eq=False)
class _Work:
    """One download, and who waits for it."""

    request: LoadRequest
    token: CancelToken = field(default_factory=lambda: CancelToken(_NONE))
    progress: FetchProgress = field(default_factory=FetchProgress)
    interests: list[Interest] = field(default_factory=list)


class Prefetches:
    """Every download of one orchestrator that is not a load's own."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._work: dict[tuple[str | None, ...], _Work] = {}
        self._threads: list[threading.Thread] = []
        self._guard = threading.Lock()  # of the two above, and nothing else

    def begin(self, request: LoadRequest, *, is_load: bool) -> Future[ModelFiles]:
        """Begin, or join the same; cancelling the future ends this caller's interest."""
        interest = Interest(request, is_load, Future())
        with self._guard:
            work = self._work.get(download_key(request))
            if work is None:
                work = self._work[download_key(request)] = _Work(request)
                thread = threading.Thread(
                    target=self._run, args=(work,), name="llama-prefetch", daemon=True
                )
                self._threads = [t for t in self._threads if t.is_alive()]
                self._threads.append(thread)
                thread.start()
            work.interests.append(interest)
        interest.found.add_done_callback(lambda _: self._leave(work, interest))
        return interest.found

    def end(self, wanted: Callable[[Interest], bool], problem: Problem) -> bool:
        """Answer every interest that is meant with a problem; True when there was one."""
        with self._guard:
            meant = [i for work in self._work.values() for i in work.interests if wanted(i)]
        for interest in meant:
            _fail(interest, problem)
        return bool(meant)

    def under_way(self) -> tuple[tuple[LoadRequest, FetchProgress], ...]:
        """Return what is being downloaded, for display."""
        with self._guard:
            return tuple((work.request, work.progress) for work in self._work.values())

    def close(self) -> None:
        """End all; returns when their processes are gone."""
        self.end(lambda _: True, Problem("shutting_down", "the orchestrator has been closed"))
        for thread in self._threads:
            thread.join()

    def _leave(self, work: _Work, interest: Interest) -> None:
        with self._guard:
            work.interests = [other for other in work.interests if other is not interest]
            is_wanted = bool(work.interests)
            if not is_wanted and self._work.get(download_key(work.request)) is work:
                del self._work[download_key(work.request)]  # whoever asks now begins anew
        if not is_wanted:
            work.token.set(CancelReason.USER)

    def _run(self, work: _Work) -> None:
        files: ModelFiles | None = None
        try:
            files = self._hub.fetch(work.request, work.token, work.progress)
        except OrchestratorError as error:
            problem = error.problem
        except Exception as error:  # noqa: BLE001 (somebody waits for an answer)
            problem = Problem("internal", f"{type(error).__name__}: {error}")
        with self._guard:
            self._work.pop(download_key(work.request), None)
            interests = tuple(work.interests)
        for interest in interests:
            if files is None:
                _fail(interest, problem)
            elif interest.found.set_running_or_notify_cancel():
                interest.found.set_result(files)


def _fail(interest: Interest, problem: Problem) -> None:
    if interest.found.set_running_or_notify_cancel():
        interest.found.set_exception(problem.error())


def download_key(request: LoadRequest) -> tuple[str | None, ...]:
    """Return what two requests have in common that want the same download."""
    variant = request.gguf_variant
    return (
        request.model_path.lower(),
        variant and variant.lower(),
        request.revision,
        request.mmproj_path and "given",
    )
