"""Readiness is the answer of our own child on its own socket, never the 200 of another server.

Also: what counts as progress, what as a stall, and how fast an exit is noticed.
"""

from __future__ import annotations

import http.server
import mmap
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from orchestrator import Orchestrator, State
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import Cancelled, DeadlineExceeded, ServerStartFailed, Stalled
from orchestrator.server import process_table, readiness
from orchestrator.server.child import ServerProcess
from orchestrator.server.output import OutputRing
from orchestrator.server.process_table import Usage
from orchestrator.server.work import WorkMeter
from tests.kit.process.support import Background, Fake, Make, kill, until, until_state
from tests.kit.sentences import assert_sentence

LOADED = '{"default_generation_settings":{"n_ctx":1}}'


class Foreign(http.server.BaseHTTPRequestHandler):
    """Another program's server, which answers 200 to everything."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(LOADED)))
        self.end_headers()
        self.wfile.write(LOADED.encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def foreign() -> Iterator[int]:
    """The port of a foreign server."""
    Foreign.asked = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


# Foreign servers and addresses


@pytest.mark.parametrize("line", ["{}", "llama_model_loader: general.name str = {}", "x {} y"])
def test_a_foreign_server_that_is_announced_is_never_probed(
    orch: Orchestrator, fake: Fake, model_a: str, foreign: int, line: str
) -> None:
    """The output contains metadata of the model, which may be anything."""
    claim = line.format(f"server is listening on http://127.0.0.1:{foreign}")
    fake.behave(message=claim, loading_s=0.3)
    outcome = orch.load(model_a)
    assert outcome.base_url == f"http://127.0.0.1:{fake.wait_for('bound')['port']}"
    assert outcome.context_length == 4096
    assert Foreign.asked == 0


def test_a_foreign_server_does_not_make_a_hanging_child_ready(
    orch: Orchestrator, fake: Fake, model_a: str, foreign: int
) -> None:
    """The load stalls."""
    fake.behave(message=f"listening on http://127.0.0.1:{foreign}", hang=True)
    with pytest.raises(Stalled):
        orch.load(model_a, stall_timeout_s=0.4)
    assert Foreign.asked == 0


@pytest.mark.parametrize(
    "claim",
    [
        "listening on http://127.0.0.1:99999",
        "listening on http://127.0.0.1:0",
        "listening on http://127.0.0.1:" + "9" * 5000,
        "listening on http://:::1",
        "listening on http://[::1",
        "listening on http://10.0.0.1:1",
        "listening on unix:///tmp/x.sock",
    ],
    ids=lambda claim: claim[:40],
)
def test_an_invalid_address_is_ignored(
    orch: Orchestrator, fake: Fake, model_a: str, claim: str
) -> None:
    """The load neither fails nor connects elsewhere because of it."""
    fake.behave(message=claim)
    assert orch.load(model_a).base_url == f"http://127.0.0.1:{fake.wait_for('bound')['port']}"


def test_a_server_that_prints_no_address_is_found(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """Builds differ in what they print."""
    fake.behave(announce=None)
    assert orch.load(model_a).base_url == f"http://127.0.0.1:{fake.wait_for('bound')['port']}"


@pytest.mark.parametrize("announce", [None, "wrong http://127.0.0.1:1"])
def test_a_server_that_prints_no_address_is_found_behind_a_wrapper(
    make: Make, fake: Fake, model_a: str, announce: str | None
) -> None:
    """The listener is, or was, a descendant of the child."""
    fake.behave(announce=announce)
    command = '(setsid setsid "$SERVER" "$@" &) ; exec sleep 600'
    outcome = make(llama_server=fake.wrapper(command)).load(model_a)
    assert outcome.base_url == f"http://127.0.0.1:{fake.wait_for('bound')['port']}"


def test_listening_sockets_are_found_by_process_and_port() -> None:
    """Connections do not count, and neither do listeners of other processes."""
    me = {os.getpid()}
    before, _ = process_table.listening(me)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address):
            assert process_table.listening(me) == (before | {address}, False)
        assert address not in process_table.listening({1, os.getppid()})[0]
    assert process_table.listening(me) == (before, False)
    assert process_table.listening(set()) == (set(), False)
    assert process_table.listening({2**22 + 1}) == (set(), False)


def test_proxies_are_ignored(
    orch: Orchestrator, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy once answered for 127.0.0.1."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert orch.load(model_a).context_length == 4096


# Not ready yet


@pytest.mark.parametrize(
    "behaviour",
    [{"loading_s": 0.3}, {"bind_after_s": 0.3}, {"answer_after_s": 0.2}],
    ids=lambda behaviour: "-".join(behaviour),
)
def test_a_late_server_is_waited_for(
    orch: Orchestrator, fake: Fake, model_a: str, behaviour: dict[str, Any]
) -> None:
    """A 503, a refused connection and no answer all mean "not yet"."""
    fake.behave(**behaviour)
    loading = Background(orch.load, model_a)
    until_state(orch, State.WAITING_HEALTH)
    assert not loading.is_done
    assert loading.result().status == "loaded"
    timings = loading.result().timings_s
    assert timings.health >= 0.2


def test_readiness_is_noticed_within_the_longest_probe_interval(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """A load that takes minutes must not be probed every millisecond."""
    fake.behave(loading_s=1.0)
    loading = Background(orch.load, model_a)
    bound = fake.wait_for("bound")
    loading.result()
    healthy = fake.wait_for("healthy")
    assert healthy["at"] - bound["at"] - 1.0 < readiness.LONGEST_PROBE_S + 0.5


def test_a_server_that_answers_no_props_is_ready(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """/health decides; /props is only displayed."""
    fake.behave(silent_at="/props")
    outcome = orch.load(model_a)
    assert (outcome.status, outcome.context_length) == ("loaded", None)


# Progress and stalls


@pytest.fixture
def has_major_faults(tmp_path: Path) -> None:
    """Skip where pages cannot be dropped from memory, as in a tmpfs."""
    path = tmp_path / "probe"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages[0]
    if resource.getrusage(resource.RUSAGE_SELF).ru_majflt == before:
        pytest.skip("the temporary folder is not on a disk")


@pytest.mark.parametrize("started", ["directly", "by a wrapper", "as a daemon"])
@pytest.mark.parametrize("work", ["read", "print", "grow", "compute", "fault"])
@pytest.mark.usefixtures("has_major_faults")
def test_any_sign_of_work_keeps_a_load_alive(
    make: Make, fake: Fake, model_a: str, work: str, started: str
) -> None:
    """A good load of a large model may print nothing for minutes, read nothing while it computes,
    and grow no larger where its pages are evicted as it reads. Whatever the child has started may
    do the work.
    """
    path = {
        "directly": fake.path,
        "by a wrapper": fake.wrapper(),
        "as a daemon": fake.wrapper('(setsid setsid "$SERVER" "$@" &) ; exec sleep 600'),
    }[started]
    fake.behave(loading_s=2.5, work=work)
    outcome = make(llama_server=path).load(model_a, stall_timeout_s=1.2)
    assert outcome.status == "loaded"


@pytest.mark.parametrize("hidden", ["io", "statm", "stat"])
def test_usage_is_read_from_what_the_kernel_shows(
    hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A binary that carries capabilities hides its `io`: the other counters decide, and all of its
    memory counts as loaded.
    """
    full = process_table.usage(os.getpid())
    assert full is not None
    assert full.cpu_s > 0
    assert full.loaded_bytes > 0
    assert full.read_bytes > 0
    assert full.resident_bytes > 1 << 20
    read = process_table._read
    monkeypatch.setattr(
        process_table, "_read", lambda path: None if path.endswith(hidden) else read(path)
    )
    partial = process_table.usage(os.getpid())
    if hidden != "io":
        assert partial is None
    else:
        assert partial is not None
        assert (partial.read_bytes, partial.start_ticks) == (0, full.start_ticks)
        assert partial.cpu_s >= full.cpu_s
        assert partial.loaded_bytes == partial.resident_bytes


