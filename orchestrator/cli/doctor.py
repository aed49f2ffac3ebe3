"""`doctor`: can this machine run it, and if not, what is to be done.

One line a check: ok, a note, or a problem with its remedy. It starts no server, and leaves no more
behind than the slot's folder, which the first start would make too.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import click

from orchestrator.cli import config, logs, options
from orchestrator.cli.checks import CHECKS, Check, Wanted
from orchestrator.cli.output import say, say_json

_MARKS: Final = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "bold red")}


@click.command()
@click.argument("model", required=False)
@config.config_option(is_flag=False, flag_value="")
@config.schema_option()
@config.serving_options()
@options.json_option()
@click.pass_context
def doctor(ctx: click.Context, /, *, as_json: bool, **given: Any) -> int:
    """Check this machine for what `serve` would be, and say what to fix.

    With MODEL (a file, a folder, or owner/name[:VARIANT] on the Hub) also whether that fits.
    With --config (FILE or not), say first where every setting comes from.
    """
    logs.configure("warning", "console")
    wanted = Wanted(**{name: given[name] for name in Wanted.__slots__})
    explained = config.explain(ctx) if config.is_named(ctx) else None
    if explained is not None and not as_json:
        _show_settings(explained)
    found = []
    for check in CHECKS:
        for result in check(wanted):
            found.append(result)
            if not as_json:
                _show(result)
    problems = sum(result.verdict == "problem" for result in found)
    if as_json:
        members = {} if explained is None else {"config": explained}
        say_json({"ok": not problems, **members, "checks": [asdict(one) for one in found]})
    elif problems:
        say((f"\n{problems} to fix", "bold red"))
    else:
        say(("\nready", "bold green"), ("  try: llama-orchestrator demo", "dim"))
    return 1 if problems else 0


def _show_settings(explained: dict[str, Any]) -> None:
    say(("config  ", "bold"), explained["file"] or f"no file at {config.default_file()}")
    for one in explained["settings"]:
        value = ", ".join(one["value"]) if isinstance(one["value"], tuple) else one["value"]
        text = str(value) if value not in (None, "") else "-"
        source = f"{one['source']} {one['origin'] or ''}"
        say(f"  {one['name']:<15}{text:<22} ", (source.rstrip(), "dim"))
    for name in explained["unknown_variables"]:
        say(("· ", "yellow"), f"{name} is no setting and has no effect")
    say()


def _show(check: Check) -> None:
    mark, style = _MARKS[check.verdict]
    say((f"{mark} ", style), (f"{check.name:<13}", "bold"), check.detail)
    if check.remedy:
        say(" " * 15, ("→ ", style), check.remedy)
