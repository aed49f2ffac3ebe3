"""Logging: lines for `logging`, from one thread that may block, and no secrets."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import OrchestratorError
from orchestrator.base import log as logs
from orchestrator.base.background import Background
from tests.kit.process.support import until
from tests.kit.shell.harness import PATIENCE_S, Harness
from tests.kit.shell.records import captured, stuck

SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"


@pytest.fixture
def log(harness: Harness) -> Iterator[list[Any]]:
    """Everything that is logged; complete when an orchestrator has been closed."""
    with captured() as entries:
        yield entries


def of(entries: list[Any], event: str) -> list[Any]:
    return [entry for entry in entries if entry["event"] == event]


def test_each_transition_is_one_log_line(log: list[Any], harness: Harness) -> None:
    with harness.sync() as orch:
        orch.load("A")
        orch.load("B")
        orch.load("B")
        orch.unload()
    transitions = [(e.data["source"], e.data["dest"]) for e in harness.events.since(0)]
    lines = of(log, "lifecycle.transitioned")
    assert [(line["source"], line["dest"]) for line in lines] == transitions
    for line in lines:
        assert line["level"] == "info"
        assert {"trigger", "generation", "model", "pid", "after_ms"} <= line.keys()
    assert [line["generation"] for line in lines] == [1] * 5 + [2] * 9
    assert [line["model"] for line in lines] == ["A"] * 5 + ["B"] * 6 + [None] * 3
    assert [line["pid"] for line in lines[3:5]] == [101, 101]


def test_accepted_joined_and_stale_are_logged(
    log: list[Any], harness: Harness, pool: ThreadPoolExecutor
) -> None:
    harness.open_gates = frozenset()
    with harness.sync() as orch:
        first = pool.submit(orch.load, "A", deadline_s=5)
        harness.effects.wait_for("kill")
        second = pool.submit(orch.load, "A", deadline_s=5)
        harness.until_callers(2)
        harness.effects.open()
        assert first.result().generation == second.result().generation == 1
        harness.pass_time(6)
    accepted = of(log, "load.accepted")
    assert [(a["generation"], a["joined"]) for a in accepted] == [(1, False), (1, True)]
    assert [line["trigger"] for line in of(log, "completion.fenced")] == ["deadline_expired"]
    assert not [entry for entry in log if entry["level"] == "error"]


def test_no_secret_in_logs_errors_events_or_status(
    log: list[Any], harness: Harness, pool: ThreadPoolExecutor
) -> None:

    def refuse(effect: object, _: object) -> None:
        if type(effect).__name__ == "Probe":
            raise RuntimeError(f"no probe for {effect}")

    with harness.sync() as orch:
        outcome = orch.load("A", hf_token=SECRET)
        harness.effects.watch = refuse
        with pytest.raises(OrchestratorError) as error:
            orch.load("B", hf_token=SECRET)
        owner = harness.owner
        nonsense: Any = type("Nonsense", (), {"trigger": "load", "target": owner.snapshot})()
        owner.post(nonsense)
        harness.catch_up()
        with pytest.raises(OrchestratorError, match="PermissionError"):
            orch.load("unreadable", hf_token=SECRET)
        shown = [outcome, orch.status(), orch.plan("A", hf_token=SECRET), error.value]
        shown += [outcome.as_dict(), orch.status().as_dict(), error.value.problem.as_dict()]
        shown += [owner.snapshot, *(e.as_dict() for e in owner.events.since(0))]
    shown += log
    assert {entry["event"] for entry in log} >= {"owner.failed", "effect.failed", "load.accepted"}
    for what in shown:
        assert SECRET not in repr(what)
        assert SECRET not in str(what)


def test_an_unchanged_load_is_logged_for_debugging_only(log: list[Any], harness: Harness) -> None:
    """A backend that loads before each request would fill its log."""
    with harness.sync() as orch:
        orch.load("A")
        orch.load("A")
    (first,), (second,) = of(log, "load.accepted"), of(log, "load.already_loaded")
    assert (first["level"], second["level"]) == ("info", "debug")
    assert (first["generation"], second["generation"]) == (1, 1)


# --------------------------------------------------------------------------------------- records


class Records(logging.Handler):
    """A handler of a host."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.threads: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.threads.add(threading.current_thread().name)


@pytest.fixture
def host() -> Iterator[Records]:
    """The handler of a host that has configured the logger `orchestrator`."""
    logger, handler = logging.getLogger("orchestrator"), Records()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


