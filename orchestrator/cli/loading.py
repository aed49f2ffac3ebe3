"""What `run` and `load` show of a load: its transitions, and a bar while bytes arrive."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from orchestrator.cli.output import Part, byte_text, download_bars, say, state_line
from orchestrator.errors import OrchestratorError
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LoadProgress
from orchestrator.runtime.events import Event

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from orchestrator.pool.remote import RemoteModelView
    from orchestrator.runtime.remote import RemoteOrchestrator

_LAST_LINE_S: Final = 1.0
_AT_REST: Final = {State.IDLE, State.HEALTHY}
_VERBS: Final = {"downloading": "download", "loading": "load"}


class LoadView:
    """Prints transitions on stdout, with a bar on stderr between them if that is a terminal.

    Args:
        started_at: Unix seconds from which times count; None: those of the first transition.
    """

    def __init__(self, started_at: float | None = None) -> None:
        self._started_at = started_at
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._phase: str | None = None

    def transition(self, event: Event) -> None:
        self.end_bar()
        if self._started_at is None:
            self._started_at = event.at
        at_ms = (event.at - self._started_at) * 1000
        say(*state_line(at_ms, State(event.dest), event.pid))

    def progress(self, step: LoadProgress) -> None:
        """Show the bytes of a phase, once there are any: for a cached model none are downloaded."""
        if step.bytes_total is None or step.phase not in _VERBS or not sys.stderr.isatty():
            return
        if step.phase != self._phase:
            self.end_bar()
        if self._bars is None:
            self._phase, self._bars = step.phase, download_bars()
            name = f"  {_VERBS[step.phase]}"
            self._task = self._bars.add_task(name, total=step.bytes_total, note="")
            self._bars.start()
        if self._task is not None:
            self._bars.update(self._task, completed=step.bytes_done or 0, total=step.bytes_total)

    def end_bar(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._phase = None


@contextlib.contextmanager
def loading_shown(slot: RemoteOrchestrator | RemoteModelView, *, is_silent: bool) -> Iterator[None]:
    """Show what happens in a slot until the block ends, and its last transition."""
    if is_silent:
        yield
        return
    events = slot.events(progress=True)  # before the load, so that none is missed
    view, changed = LoadView(), threading.Condition()
    last = State.IDLE
    is_over = False

    def follow() -> None:
        nonlocal last
        with contextlib.suppress(OrchestratorError):  # the call itself reports it
            for event in events:
                with changed:
                    if is_over:
                        return
                    if event.kind == "transition":
                        last = State(event.dest)
                        view.transition(event)
                    else:
                        view.progress(LoadProgress.from_dict(event.data))
                    changed.notify()

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield
    finally:
        with changed:
            changed.wait_for(lambda: last in _AT_REST, _LAST_LINE_S)
            is_over = True
            view.end_bar()


def progress_parts(step: LoadProgress) -> tuple[Part, ...]:
    """Return the text of a step: its bytes, and how much of all that is."""
    if step.bytes_total is None:
        return ()
    of_all = "" if step.fraction is None else f"  {step.fraction:.0%}"
    return f"{byte_text(step.bytes_done or 0)} of {byte_text(step.bytes_total)}", (of_all, "dim")
