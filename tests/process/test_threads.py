"""Exceptions such as SystemExit in threads of ours, raised by a callback or from outside.

Python ends a thread that raises SystemExit silently, and callers that wait for it would hang.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import pytest

from orchestrator import Orchestrator
from orchestrator.errors import OrchestratorError
from tests.kit.process.support import Background, Fake, Make, is_running, until


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an exception in another thread, as reloaders and timeouts do."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(error)
    )


def functions_of(thread: threading.Thread) -> list[str]:
    """Return the functions on the stack of a thread, innermost first."""
    found, frame = [], sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


def thread_in(function: str) -> threading.Thread | None:
    """Return a thread that is executing a function."""
    return next((t for t in threading.enumerate() if function in functions_of(t)), None)


# an exception raised between an `open` and its `with` leaves the file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_an_exception_raised_in_an_effects_thread_fails_only_its_load(
    make: Make, fake: Fake, model_a: str, error: type[BaseException]
) -> None:
    """Without a report the load would hang forever, and the unload behind it."""
    fake.behave(loading_s=-1, work="print")
    orch = make().start()
    loading = Background(orch.load, model_a)
    raise_in(until(lambda: thread_in("wait_ready"), "the probe"), error)
    failed = loading.error()
    assert isinstance(failed, OrchestratorError), failed
    assert (failed.problem.category, error.__name__ in failed.message) == ("internal", True)
    assert fake.running() == set()
    fake.behave()
    assert orch.load(model_a).status == "loaded"


def test_an_observer_that_raises_system_exit_ends_no_thread(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """It runs on the owner's thread."""
    observed: list[object] = []

    def leaving(snapshot: object) -> None:
        observed.append(snapshot)
        if len(observed) == 1:
            raise SystemExit(1)

    orch.observe(leaving)
    pid = orch.load(model_a).pid
    orch.unload()
    assert len(observed) > 1
    assert not is_running(pid)
