"""`serve` and `run` when nobody reads their output, and with signals that are ignored."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.cli.output import download_bars
from tests.kit.command import COMMAND, DEADLINE_S, Cli, Start, environment
from tests.kit.process.servers import servers_of
from tests.kit.process.support import until

Begin = Callable[..., "subprocess.Popen[bytes]"]
PIPE_BYTES = 4096
API = "/api/inference"


@pytest.fixture
def begin(state_dir: Path) -> Iterator[Begin]:
    """Start a command with these files as its stdout and stderr."""
    with contextlib.ExitStack() as stack:

        def start(*args: str, **options: Any) -> subprocess.Popen[bytes]:
            files = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
            given: dict[str, Any] = {**files, "start_new_session": True, **options}
            process = subprocess.Popen([*COMMAND, *args], env=environment(), **given)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The write end of a pipe that nobody reads, and that has no room left."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * PIPE_BYTES)
    os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


@pytest.fixture
def broken_pipe() -> Iterator[int]:
    """The write end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def full_disk() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def place(state_dir: Path) -> tuple[str, tuple[str, ...]]:
    """The URL of a free port, and the options for it: nobody can read which port it is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = ("--port", str(port), "--state-dir", str(state_dir), "--llama-server", "embedded")
    return f"http://127.0.0.1:{port}", own


def state_of(url: str) -> str | None:
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.get(url + API + "/status", trust_env=False, timeout=DEADLINE_S)
        return str(answer.json()["state"])
    return None


def post(url: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    answer = httpx.post(url + API + path, json=body, trust_env=False, timeout=DEADLINE_S)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("kind", ["full_pipe", "broken_pipe", "full_disk"])
@pytest.mark.parametrize("command", ["serve", "run"])
def test_output_that_cannot_be_written_stops_nothing(
    request: pytest.FixtureRequest,
    begin: Begin,
    place: tuple[str, tuple[str, ...]],
    state_dir: Path,
    tiny_model: str,
    command: str,
    kind: str,
) -> None:
    """Neither the start, nor loads, nor the unload, nor the end by SIGTERM, with its exit code."""
    url, own = place
    output: int = request.getfixturevalue(kind)
    model = (tiny_model,) if command == "run" else ()
    args = (command, *model, *own, "--log-level", "debug")
    process = begin(*args, stdout=output, stderr=output)
    until(lambda: state_of(url) == ("Healthy" if model else "Idle"), "the service")
    for context in (256, 512, 256):
        body: dict[str, object] = {"model_path": tiny_model, "max_seq_length": context}
        assert post(url, "/load", body)["status"] == "loaded"
    assert post(url, "/unload", {})["status"] == "unloaded"
    assert post(url, "/load", {"model_path": tiny_model})["status"] == "loaded"
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0
    assert servers_of(state_dir) == set()


@pytest.mark.parametrize("kind", ["full_pipe", "broken_pipe"])
def test_a_failed_run_ends_with_1_although_nobody_reads_why(
    request: pytest.FixtureRequest, begin: Begin, place: tuple[str, tuple[str, ...]], kind: str
) -> None:
    output: int = request.getfixturevalue(kind)
    process = begin("run", "gone.gguf", *place[1], stdout=output, stderr=output)
    assert process.wait(DEADLINE_S) == 1


def test_serve_starts_with_its_output_closed(
    begin: Begin, place: tuple[str, tuple[str, ...]]
) -> None:
    """As some supervisors start it: without descriptors 1 and 2."""
    url, own = place

    def close_output() -> None:
        os.close(1)
        os.close(2)

    process = begin("serve", *own, preexec_fn=close_output)
    until(lambda: state_of(url) == "Idle", "the service")
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("diagram",), 0),
        (("doctor", "--config"), 0),
        (("--version",), 0),
        (("--help",), 0),
        (("status", "--url", "http://127.0.0.1:1"), 1),
        (("status", "--json", "--url", "http://127.0.0.1:1"), 1),
        (("pull", "/nope"), 2),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_command_ends_in_order_whatever_becomes_of_its_output(
    begin: Begin, full_disk: int, broken_pipe: int, args: tuple[str, ...], code: int
) -> None:
    """Both streams closed, on a full disk, or without a reader: no traceback takes its place."""
    closed = begin(*args, preexec_fn=lambda: os.closerange(1, 3))
    assert closed.wait(DEADLINE_S) == code
    for output in (full_disk, broken_pipe):
        process = begin(*args, stdout=output, stderr=output)
        assert process.wait(DEADLINE_S) == (code or 1)
        process = begin(*args, stdout=output, stderr=subprocess.PIPE)
        assert process.stderr is not None
        with process.stderr as stderr:
            said = stderr.read()
        assert process.wait(DEADLINE_S) == (code or 1)
        assert b"Traceback" not in bytes(said)
        if output == full_disk and code == 0:
            assert said == b"Error: the output cannot be written: No space left on device\n"


def test_what_was_printed_before_the_end_is_written(cli: Cli, own: tuple[str, ...]) -> None:
    """The threads that write are not cut off."""
    done = cli("run", "gone.gguf", *own, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["category"] == "model_not_found"


@pytest.mark.parametrize(
    ("args", "levels"),
    [
        ((), ("info",)),
        (("--log-level", "debug"), ("debug", "info")),
        (("--log-level", "warning"), ()),
        (("--quiet",), ()),
        (("--quiet", "--log-level", "info"), ("info",)),
    ],
    ids=" ".join,
)
def test_log_level_and_quiet_choose_what_is_logged(
    start: Start,
    place: tuple[str, tuple[str, ...]],
    tiny_model: str,
    args: tuple[str, ...],
    levels: tuple[str, ...],
) -> None:
    url, own = place
    running = start("serve", *own, "--log-format", "json", *args)
    until(lambda: state_of(url) == "Idle", "the service")
    for _ in range(2):
        post(url, "/load", {"model_path": tiny_model})
    assert running.signal(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in running.err]
    assert {line["level"] for line in lines} == set(levels)
    unchanged = [line for line in lines if line["event"] == "load.already_loaded"]
    assert len(unchanged) == ("debug" in levels)
    assert bool(running.out) is ("--quiet" not in args)


def test_a_quiet_run_prints_nothing_but_failures(
    start: Start, cli: Cli, place: tuple[str, tuple[str, ...]], tiny_model: str
) -> None:
    url, own = place
    running = start("run", tiny_model, *own, "--quiet")
    until(lambda: state_of(url) == "Healthy", "the model")
    assert running.signal(signal.SIGTERM) == 0
    assert (running.out, running.err) == ([], [])
    failed = cli("run", "gone.gguf", *own, "--quiet")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "gone.gguf" in failed.stderr


# --------------------------------------------------------------------------------------- signals


def ignored_by(pid: int) -> set[int]:
    """Return the signals that a process ignores."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if "SigIgn" in line), 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


