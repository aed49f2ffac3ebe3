"""What the tests on real processes share: the fake server, hosts that die, and honest waiting.

Nothing here sleeps to let something happen: `until` and `Fake.wait_for` wait for a condition and
fail with what there is when a generous deadline is over.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from orchestrator import Orchestrator, State
from orchestrator.runtime.events import Event
from orchestrator.server import process_table
from orchestrator.server.process_table import ProcessId
from tests.kit.process.servers import servers_of

T = TypeVar("T")

DEADLINE_S = 30.0
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]


def until(ask: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first answer that is true; ask about every millisecond."""
    ends = time.monotonic() + deadline_s
    while not (answer := ask()):
        if time.monotonic() > ends:
            pytest.fail(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.001)
    return answer


def is_running(pid: int) -> bool:
    """Is there such a process, and is it more than a zombie?"""
    found = process_table.row(pid)
    return found is not None and not found.is_zombie


def open_files(pid: int) -> list[str]:
    """What its descriptors refer to."""
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return names


def kill(pid: int) -> None:
    """SIGKILL it, and do not wait: whoever is its parent reaps it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Watch:
    """A process whose exit is timed by the kernel, whoever its parent is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def seconds_to_exit(self, since: float, deadline_s: float = DEADLINE_S) -> float:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(deadline_s * 1000):
            pytest.fail(f"process {self.pid} still runs after {deadline_s:g} s")
        took = time.monotonic() - since
        os.close(self._fd)
        return took


class Note(dict[str, Any]):
    """One line of the journal."""

    @property
    def pid(self) -> int:
        return int(self["pid"])


class Fake:
    """An executable llama-server of a test's own, how it behaves, and what it wrote down.

    Attributes:
        path: What to pass as `llama_server`.
        env: What to pass as `server_env`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        self.env = {"FAKE_SERVER_DIR": str(directory)}
        self.path = self.script(
            "fake-llama-server",
            f"#!{sys.executable} -IS\n"
            f"import sys; sys.path.append({str(HERE)!r})\n"
            "import fake_server; fake_server.main(sys.argv[1:])\n",
        )
        self.behave()

    def script(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def wrapper(self, command: str = '"$SERVER" "$@"; exit $?') -> str:
        """A shell script that runs the server without becoming it."""
        return self.script("wrapper.sh", f'#!/bin/sh\nSERVER="{self.path}"\n{command}\n')

    def behave(self, by_model: dict[str, Any] | None = None, **plan: Any) -> None:
        """Say how servers started from now on behave; by the keys of `fake_server.Plan`."""
        temporary = self.directory / "plan.tmp"
        temporary.write_text(json.dumps({"by_model": by_model or {}, **plan}))
        temporary.replace(self.directory / "plan.json")

    def notes(self, event: str | None = None) -> list[Note]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.directory / "journal").read_text().splitlines()
            notes = [Note(ast.literal_eval(line)) for line in lines]
            return [note for note in notes if event in (None, note["event"])]
        return []

    def wait_for(self, event: str, count: int = 1) -> Note:
        """Return the `count`th line of that kind, once it is there."""
        return until(lambda: self.notes(event)[count - 1 : count], f"{count} x {event!r}")[0]

    def living(self) -> set[int]:
        """Everything that was ever started or forked and still runs."""
        everybody = {(note.pid, int(note["ticks"])) for note in self.notes()}
        boot = process_table.boot_id()
        return {p for p, ticks in everybody if process_table.is_alive(ProcessId(p, ticks, boot))}

    def assert_never_two(self) -> None:
        assert self.notes("overlap") == []


Make = Callable[..., Orchestrator]


class Background:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._future: Future[Any] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(call, args, kwargs), daemon=True, name="test-caller"
        )
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            self._future.set_result(call(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (handed to whoever asks)
            self._future.set_exception(error)

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def result(self, deadline_s: float = DEADLINE_S) -> Any:
        return self._future.result(deadline_s)

    def error(self) -> BaseException | None:
        return self._future.exception(DEADLINE_S)


def until_state(orch: Orchestrator, state: State, deadline_s: float = DEADLINE_S) -> None:
    until(lambda: orch.status().state is state, f"state {state}", deadline_s)


def until_queued(orch: Orchestrator, count: int = 1) -> None:
    """Wait until so many facts lie in the inbox of an owner that is held up."""
    owner = orch._owner
    assert owner is not None
    until(lambda: owner._inbox.qsize() >= count, "the fact")


def transitions(orch: Orchestrator) -> list[Event]:
    """Every transition so far that is still kept."""
    owner = orch._owner
    assert owner is not None
    return owner.events.since(0)


HOST_PRELUDE = """
import json, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
a = json.loads(sys.argv[1])
sys.path[:] = a["path"]
import structlog  # whose default is to print
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
from orchestrator import Orchestrator, State
def say(**members):
    sys.stdout.write(json.dumps(members) + "\\n")
    sys.stdout.flush()
