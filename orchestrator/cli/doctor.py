"""`doctor`: can this machine run it, and if not, what is to be done.

One line a check: ok, a note, or a problem with its remedy. It starts no server, and leaves no more
behind than the slot's folder, which the first start would make too.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import click

from orchestrator.cli import logs, options
from orchestrator.cli.checks import CHECKS, Check, Wanted
from orchestrator.cli.output import say, say_json

_MARKS: Final = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "bold red")}


@click.command()
@click.argument("model", required=False)
@click.option("--llama-server", default="auto", metavar="auto|embedded|PATH", show_default=True)
@click.option("--slot", default="default", metavar="NAME", show_default=True)
@click.option("--state-dir", metavar="DIR")
@click.option("--port", type=click.IntRange(1, 65535), default=options.DEFAULT_PORT)
@options.json_option()
def doctor(
    *,
    as_json: bool,
    model: str | None,
    llama_server: str,
    slot: str,
    state_dir: str | None,
    port: int,
) -> int:
    """Check this machine and say what to fix.

    With MODEL (a file, a folder, or owner/name[:VARIANT] on the Hub) also whether that fits.
    """
    logs.configure("warning", "console")
    wanted = Wanted(llama_server, slot, state_dir, port, model)
    found = []
    for check in CHECKS:
        for result in check(wanted):
            found.append(result)
            if not as_json:
                _show(result)
    problems = sum(result.verdict == "problem" for result in found)
    if as_json:
        say_json({"ok": not problems, "checks": [asdict(result) for result in found]})
    elif problems:
        say((f"\n{problems} to fix", "bold red"))
    else:
        say(("\nready", "bold green"), ("  try: llama-orchestrator demo", "dim"))
    return 1 if problems else 0


def _show(check: Check) -> None:
    mark, style = _MARKS[check.verdict]
    say((f"{mark} ", style), (f"{check.name:<13}", "bold"), check.detail)
    if check.remedy:
        say(" " * 15, ("→ ", style), check.remedy)