@pytest.mark.parametrize("model", [False, True], ids=["serve", "run"])
@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    begin: Begin, place: tuple[str, tuple[str, ...]], tiny_model: str, ignored: int, model: bool
) -> None:
    """`nohup` ignores SIGHUP, a shell SIGINT for what it starts in the background."""
    url, own = place
    others = {signal.SIGHUP: 0, signal.SIGINT: 130, signal.SIGTERM: 0}
    del others[signal.Signals(ignored)]
    command = ("run", tiny_model) if model else ("serve",)
    process = begin(
        *command, *own, preexec_fn=lambda: signal.signal(ignored, signal.SIG_IGN) and None
    )
    until(lambda: state_of(url) == ("Healthy" if model else "Idle"), "the service")
    process.send_signal(ignored)
    assert ignored in ignored_by(process.pid)
    assert state_of(url) == ("Healthy" if model else "Idle")
    other, code = others.popitem()
    process.send_signal(other)
    assert process.wait(DEADLINE_S) == code


def test_serve_outlives_its_terminal_under_nohup(
    state_dir: Path, place: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    """As a user starts it: from a shell, in the background, and the shell is hung up on."""
    url, own = place
    line = 'nohup "$@" > nohup.log 2>&1 & echo $!; wait'
    shell = subprocess.Popen(
        ["sh", "-c", line, "sh", *COMMAND, "serve", *own],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=tmp_path,
        start_new_session=True,
    )
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    try:
        until(lambda: state_of(url) == "Idle", "the service")
        assert {signal.SIGHUP, signal.SIGINT} <= ignored_by(pid)
        for signum in (signal.SIGINT, signal.SIGHUP):
            os.killpg(shell.pid, signum)
        shell.wait(DEADLINE_S)
        assert state_of(url) == "Idle"
    finally:
        os.kill(pid, signal.SIGTERM)
        shell.stdout.close()
    until(lambda: state_of(url) is None, "the end of the service")


def test_names_of_files_are_no_markup_of_progress_bars() -> None:
    """`[/x].gguf` ended `pull` and `run` with a traceback."""
    with download_bars() as bars:
        bars.add_task("[/x].gguf", total=1, note="[/y]")
        assert "[/x].gguf" in "".join(segment.text for segment in bars.console.render(bars))
