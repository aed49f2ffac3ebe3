"""What commands say to a pool, and how they show it: models by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import click

from orchestrator.cli import options
from orchestrator.cli.output import mib_text, say, say_field, state_part
from orchestrator.pool.by_hand import HandFields

_NAME_WIDTH: Final = 24
_STATE_WIDTH: Final = 15


def by_hand(
    model: str | None, model_option: str | None = None, *, clear_args: bool = False, **fields: Any
) -> tuple[str | None, HandFields]:
    """Return the name that a command line gives, and what a load of it may say.

    Raises:
        UsageError: it has settings, which are the catalogue's.
    """
    name = options.one_of(model, model_option)
    given = {key: value for key, value in fields.items() if value not in (None, False)}
    others = [key for key in given if key not in HandFields.__annotations__]
    others += ["llama_extra_args"] * (bool(options.flags_given()) or clear_args)
    if others:
        named = ", ".join(others)
        raise click.UsageError(
            f"The service is a pool, whose catalogue sets {named}: leave it out."
        )
    return name, cast("HandFields", given)


def say_pool(answer: Mapping[str, Any]) -> None:
    """Print a pool: its budget, its models, and who waits."""
    for one in answer["budget"]:
        used = f"{mib_text(one['reserved_mib'])} of {mib_text(one['total_mib'])} reserved"
        say_field(one["device"], used)
    say_models(answer["models"])
    for one in answer["waiting"]:
        requests = "1 request" if one["count"] == 1 else f"{one['count']} requests"
        say_field("waiting", f"{requests} for {one['model']}, {one['oldest_s']:,.1f} s")


def say_models(models: list[Mapping[str, Any]]) -> None:
    """Print one line for each model, and why its last load has failed."""
    for one in models:
        memory = one["memory"]
        facts = [
            mib_text(memory["mib"]) if memory else "",
            f"pid {one['pid']}" if one["pid"] else "",
            "pinned" * one["pinned"],
            f"group {one['group']}" if one["group"] else "",
            f"{one['leases']} in use" if one["leases"] else "",
            f"{one['waiting']} waiting" if one["waiting"] else "",
            one["kind"] if one["kind"] != "chat" else "",
        ]
        state = state_part(one["state"], _STATE_WIDTH)
        say(f"  {one['name']:<{_NAME_WIDTH}}  ", state, (", ".join(filter(None, facts)), "dim"))
        names = [*one["aliases"], *(f"{one['name']}:{preset}" for preset in one["presets"])]
        if names:
            say((f"  {'':<{_NAME_WIDTH}}  also {', '.join(names)}", "dim"))
        if error := one["last_error"]:
            say((f"  {'':<{_NAME_WIDTH}}  {error['detail']}", "red"))
    if not models:
        say(("  no models", "dim"))


def without_clocks(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a status without what changes by itself."""
    still = {**answer, "uptime_s": 0}
    if "waiting" in still:
        still["waiting"] = [{**one, "oldest_s": 0} for one in still["waiting"]]
    return still
