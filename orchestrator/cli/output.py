"""What a person sees: results on stdout, problems on stderr, both as JSON when that was asked for.

Text of others (paths, messages, a model's answer) is never read as markup. Lines are not wrapped
or cut, so that what is piped can be searched; the terminal does that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import IO, Any, Final

import click
from rich.console import Console
from rich.text import Text

from orchestrator.machine.states import State

STYLES: Final = {
    State.IDLE: "dim",
    State.KILLING: "red",
    State.DOWNLOADING: "cyan",
    State.SPAWNING: "magenta",
    State.WAITING_HEALTH: "yellow",
    State.HEALTHY: "bold green",
}
NOTES: Final = {
    State.IDLE: "nothing runs",
    State.KILLING: "empty the slot, and verify it",
    State.DOWNLOADING: "find the model's files",
    State.SPAWNING: "start one server",
    State.WAITING_HEALTH: "it loads the model",
    State.HEALTHY: "it answers",
}
_WIDTH: Final = max(map(len, State))
_TAIL_LINES: Final = 12

Part = str | tuple[str, str]


def console(*, stderr: bool = False) -> Console:
    """Return a console on the stream of this moment (tests and pipes replace it)."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(*parts: Part, stderr: bool = False) -> None:
    """Print one line of parts; a part is text, or text and its style."""
    console(stderr=stderr).print(Text.assemble(*parts))
    (sys.stderr if stderr else sys.stdout).flush()


def say_json(members: Mapping[str, Any], *, one_line: bool = False) -> None:
    """Print one JSON document: indented, or a line that a reader can wait for."""
    click.echo(json.dumps(members, indent=None if one_line else 2))
    sys.stdout.flush()


def state_line(at_ms: float, state: State, pid: int | None) -> tuple[Part, ...]:
    """Return the parts of a timeline's line."""
    who = f"pid {pid}" if pid else ""
    return (
        f"  {at_ms:7,.0f} ms  ",
        (f"{state:<{_WIDTH}}", STYLES[state]),
        f"  {who:<12}",
        (NOTES[state], "dim"),
    )


def settings_line(name: str, *values: Part) -> None:
    """Print `name  value`."""
    say((f"  {name:<9}", "dim"), *values)


def list_reasons(reasons: list[dict[str, Any]]) -> None:
    """Print why a server has to be started anew, a line a setting."""
    for reason in reasons:
        running, requested = (_short(reason[key]) for key in ("running", "requested"))
        settings_line("differs", f"{reason['field']}: {running} → {requested}")


class Failure(click.ClickException):
    """A problem document on its way to the person (or program) that asked.

    Args:
        members: RFC 9457 members, as `Problem.as_dict` and HTTP have them.
        as_json: Print it on stdout as it is.
    """

    def __init__(self, members: Mapping[str, Any], *, as_json: bool = False) -> None:
        super().__init__(str(members.get("detail", members.get("title", "failed"))))
        self.members = members
        self.as_json = as_json

    def show(self, file: IO[Any] | None = None) -> None:
        if self.as_json:
            say_json(self.members)
            return
        show_problem(self.members)


def show_problem(members: Mapping[str, Any]) -> None:
    """Print a problem: what happened, the field to change, the server's last lines."""
    title = str(members.get("title", "Failed"))
    say(("✗ ", "bold red"), (title, "bold"), stderr=True)
    say(f"  {members.get('detail', '')}", stderr=True)
    if field := members.get("field"):
        say(("  change  ", "dim"), str(field), stderr=True)
    if restored := members.get("restored"):
        failed = restored.get("problem")
        what = f"could not be brought back: {failed['detail']}" if failed else "runs again"
        say(("  before  ", "dim"), f"{restored['model_path']} {what}", stderr=True)
    tail = [str(line) for line in members.get("log_tail", ())]
    if tail:
        say(("  the server's last lines", "dim"), stderr=True)
    for line in tail[-_TAIL_LINES:]:
        say(("  │ ", "dim"), line, stderr=True)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.partition(" (")[0]
