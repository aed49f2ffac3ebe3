"""What the commands print: results on stdout, problems and progress on stderr.

Text from elsewhere (paths, messages, a model's answer) is never read as markup, and its control
characters are shown instead of obeyed. Lines are not wrapped or cut: what is piped can be searched,
and the terminal wraps.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import sys
from collections.abc import Mapping
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final, TextIO

import click
from rich.console import Console
from rich.text import Text

from orchestrator.base import log
from orchestrator.base.background import Background
from orchestrator.machine.states import State

if TYPE_CHECKING:
    from rich.progress import Progress

_STYLES_AND_MEANINGS: Final = {
    State.IDLE: ("dim", "no server"),
    State.KILLING: ("red", "emptying the slot"),
    State.DOWNLOADING: ("cyan", "finding the model's files"),
    State.SPAWNING: ("magenta", "starting the server"),
    State.WAITING_HEALTH: ("yellow", "loading the model"),
    State.HEALTHY: ("bold green", "the server is ready"),
}
_WIDTH: Final = max(map(len, State))
_TAIL_LINES: Final = 12

_log = log.event_log("orchestrator.cli")

Part = str | tuple[str, str]
_ERRORS: Final = "backslashreplace"


class BackgroundStream(io.TextIOBase):
    """A text stream whose writer never waits and gets no error: a thread writes to the file.

    Not through a buffer of Python, which a thread that waits would keep locked at the exit.
    """

    encoding: str = "utf-8"
    errors: str | None = _ERRORS

    def __init__(self, stream: TextIO, background: Background) -> None:
        self._fd, self._background = stream.fileno(), background
        self._stream = stream  # open as long as this one
        self.encoding = stream.encoding

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._background.put(partial(_write, self._fd, text.encode(self.encoding, _ERRORS)))
        return len(text)


def _write(fd: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # the descriptor's other user has made it non-blocking
                select.select([], [fd], [])


def never_wait() -> None:
    """Have nothing in this process wait for a reader of its stdout and stderr, or end with one."""
    stdout = Background(
        "llama-stdout", lambda count: _log("warning", "output.dropped", count=count)
    )
    sys.stdout = BackgroundStream(sys.stdout, stdout)
    sys.stderr = BackgroundStream(sys.stderr, log.thread)


def prepare_streams() -> None:
    """Put nothing in place of a stream that was closed when the process was started, and a question
    mark in place of a character that a stream's encoding does not have, as a pipe of Windows.
    """
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="replace")


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def console(*, stderr: bool = False) -> Console:
    """Return a console on the current stream, which tests and pipes replace."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(*parts: Part, stderr: bool = False) -> None:
    """Print one line of parts; a part is text, or text and its style."""
    shown = [(part, "") if isinstance(part, str) else part for part in parts]
    line = Text.assemble(*[(log.escaped(text, kept="\t\n"), style) for text, style in shown])
    console(stderr=stderr).print(line)
    (sys.stderr if stderr else sys.stdout).flush()


def say_piece(text: str) -> None:
    """Print a part of a line at once, as `say` prints lines."""
    console().print(Text(log.escaped(text, kept="\t\n")), end="")
    sys.stdout.flush()


def say_json(document: Mapping[str, Any], *, one_line: bool = False) -> None:
    """Print a JSON document, indented or on one line."""
    sys.stdout.write(json.dumps(document, indent=None if one_line else 2) + "\n")
    sys.stdout.flush()


def download_bars() -> Progress:
    """Return an empty set of progress bars on stderr; a task has a field `note`."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", style="yellow", markup=False),
        console=console(stderr=True),
    )


def byte_text(size: int) -> str:
    """Return a number of bytes in the unit of all our texts: `1.5 GiB`."""
    amount, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:,.1f} {unit}" if unit != "bytes" else f"{size} bytes"


def mib_text(mib: int) -> str:
    return byte_text(mib << 20)


def state_part(state: str, width: int = 0) -> Part:
    """Return the name of a state in its color."""
    return f"{state:<{width}}", _STYLES_AND_MEANINGS[State(state)][0]


def state_line(at_ms: float, state: State, pid: int | None) -> tuple[Part, ...]:
    """Return the parts of one line of a timeline."""
    style, meaning = _STYLES_AND_MEANINGS[state]
    process = f"pid {pid}" if pid else ""
    name = f"{state:<{_WIDTH}}"
    return f"  {at_ms:7,.0f} ms  ", (name, style), f"  {process:<12}", (meaning, "dim")


def say_field(name: str, *values: Part, stderr: bool = False) -> None:
    """Print `name  value`."""
    say((f"  {name:<9}", "dim"), *values, stderr=stderr)


def say_reload_reasons(reasons: list[dict[str, Any]]) -> None:
    """Print each setting that requires a reload, with its running and its requested value."""
    for reason in reasons:
        running, requested = (
            (value if isinstance(value, str) else json.dumps(value)).partition(" (")[0]
            for value in (reason["running"], reason["requested"])
        )
        say_field("differs", f"{reason['field']}: {running} → {requested}")


def say_note(answer: Mapping[str, Any]) -> None:
    """Print the remark of an answer, if it has one."""
    if note := answer.get("note"):
        say_field("note", note)


class Failure(click.ClickException):
    """Ends the command with a problem document (RFC 9457), printed as JSON where requested."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(str(problem.get("detail", problem)))
        self._problem = problem
        context = click.get_current_context(silent=True)
        self._as_json = context is not None and context.params.get("as_json", False)

    def show(self, file: IO[Any] | None = None) -> None:
        if self._as_json:
            say_json(self._problem)
        else:
            say_problem(self._problem)


def say_problem(problem: Mapping[str, Any]) -> None:
    """Print a problem on stderr, with the field to change and the server's last lines."""
    say(("✗ ", "bold red"), (str(problem.get("title", "Failed")), "bold"), stderr=True)
    say(f"  {problem.get('detail', problem)}", stderr=True)
    if field := problem.get("field"):
        say_field("change", str(field), stderr=True)
    if restored := problem.get("restored"):
        failed = restored.get("problem")
        outcome = f"could not be restored: {failed['detail']}" if failed else "is loaded again"
        say_field("previous", f"{restored['model_path']} {outcome}", stderr=True)
    if tail := problem.get("log_tail"):
        say(("  last lines of the server", "dim"), stderr=True)
        for line in tail[-_TAIL_LINES:]:
            say(("  │ ", "dim"), str(line), stderr=True)