def test_usage_of_psutil_agrees_with_the_kernel() -> None:
    """It is what other platforms have; there, only this can be tested."""
    ours, theirs = process_table.usage(os.getpid()), process_table._usage_psutil(psutil.Process())
    assert ours is not None
    assert theirs.cpu_s == pytest.approx(ours.cpu_s, abs=0.5)
    assert theirs.resident_bytes == pytest.approx(ours.resident_bytes, rel=0.2)
    assert process_table.usage(2**22 + 1) is None


class Metered:
    """A work meter of this process, whose clock, counters and output a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.output = OutputRing()
        self.usages: dict[int, Usage] = {7: Usage(1)}
        self.members = {7}
        monkeypatch.setattr(process_table, "usage", self.usages.get)
        self.meter = WorkMeter(cast("ServerProcess", self), clock=lambda: self.now)
        assert self.after(0) == 0

    pid = 7

    def family(self) -> set[int]:
        return self.members

    def after(self, gap_s: float, pid: int = 7, **used: Any) -> float:
        """Return the idle time after a gap in which a process has used something."""
        self.now += gap_s
        old = self.usages[pid]
        changes = {name: getattr(old, name) + value for name, value in used.items()}
        self.usages[pid] = replace(old, **changes)
        return self.meter.idle_s()


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> Metered:
    return Metered(monkeypatch)


@pytest.mark.parametrize(
    ("used", "is_work"),
    [
        ({"paged": 1}, True),
        ({"cpu_s": 0.21}, True),
        ({"cpu_s": 0.2}, False),
        ({"read_bytes": (64 << 10) + 1}, True),
        ({"read_bytes": 64 << 10}, False),
        ({"resident_bytes": (64 << 10) + 1}, True),
        ({"resident_bytes": 64 << 10}, False),
        ({"resident_bytes": -(1 << 20)}, False),
        ({}, False),
    ],
)
def test_work_begins_above_what_probes_may_cost(
    metered: Metered, used: dict[str, Any], is_work: bool
) -> None:
    """Within one second."""
    assert metered.after(1.0, **used) == (0.0 if is_work else 1.0)


def test_cpu_time_counts_over_the_last_second(metered: Metered) -> None:
    """Not over the whole load: one burst does not hide a hang for long."""
    assert metered.after(1.0, cpu_s=0.9) == 0
    assert metered.after(0.5) == 0
    assert metered.after(0.5) == 0.5
    for at in range(2, 20):
        assert metered.after(0.25, cpu_s=0.04) == 0.25 * (at + 1)


def test_memory_that_is_freed_and_taken_again_is_no_work(metered: Metered) -> None:
    """It grows with every request that a server answers."""
    metered.after(1.0, resident_bytes=9 << 20)
    for at in range(1, 5):
        assert metered.after(1.0, resident_bytes=-(1 << 20)) == 2 * at - 1
        assert metered.after(1.0, resident_bytes=1 << 20) == 2 * at


def test_a_probe_costs_at_most_the_time_it_takes(metered: Metered) -> None:
    """And at most 0.25 s, because a server that is busy is slow to answer."""
    for took_s, free_s in ((0.25, 0.25), (2.0, 0.25)):
        for more_s, is_work in ((-0.01, False), (0.01, True)):
            idle_s = metered.after(1.0)
            with metered.meter.probing():
                metered.now += took_s
            cpu_s = free_s + 0.2 * (took_s + 1) + more_s
            assert metered.after(1.0, cpu_s=cpu_s) == (0 if is_work else idle_s + took_s + 1)


def test_time_in_which_nobody_looked_hardly_counts(metered: Metered) -> None:
    """A paused machine or host must not end a good load."""
    assert metered.after(2.0) == 2.0
    assert metered.after(7200.0) == 7.0


def test_work_of_a_process_that_starts_or_ends_is_counted_once(metered: Metered) -> None:
    """A process that has exited took nothing back, and one that has its pid is not ours."""
    metered.usages[8] = Usage(5, paged=9)
    metered.members = {7, 8}
    assert metered.after(1.0) == 0
    assert metered.after(1.0) == 1
    metered.members = {7}
    assert metered.after(1.0, pid=8, paged=1) == 0  # left the tree
    metered.usages[8] = Usage(6, paged=99)
    assert metered.after(1.0) == 1
    assert metered.after(1.0, pid=8, paged=1) == 2
    del metered.usages[8]
    assert metered.after(1.0) == 3


def test_lines_about_our_requests_are_no_output(metered: Metered) -> None:
    metered.output.feed(b"GET /health 503\nGET /pro")
    assert metered.after(1.0) == 0  # half a line
    metered.output.feed(b"ps HTTP/1.1\nGET /slots\n")
    assert metered.after(1.0) == 1
    metered.output.feed(b"load_tensors: healthy\n")
    assert metered.after(1.0) == 0


def test_probes_are_no_work(orch: Orchestrator, fake: Fake, model_a: str) -> None:
    """A server that hangs may still answer, at a cost, and log that: the load stalls, and its log
    makes nobody probe it more often.
    """
    fake.behave(loading_s=-1, answer_costs_s=0.1, logs_requests=True)
    with pytest.raises(Stalled) as refused:
        orch.load(model_a, stall_timeout_s=1.5, deadline_s=15)
    probes = [line for line in refused.value.log_tail if "/health" in line]
    assert 3 <= len(probes) < 40


@pytest.mark.parametrize(
    "behaviour",
    [
        {"loading_s": -1},
        {"hang": True},
        {"stop_itself": "start"},
        {"answer_after_s": -1},
        {"backlog": 0},
    ],
    ids=lambda behaviour: "-".join(behaviour),
)
def test_a_load_without_progress_is_given_up(
    orch: Orchestrator, fake: Fake, model_a: str, behaviour: dict[str, Any]
) -> None:

    fake.behave(message="last words", **behaviour)
    with pytest.raises(Stalled) as refused:
        orch.load(model_a, stall_timeout_s=0.4)
    assert_sentence("load.stalled", refused.value.message)
    assert refused.value.field == "stall_timeout_s"
    if behaviour != {"stop_itself": "start"}:
        assert "last words" in refused.value.log_tail
    assert orch.status().state is State.IDLE
    assert fake.running() == set()
    fake.behave()
    assert orch.load(model_a).status == "loaded"


def test_a_deadline_ends_a_load_that_makes_progress(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    fake.behave(loading_s=-1, work="print")
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded) as refused:
        orch.load(model_a, deadline_s=0.5)
    assert refused.value.field == "deadline_s"
    assert 0.5 <= time.monotonic() - begun < 5
    assert fake.running() == set()


def test_progress_is_in_bytes_and_never_decreases(
    orch: Orchestrator, fake: Fake, tmp_path: Any
) -> None:
    """At most the size of the file, and all of it when the server is ready."""
    large = write_tiny_model(tmp_path / "large.gguf", padding_bytes=32 << 20)
    fake.behave(loading_s=1.5, work="read")
    loading = Background(orch.load, str(large))
    seen = []
    while not loading.is_done:
        progress = orch.progress()
        if progress.phase == "loading" and progress.fraction is not None:
            assert progress.bytes_total == large.stat().st_size
            assert progress.bytes_done is not None
            seen.append(progress.fraction)
        threading.Event().wait(0.005)
    loading.result()
    assert seen == sorted(seen)
    assert seen[0] < seen[-1] <= 1
    assert orch.progress().fraction == 1.0


@pytest.mark.parametrize("started", ["directly", "by a wrapper"])
def test_progress_counts_pages_and_is_indeterminate_once_all_is_read(
    make: Make, fake: Fake, tmp_path: Path, started: str
) -> None:
    """llama.cpp maps its files. After the last page nobody knows how long the rest takes."""
    large = write_tiny_model(tmp_path / "large.gguf", padding_bytes=64 << 20)
    fake.behave(loading_s=1.5, work="map")
    orch = make(llama_server=fake.path if started == "directly" else fake.wrapper())
    loading = Background(orch.load, str(large))
    seen = []
    while not fake.entries("mapped"):
        if (progress := orch.progress()).phase == "loading":
            seen.append(progress)
        threading.Event().wait(0.02)
    until(lambda: orch.progress().bytes_done == large.stat().st_size, "all bytes")
    progress = orch.progress()
    assert (progress.phase, progress.fraction) == ("loading", None)
    loading.result()
    fractions = [one.fraction for one in seen if one.fraction is not None]
    assert len(set(fractions)) >= 3
    assert fractions == sorted(fractions)
    assert orch.progress().fraction == 1.0


# Exits during a start


def test_an_exit_during_the_start_is_reported_with_the_last_output(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """The cause is found in all of the output, the tail has the end of it."""
    fake.behave(
        flood_bytes=100_000, flood="lines", message="error: invalid argument: --bogus", exit_code=1
    )
    for _ in range(5):
        with pytest.raises(ServerStartFailed) as failed:
            orch.load(model_a)
        status = orch.status()
        assert (status.state, status.loaded) == (State.IDLE, None)
        assert status.last_exit is not None
        assert status.last_exit.returncode == 1
        assert (failed.value.reason, failed.value.field) == ("unknown_flag", "llama_server")
        assert failed.value.log_tail[-1].startswith("load_tensors")
    assert fake.running() == set()


def test_an_exit_during_the_start_is_reported_within_milliseconds(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """Including the kill ladder and the verification that the slot is empty."""
    fake.behave(message="cannot do that", exit_code=3)
    took = []
    for number in range(7):
        with pytest.raises(ServerStartFailed) as failed:
            orch.load(model_a)
        took.append(time.monotonic() - fake.wait_for("exit", number + 1)["at"])
        assert "cannot do that" in failed.value.log_tail
        assert failed.value.generation == number + 1
    assert min(took) < 0.1, took


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_the_signal_that_ends_a_starting_server_is_reported(
    orch: Orchestrator, fake: Fake, model_a: str, signum: int
) -> None:
    """SIGKILL is what the out-of-memory killer sends; at SIGTERM the fake server exits with 0."""
    fake.behave(loading_s=-1)
    loading = Background(orch.load, model_a)
    pid = fake.wait_for("bound").pid
    os.kill(pid, signum)
    assert isinstance(loading.error(), ServerStartFailed)
    last_exit = orch.status().last_exit
    assert last_exit is not None
    expected = 0 if signum == signal.SIGTERM else -signum
    assert (last_exit.pid, last_exit.returncode) == (pid, expected)


def test_an_exit_during_a_probe_ends_the_probe(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    fake.behave(answer_after_s=-1)
    loading = Background(orch.load, model_a)
    pid = fake.wait_for("bound").pid
    threading.Event().wait(0.1)  # until the probe has started
    begun = time.monotonic()
    kill(pid)
    assert isinstance(loading.error(), ServerStartFailed)
    assert time.monotonic() - begun < 1


def test_a_server_that_exits_as_it_becomes_ready_is_not_loaded(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """It answers 200 and exits: the load fails, or succeeds and the exit is noticed."""
    fake.behave(crash_after_s=0.0, crash_code=1)
    for _ in range(10):
        try:
            outcome = orch.load(model_a)
        except ServerStartFailed:
            assert orch.status().state is State.IDLE
        else:
            assert outcome.status == "loaded"
            until(lambda: orch.status().state is State.IDLE, "the exit to be noticed")
        assert fake.running() == set()


# Wakeups of the wait


@pytest.fixture
def rare_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe every minute, so that an earlier return was woken by something else."""
    monkeypatch.setattr(readiness, "FIRST_PROBE_S", 60.0)
    monkeypatch.setattr(readiness, "LONGEST_PROBE_S", 60.0)


