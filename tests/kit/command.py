"""The real command in a process of its own: its output line by line, its exit code, its signals."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import orchestrator

DEADLINE_S = 30.0
COMMAND = (sys.executable, "-m", "orchestrator.cli")
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "Running"]


def environment() -> dict[str, str]:
    """Return an environment that finds the package, and selects no server and no setting.

    Output is buffered, as it is for users.
    """
    theirs = ("LLAMA_", "PYTHONUNBUFFERED")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    root = str(Path(orchestrator.__file__).parents[1])
    clean |= {"PYTHONPATH": root, "COLUMNS": "100", "PYTHONWARNINGS": "error"}
    return clean | {"XDG_CONFIG_HOME": "/nonexistent"}


class Running:
    """A command that has not ended."""

    def __init__(self, *args: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | env,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read_out, args=(self.process.stdout,)),
            threading.Thread(target=self.err.extend, args=(self.process.stderr,)),
        ]
        for reader in self._readers:
            reader.start()

    def _read_out(self, stream: IO[str]) -> None:
        for line in stream:
            self.out.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def line_with(self, word: str) -> str:
        """Wait for a line on stdout that contains this word."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get(timeout=DEADLINE_S)) is not None:
                if word in line:
                    return line
        raise AssertionError(f"no line with {word!r} in {self.out}; stderr: {self.err}")

    def json_line(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line_with("{"))
        return found

    def api_url(self) -> str:
        """Wait for the line that announces the API, and return its URL."""
        return self.line_with("API").split()[1]

    def signal(self, signum: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signum)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
