"""Threads that are ended under us: by a callback that leaves, or by whoever raises in them.

Python ends a thread that raises SystemExit without a word, and everybody who waits for it waits on.
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
    """Have the interpreter raise something in another thread, as reloaders and time-outs do."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(error)
    )


def functions_of(thread: threading.Thread) -> list[str]:
    """What a thread is doing, innermost first."""
    found, frame = [], sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


def thread_in(function: str) -> threading.Thread | None:
    """Return a thread that is in a function now."""
    return next((t for t in threading.enumerate() if function in functions_of(t)), None)


# what was raised between an `open` and its `with` leaves the file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_an_exception_raised_in_an_effects_thread_fails_only_its_load(
    make: Make, fake: Fake, model_a: str, error: type[BaseException]
) -> None:
    """A load that nobody reports on would hang for ever, and so would the unload behind it."""
    fake.behave(loading_s=-1, work="print")
    orch = make().start()
    loading = Background(orch.load, model_a)
    raise_in(until(lambda: thread_in("wait_ready"), "the probe"), error)
    failed = loading.error()
    assert isinstance(failed, OrchestratorError), failed
    assert (failed.problem.category, error.__name__ in failed.message) == ("internal", True)
    assert fake.living() == set()
    fake.behave()
    assert orch.load(model_a).status == "loaded"


def test_an_observer_that_raises_system_exit_ends_no_thread(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """`sys.exit` in a callback ends its thread, and that one is the owner's."""
    told: list[object] = []

    def leaving(seen: object) -> None:
        told.append(seen)
        if len(told) == 1:
            raise SystemExit(1)

    orch.observe(leaving)
    pid = orch.load(model_a).pid
    orch.unload()
    assert len(told) > 1
    assert not is_running(pid)