@pytest.mark.usefixtures("rare_probes")
def test_the_wait_is_woken_by_the_output_of_the_child(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """At the line with its address it is probed at once."""
    fake.behave(bind_after_s=0.2)
    health = orch.load(model_a).timings_s.health
    assert health is not None
    assert health < 20


@pytest.mark.usefixtures("rare_probes")
def test_the_wait_is_woken_by_the_exit_of_the_child(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """This one has no socket whose closing could wake the wait."""
    fake.behave(hang=True)
    loading = Background(orch.load, model_a)
    pid = fake.wait_for("start").pid
    until_state(orch, State.WAITING_HEALTH)
    begun = time.monotonic()
    kill(pid)
    assert isinstance(loading.error(), ServerStartFailed)
    assert time.monotonic() - begun < 20


@pytest.mark.usefixtures("rare_probes")
def test_the_wait_is_woken_by_a_cancel(orch: Orchestrator, fake: Fake, model_a: str) -> None:
    """B18: a cancel must not wait for the next probe."""
    fake.behave(hang=True)
    loading = Background(orch.load, model_a, load_request_id="x")
    until_state(orch, State.WAITING_HEALTH)
    begun = time.monotonic()
    assert orch.cancel("x") is True
    assert isinstance(loading.error(), Cancelled)
    assert time.monotonic() - begun < 20


# Cancels


def test_a_cancel_interrupts_every_kind_of_wait(
    orch: Orchestrator, fake: Fake, model_a: str
) -> None:
    """Between two probes, during one, and while it connects to a full queue."""
    waits: list[dict[str, Any]] = [{"loading_s": -1}, {"answer_after_s": -1}, {"backlog": 0}]
    for behaviour in waits:
        fake.behave(**behaviour)
        took = []
        for _ in range(3):
            before = len(fake.entries("bound"))
            loading = Background(orch.load, model_a, load_request_id="x")
            fake.wait_for("bound", before + 1)
            until_state(orch, State.WAITING_HEALTH)
            threading.Event().wait(0.4)
            begun = time.monotonic()
            orch.cancel("x")
            took.append(time.monotonic() - begun)
            assert isinstance(loading.error(), Cancelled)
        assert min(took) < 0.25, (behaviour, took)
