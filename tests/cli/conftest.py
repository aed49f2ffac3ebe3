"""Commands as processes, and a `serve` of each test's own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.command import COMMAND, DEADLINE_S, Cli, Running, Start, environment


@pytest.fixture
def start(state_dir: Path) -> Iterator[Start]:
    """Start a command that runs until it is stopped."""
    with contextlib.ExitStack() as stack:

        def begin(*args: str, **env: str) -> Running:
            running = Running(*args, **env)
            stack.callback(running.close)
            return running

        yield begin


@pytest.fixture
def cli() -> Cli:
    """Run a command to its end."""

    def run(*args: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args],
            capture_output=True,
            input=stdin,
            text=True,
            env=environment() | env,
            timeout=DEADLINE_S,
            check=False,
        )

    return run


@pytest.fixture
def own(state_dir: Path) -> tuple[str, ...]:
    """Options of `serve` and `run` for an orchestrator of this test's own, on a free port."""
    return ("--port", "0", "--state-dir", str(state_dir), "--llama-server", "embedded")


@pytest.fixture
def serving(start: Start, own: tuple[str, ...]) -> Iterator[str]:
    """The URL of a running `serve`, which must end well."""
    running = start("serve", "--json", *own)
    yield running.json_line()["url"]
    assert running.signal(signal.SIGTERM) == 0


@pytest.fixture
def never_ready(tmp_path: Path) -> str:
    """The path of a server that never becomes ready, so that a load lasts until it is ended."""
    binary = tmp_path / "never-ready"
    binary.write_text('#!/bin/sh\n[ "$1" = --help ] || exec sleep 1000\n')
    binary.chmod(0o755)
    return str(binary)