def make(**settings):
    given = dict(llama_server=a["server"], state_dir=a["state_dir"], server_env=a["env"])
    return Orchestrator(**(given | settings))
def rest():
    while True: signal.pause()
orch = make()
"""


class Host:
    """A backend that embeds the orchestrator, as a process that may be killed.

    Its program sees `make(**settings)`, `orch` (one made so), `a["model"]`, `say(**members)` (a
    line to the test) and `rest()` (for ever).
    """

    def __init__(
        self,
        program: str,
        *,
        server: str,
        state_dir: Path,
        env: dict[str, str],
        model: str,
        inside: tuple[str, ...] = (),
    ) -> None:
        arguments = {
            "path": [str(REPOSITORY), *sys.path],
            "server": server,
            "state_dir": str(state_dir),
            "env": env,
            "model": model,
        }
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-c", HOST_PRELUDE + program, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def hear(self) -> dict[str, Any]:
        """Return the next thing it says."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], DEADLINE_S)[0]:
            pytest.fail("the host says nothing")
        line = self.process.stdout.readline()
        assert line, f"the host ended with {self.process.wait(DEADLINE_S)}"
        return cast("dict[str, Any]", json.loads(line))

    def tell(self, text: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")

    def die(self, signum: int = signal.SIGKILL) -> float:
        """Signal it and return when, once it is gone."""
        at = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(DEADLINE_S)
        return at

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def watched(state_dir: Path, result: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Watch the process table meanwhile; the value returns the report, once, at the end."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(HERE / "monitor.py"), str(state_dir), str(result)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"

        def report() -> dict[str, Any]:
            process.communicate("stop\n", timeout=DEADLINE_S)
            return cast("dict[str, Any]", json.loads(result.read_text()))

        try:
            yield report
        finally:
            process.kill()


def two_alive(report: dict[str, Any], notes: list[Note]) -> list[tuple[int, int]]:
    """The pairs of processes that were alive at once without being of one server."""
    noted = {note.pid: int(note["root"]) for note in notes}
    kin = {entry["pid"]: entry["kin"] for entry in report["seen"]}

    def root(pid: int) -> int:
        while pid not in noted:
            above = [other for other in kin[pid] if other in kin and other != pid]
            if not above:
                return pid
            pid = above[0]
        return noted[pid]

    return [(old, new) for old, new in report["pairs"] if root(old) != root(new)]


def nothing_left(state_dir: Path, fake: Fake | None = None) -> bool:
    return not servers_of(state_dir) and not (fake and fake.living())


BEHAVIOURS: dict[str, dict[str, Any]] = {
    "plain.gguf": {},
    "late.gguf": {"loading_s": 0.05},
    "slow.gguf": {"loading_s": 0.4, "work": "print"},
    "stubborn.gguf": {"ignore_term": 1},
    "deaf.gguf": {"ignore_term": -1},
    "family.gguf": {"children": ["group", "daemon", "setsid!"]},
    "hanging.gguf": {"hang": True},
    "failing.gguf": {"exit_code": 1, "message": "error: no"},
    "crashing.gguf": {"crash_after_s": 0.03},
    "flooding.gguf": {"flood_bytes": 200_000, "flood_for_ever": True},
}
