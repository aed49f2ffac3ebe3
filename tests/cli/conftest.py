"""The real command in a process of its own: its output line by line, its exit code, its signals."""

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
    """Start a command that stays."""
    with contextlib.ExitStack() as stack:

        def begin(*args: str) -> Running:
            running = Running(*args)
            stack.callback(running.close)
            return running

        yield begin


@pytest.fixture
def cli() -> Cli:
    """Run a command to its end."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args],
            capture_output=True,
            text=True,
            env=environment() | env,
            timeout=DEADLINE_S,
            check=False,
        )

    return run


@pytest.fixture
def here(state_dir: Path) -> tuple[str, ...]:
    """The options of an orchestrator of this test's own, on any free port."""
    return ("--port", "0", "--state-dir", str(state_dir), "--llama-server", "embedded")


@pytest.fixture
def serving(start: Start, here: tuple[str, ...]) -> Iterator[str]:
    """The address of a running `serve`; it must end well."""
    running = start("serve", "--json", *here)
    yield running.json_line()["url"]
    assert running.signal(signal.SIGTERM) == 0


@pytest.fixture
def hangs(tmp_path: Path) -> str:
    """A server that never becomes ready, so that a load lasts until somebody ends it."""
    binary = tmp_path / "hangs"
    binary.write_text("#!/bin/sh\nexec sleep 1000\n")
    binary.chmod(0o755)
    return str(binary)
