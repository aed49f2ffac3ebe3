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
    """Where the package is found, a width, and nothing that chooses a server or a setting."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    root = str(Path(orchestrator.__file__).parents[1])
    clean |= {"PYTHONPATH": root, "COLUMNS": "100", "PYTHONWARNINGS": "error"}
    return clean | {"XDG_CONFIG_HOME": "/nonexistent"}


class Running:
    """A command that has not ended."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out, True)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err, False)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], into: list[str], announce: bool) -> None:
        for line in stream:
            into.append(line)
            if announce:
                self._lines.put(line)
        if announce:
            self._lines.put(None)

    def line_with(self, word: str) -> str:
        """Wait for a line on stdout that holds this word."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get(timeout=DEADLINE_S)) is not None:
                if word in line:
                    return line
        raise AssertionError(f"no line with {word!r} in {self.out}; stderr: {self.err}")

    def json_line(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line_with("{"))
        return found

    def signal(self, signum: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signum)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.ended()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.ended()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