def test_a_record_is_one_line_with_its_event_and_its_fields(host: Records) -> None:
    """With the time and the thread of the event, not of the thread that hands it on."""
    began = time.time()
    logs.event_log("orchestrator.test")("info", "it.happened", path="/a b", count=3, why=None)
    ended = time.time()
    assert logs.flush(PATIENCE_S)
    (record,) = host.records
    assert record.getMessage() == 'it.happened path="/a b" count=3 why='
    members: Any = record
    assert (members.event, members.fields) == (
        "it.happened",
        {"path": "/a b", "count": 3, "why": None},
    )
    assert (record.name, record.levelname) == ("orchestrator.test", "INFO")
    assert began <= record.created <= ended
    assert record.msecs == int(record.created % 1 * 1000)
    assert record.threadName == threading.current_thread().name
    assert record.thread == threading.get_ident()
    assert host.threads == {"llama-log"}


@pytest.mark.parametrize("value", ["a\nb", "a\r\nlevel=fake", "\x1b[31m", "\udcff", "\u2028"])
def test_no_value_breaks_the_line(host: Records, value: str) -> None:
    """Not a file name, nor the output of another program, can forge a line or color a terminal."""
    logs.event_log("orchestrator.test")("warning", "it.happened", value=value)
    assert logs.flush(PATIENCE_S)
    (record,) = host.records
    message = record.getMessage()
    assert message.isprintable()
    message.encode()


def test_records_of_all_threads_are_in_order(host: Records) -> None:
    write = logs.event_log("orchestrator.test")

    def write_all(writer: int) -> None:
        for number in range(200):
            write("info", "written", writer=writer, n=number)

    with ThreadPoolExecutor(4) as pool:
        for writer in range(4):
            pool.submit(write_all, writer)
    assert logs.flush(PATIENCE_S)
    written: dict[int, list[int]] = {}
    for record in host.records:
        members: Any = record
        written.setdefault(members.fields["writer"], []).append(members.fields["n"])
    assert written == {writer: list(range(200)) for writer in range(4)}


def test_a_record_below_the_level_of_its_logger_is_not_made(host: Records) -> None:
    write = logs.event_log("orchestrator.test")
    logging.getLogger("orchestrator").setLevel(logging.WARNING)
    write("info", "not.made")
    write("warning", "made")
    assert logs.flush(PATIENCE_S)
    logging.disable(logging.WARNING)
    try:
        write("warning", "not.made")
        assert logs.flush(PATIENCE_S)
    finally:
        logging.disable(logging.NOTSET)
    assert [record.getMessage() for record in host.records] == ["made"]


def test_no_secret_in_a_traceback(harness: Harness, failures: list[Any]) -> None:
    """It is text: frames hold the request, and some handlers send the locals of every frame."""

    def refuse(*_: object) -> None:
        raise RuntimeError("it cannot begin")

    with harness.sync() as orch:
        orch.start()
        harness.effects.watch = refuse
        with pytest.raises(OrchestratorError):
            orch.load("A", hf_token=SECRET)
        harness.effects.watch = lambda *_: None
    (entry,) = failures
    failures.clear()
    assert entry["exception"].splitlines()[-1] == "RuntimeError: it cannot begin"
    assert SECRET not in str(entry)


# ------------------------------------------------------------------------ handlers of the host


