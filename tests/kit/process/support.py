"""Engine of the tests on real processes: the fake server, hosts that may be killed, and waiting.

Nothing sleeps to let something happen: `until` waits for a condition, up to a generous deadline.
"""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import pytest

from orchestrator import LoadOutcome, Orchestrator, State
from orchestrator.runtime.events import Event
from orchestrator.server import process_table
from orchestrator.server.process_table import ProcessId
from tests.kit.process.servers import servers_of

T = TypeVar("T")

DEADLINE_S = 30.0
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]


def until(condition: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of a condition, checked about every millisecond."""
    ends = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > ends:
            pytest.fail(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.001)
    return value


def is_running(pid: int) -> bool:
    """Return whether there is such a process, other than a zombie."""
    found = process_table.row(pid)
    return found is not None and not found.is_zombie


def until_it_catches(pid: int, signum: int) -> None:
    """Wait until the process has its own handler; llama.cpp listens a moment before."""
    status = Path(f"/proc/{pid}/status")

    def catches() -> bool:
        caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)

    until(catches, f"a handler for signal {signum}")


def watches() -> list[threading.Thread]:
    """Return the threads that watch servers for hangs."""
    return [one for one in threading.enumerate() if one.name.startswith("llama-watch")]


def open_files(pid: int) -> list[str]:
    """Return what the descriptors of a process refer to."""
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return names


def kill(pid: int) -> None:
    """Send SIGKILL without waiting: the parent reaps."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def pinned(pid: int) -> Iterator[int]:
    """Give a pidfd, so that the number stays this process's."""
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def in_a_fork(what: Callable[[], object]) -> int:
    """Run a function in a forked child, which then waits to be killed; return the child's pid."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            what()
            os.write(write, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return pid


@contextlib.contextmanager
def reaped(pid: int) -> Iterator[int]:
    try:
        yield pid
    finally:
        kill(pid)
        os.waitpid(pid, 0)


class Watch:
    """Times the exit of any process, by a pidfd."""

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


class Entry(dict[str, Any]):
    """One line of the fake server's journal."""

    @property
    def pid(self) -> int:
        return int(self["pid"])


class Fake:
    """A fake llama-server: an executable, its plan, and its journal.

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
        """Write a shell script that runs the server without `exec`; return its path."""
        name = f"wrapper-{zlib.crc32(command.encode()):x}.sh"
        return self.script(name, f'#!/bin/sh\nSERVER="{self.path}"\n{command}\n')

    def behave(self, by_model: dict[str, Any] | None = None, **plan: Any) -> None:
        """Set how servers started from now on behave, by the keys of `fake_server.Plan`."""
        temporary = self.directory / "plan.tmp"
        temporary.write_text(json.dumps({"by_model": by_model or {}, **plan}))
        temporary.replace(self.directory / "plan.json")

    def entries(self, event: str | None = None) -> list[Entry]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.directory / "journal").read_text().splitlines()
            entries = [Entry(ast.literal_eval(line)) for line in lines]
            return [entry for entry in entries if event in (None, entry["event"])]
        return []

    def wait_for(self, event: str, count: int = 1) -> Entry:
        """Wait for the `count`th entry of that event, and return it."""
        return until(lambda: self.entries(event)[count - 1 : count], f"{count} x {event!r}")[0]

    def running(self) -> set[int]:
        """Return the pids of all servers and their descendants that are running."""
        known = {(entry.pid, int(entry["ticks"])) for entry in self.entries()}
        boot = process_table.boot_id()
        return {pid for pid, ticks in known if process_table.is_alive(ProcessId(pid, ticks, boot))}

    def assert_no_overlap(self) -> None:
        assert self.entries("overlap") == []


Make = Callable[..., Orchestrator]


def abandon(host: Host) -> float:
    """Kill a backend together with its keeper, and return when."""
    host.process.send_signal(signal.SIGSTOP)  # it would notice
    until(lambda: psutil.Process(host.pid).status() == psutil.STATUS_STOPPED, "the stop")
    kill(keeper_of(host))
    return host.die()


class Background:
    """A call in flight on a thread of its own."""

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._future: Future[Any] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(call, args, kwargs), daemon=True, name="test-caller"
        )
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            self._future.set_result(call(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (`error` and `result` return it)
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
    """Wait until the inbox of a blocked owner has so many facts."""
    owner = orch._owner
    assert owner is not None
    until(lambda: owner._inbox.qsize() >= count, "the fact")


def transitions(orch: Orchestrator) -> list[Event]:
    """Return every transition that is still retained."""
    owner = orch._owner
    assert owner is not None
    return owner.events.since(0)


HOST_PRELUDE = """
import json, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
a = json.loads(sys.argv[1])
sys.path[:] = a["path"]
from orchestrator import Orchestrator, State
def send(**members):
    sys.stdout.write(json.dumps(members) + "\\n")
    sys.stdout.flush()
def make(**settings):
    given = dict(llama_server=a["server"], state_dir=a["state_dir"], server_env=a["env"])
    return Orchestrator(**(given | settings))
def sleep_forever():
    while True: time.sleep(0.05)  # `pause` would lose a signal that comes just before it
orch = make()
"""


class Host:
    """A backend that embeds the orchestrator, as a process that may be killed.

    Its program can use `make(**settings)`, `orch` (made by it), `a["model"]`, `send(**members)`,
    which the test receives, and `sleep_forever()`.
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

    def receive(self) -> dict[str, Any]:
        """Return what the program sends next."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], DEADLINE_S)[0]:
            pytest.fail("the host sends nothing")
        line = self.process.stdout.readline()
        assert line, f"the host ended with {self.process.wait(DEADLINE_S)}"
        return cast("dict[str, Any]", json.loads(line))

    def send(self, text: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")

    def die(self, signum: int = signal.SIGKILL) -> float:
        """Send a signal, wait for the exit, and return when the signal was sent."""
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


StartHost = Callable[..., Host]


def keepers_of(host: int) -> list[int]:
    """Return the keepers of a process, which are no children of it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ValueError):
            words = process.cmdline()
            is_keeper = any("orchestrator.server.keeper import main" in word for word in words)
            if is_keeper and json.loads(words[-1])["host"] == host:
                found.append(process.pid)
    return found


def keeper_of(host: Host) -> int:
    """Return the pid of the keeper of a host that has loaded a model."""
    [keeper] = keepers_of(host.pid)
    return keeper


def key_of(pid: int | None) -> dict[str, str]:
    """Return the header with the key of a server, read as only its own user can."""
    key = psutil.Process(pid).environ()["LLAMA_API_KEY"]
    return {"Authorization": f"Bearer {key}"}


@contextlib.contextmanager
def stream(server: LoadOutcome) -> Iterator[http.client.HTTPResponse]:
    """Start a generation that takes a long time; its first token has arrived."""
    address = str(server.base_url).removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=60)
    body = {"prompt": "hi", "n_predict": 1_000_000, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json", **key_of(server.pid)}
    connection.request("POST", "/completion", json.dumps(body), headers)
    with contextlib.closing(connection), connection.getresponse() as response:
        assert response.read(6) == b"data: "
        yield response


@contextlib.contextmanager
def watched(state_dir: Path, result: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """Watch the process table; the value stops that and returns the monitor's report."""
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


def nothing_left(state_dir: Path, fake: Fake) -> bool:
    return not servers_of(state_dir) and not fake.running()


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