def test_a_handler_that_raises_does_not_end_the_log(
    host: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a filter, nor a handler, nor an exception that is not an `Exception`."""

    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise BaseException(record.getMessage())  # noqa: TRY002 (as a handler might)

    broken, logger = Broken(), logging.getLogger("orchestrator.test")
    logger.addHandler(broken)
    logs.event_log("orchestrator.test")("info", "first")
    assert logs.flush(PATIENCE_S)
    logger.removeHandler(broken)
    logs.event_log("orchestrator.test")("info", "second")
    assert logs.flush(PATIENCE_S)
    assert [record.getMessage() for record in host.records] == ["second"]
    assert "BaseException: first" in capsys.readouterr().err


def test_a_handler_that_never_returns_stops_nobody(harness: Harness) -> None:
    """And `close` waits for it for a second at most, once."""
    with stuck():
        orch = harness.sync()
        assert orch.load("A").pid == 101
        assert orch.load("B").pid == 102
        orch.unload()
        began = time.monotonic()
        orch.close()
        assert time.monotonic() - began < 2.0


# ---------------------------------------------------------------------------------- the thread


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_the_oldest_is_dropped_and_counted(gate: threading.Event) -> None:
    lost: list[int] = []
    done: list[int] = []
    background = Background("test-background", lost.append, capacity=3)
    background.put(lambda: gate.wait(PATIENCE_S))
    until(lambda: not background._queue, "the first call")
    for number in range(8):
        background.put(partial(done.append, number))
    gate.set()
    assert background.flush(PATIENCE_S)
    assert (lost, done) == ([5], [5, 6, 7])
    background.put(lambda: done.append(8))
    assert background.flush(PATIENCE_S)
    assert (lost, done[-1]) == ([5], 8)


def test_a_full_queue_loses_nothing(gate: threading.Event) -> None:
    lost: list[int] = []
    done: list[int] = []
    background = Background("test-background", lost.append, capacity=3)
    background.put(lambda: gate.wait(PATIENCE_S))
    until(lambda: not background._queue, "the first call")
    for number in range(3):
        background.put(partial(done.append, number))
    gate.set()
    assert background.flush(PATIENCE_S)
    assert (lost, done) == ([], [0, 1, 2])


def test_a_flush_in_vain_is_not_repeated(gate: threading.Event) -> None:
    """Several orchestrators are closed at the end of a process, and the exit flushes too."""
    background = Background("test-background", lambda _: None)
    background.put(lambda: gate.wait(PATIENCE_S))
    assert not background.flush(0.01)
    began = time.monotonic()
    assert not background.flush(PATIENCE_S)
    assert time.monotonic() - began < PATIENCE_S / 2
    gate.set()
    until(lambda: background.flush(0), "the end of the call")
    background.put(lambda: None)
    assert background.flush(PATIENCE_S)


def test_the_thread_itself_does_not_wait_for_itself() -> None:
    """A handler may print to the stream that the same thread writes."""
    done: list[str] = []
    background = Background("test-background", lambda _: None)

    def outer() -> None:
        background.put(lambda: done.append("inner"))
        done.append("outer")

    background.put(outer)
    assert background.flush(PATIENCE_S)
    assert done == ["inner", "outer"]


# ------------------------------------------------------------------------------------ processes

SILENT = """
import sys
from orchestrator import Orchestrator
with Orchestrator(llama_server="/bin/true", state_dir=sys.argv[1]) as orch:
    try:
        orch.load(sys.argv[2])
    except Exception as error:
        assert error.category == "server_start_failed", error
"""


def test_a_host_that_has_not_configured_logging_sees_nothing(
    tmp_path: Any, tiny_model: str
) -> None:
    """Not even of a failed start: `logging` prints warnings that nobody handles."""
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(tmp_path), tiny_model],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("", "")


UNREAD = """
import logging, signal, sys, time
logging.basicConfig(level=logging.DEBUG)  # to stderr, which nobody reads
from orchestrator import Orchestrator
orch = Orchestrator(llama_server="embedded", state_dir=sys.argv[1])
orch.start()
for context in (256, 512, 256):
    orch.load(sys.argv[2], max_seq_length=context)
orch.unload()
began = time.monotonic()
orch.close()
print(time.monotonic() - began, flush=True)
signal.pause()
"""


def test_a_host_whose_stderr_is_a_full_pipe_loads_unloads_and_closes(
    state_dir: Path, tiny_model: str
) -> None:
    """As under a supervisor that no longer reads what its services log."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    command = [sys.executable, "-c", UNREAD, str(state_dir), tiny_model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer) as host:
        os.close(writer)
        try:
            assert host.stdout is not None
            assert select.select([host.stdout], [], [], 60)[0], "the host is held up"
            assert float(host.stdout.readline()) < 3.0
            host.terminate()
            assert host.wait(PATIENCE_S) == -signal.SIGTERM
        finally:
            host.kill()
    os.close(reader)


FORKING = """
import json, logging, os, sys
from orchestrator.base import log
logging.basicConfig(level=0, stream=sys.stdout, format="%(process)d %(message)s")
write = log.event_log("orchestrator.test")
write("info", "of.parent")
log.flush()
child = os.fork()
write("info", "of.child" if child == 0 else "of.parent.again")
assert log.flush(20)
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(json.dumps([os.getpid(), child]))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_log_of_its_own() -> None:
    """A fork has no threads, and gunicorn forks after the app was imported."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, check=True, timeout=60
    )
    *lines, last = done.stdout.splitlines()
    parent, child = json.loads(last)
    assert sorted(lines) == sorted(
        [f"{parent} of.parent", f"{parent} of.parent.again", f"{child} of.child"]
    )
