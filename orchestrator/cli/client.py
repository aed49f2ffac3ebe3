"""The commands that talk to a running service: `connect` for the terminal.

Of a pool they take the name of a model, of a single slot what they always took. Ctrl-C during a
load closes the connection, which withdraws this caller.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any, Final

import click

from orchestrator.cli import INTERRUPTED, by_name, options
from orchestrator.cli.answers import say_event, say_outcome, say_plan, say_status
from orchestrator.cli.loading import loading_shown
from orchestrator.cli.output import console, say, say_json
from orchestrator.cli.services import MODEL, MODEL_ARGUMENT, NAME, Served, remote_command

_LINES: Final = click.IntRange(1, 2000)
_WATCH_EVERY_S: Final = 1.0


@remote_command(
    *(*MODEL, *options.START),
    options.setting("idle_ttl_s", "--idle-ttl", metavar="S"),
    *map(options.setting, ("force_reload", "on_busy")),
    options.setting("load_request_id", metavar="ID"),
    click.Option(["--clear-args"], is_flag=True, help="Do not inherit llama-server flags."),
    click.Option(["--no-wait"], is_flag=True, help="Print the generation and return at once."),
    cls=options.ModelCommand,
)
def load(*, served: Served, as_json: bool, clear_args: bool, no_wait: bool, **fields: Any) -> int:
    """Load a model, and wait until it is Healthy. Ctrl-C withdraws the request.

    Where the service is a pool, MODEL is a name of its catalogue, which has the settings too.
    """
    name = None
    if served.pool is None:
        request = options.load_request(**fields)
        if clear_args and request.llama_extra_args is None:
            request = replace(request, llama_extra_args=())
        run, submit = partial(served.orch.load, request), partial(served.orch.submit, request)
    else:
        name, how = by_name.by_hand(clear_args=clear_args, **fields)
        run, submit = (
            partial(served.pool.load, name, **how),
            partial(served.pool.submit, name, **how),
        )
    if no_wait:
        generation = submit()
        if as_json:
            say_json({"generation": generation})
        else:
            say("accepted as generation ", (str(generation), "bold"))
        return 0
    with loading_shown(served.slot(name), is_silent=as_json):
        try:
            outcome = run()
        except KeyboardInterrupt:
            say("withdrawn: the load is cancelled, unless others wait for it", stderr=True)
            return INTERRUPTED
    if as_json:
        say_json(outcome.as_dict())
    else:
        say_outcome(outcome, served.url)
    return 0


@remote_command(
    MODEL_ARGUMENT,
    click.Option(["--cut"], is_flag=True, help="End the requests that use the server."),
)
def unload(*, served: Served, as_json: bool, model: str | None, cut: bool) -> None:
    """Stop the server, and wait until the slot is verified empty.

    With MODEL, only if that model is loaded or loading. Of a pool, the model of that name.
    """
    with console(stderr=True).status("unloading"):
        answer = (served.pool or served.orch).unload(model, cut=cut)
    if as_json:
        say_json(answer.as_dict())
    elif answer.status == "unloaded":
        say(("✓ ", "green"), "unloaded: the slot is empty")
    else:
        say(("· ", "dim"), f"{model} is neither loaded nor loading: nothing was changed")


@remote_command(
    NAME,
    click.Option(["--load-request-id"], metavar="ID", help="The handle given to the load."),
    click.Option(["--generation"], type=int, metavar="N", help="The generation of the load."),
)
def cancel(
    *,
    served: Served,
    as_json: bool,
    model: str | None,
    load_request_id: str | None,
    generation: int | None,
) -> None:
    """Cancel one load that is in flight; a loaded model stays.

    Of a pool, that of the model NAME; with --load-request-id only the load that has it.
    """
    if served.pool is not None:
        if generation is not None:
            raise click.UsageError("A load of a pool is cancelled by NAME, not by its generation.")
        is_cancelled = served.pool.cancel(model, load_request_id)
    else:
        served.slot(model)  # there are no names
        if (load_request_id is None) == (generation is None):
            raise click.UsageError("Give exactly one of --load-request-id and --generation.")
        is_cancelled = served.orch.cancel(load_request_id, generation)
    if as_json:
        say_json({"cancelled": is_cancelled})
    elif is_cancelled:
        say(("✓ ", "green"), "cancelled")
    else:
        say(("· ", "dim"), "no such load is in flight")


@remote_command(
    NAME, click.Option(["-w", "--watch"], is_flag=True, help="Print it anew until Ctrl-C.")
)
def status(*, served: Served, as_json: bool, model: str | None, watch: bool) -> None:
    """Show the state, the loaded model and its settings.

    Of a pool: its budget and every model, or the one that is named.
    """
    slot = served.slot(model)
    whole = served.pool if model is None else None
    shown: dict[str, Any] = {}
    while True:
        found = (whole or slot).status()
        answer = found.as_dict()
        changed = by_name.without_clocks(answer)
        if as_json and changed != shown:
            say_json(answer, one_line=watch)
        elif not as_json and (sys.stdout.isatty() or changed != shown):
            if watch:
                click.clear()  # nothing, unless stdout is a terminal
            if whole is not None:
                by_name.say_pool(answer)
            else:
                say_status(answer, served.url, slot.progress)
        shown = changed
        if not watch:
            return
        time.sleep(_WATCH_EVERY_S)


@remote_command(*MODEL, options.setting("force_reload"), cls=options.ModelCommand)
def plan(*, served: Served, as_json: bool, **fields: Any) -> None:
    """Show what a load would do and why, without doing it.

    Where the service is a pool, MODEL is a name of its catalogue.
    """
    if served.pool is None:
        found = served.orch.plan(options.load_request(**fields))
    else:
        name, how = by_name.by_hand(**fields)
        found = served.pool.plan(name, force_reload=how.get("force_reload", False))
    if as_json:
        say_json(found.as_dict())
    else:
        say_plan(found)


@remote_command(
    NAME,
    click.Option(["-n", "--lines"], type=_LINES, default=200, help="How many; default: 200."),
    click.Option(["-f", "--follow"], is_flag=True, help="Print new lines too, until Ctrl-C."),
)
def logs(*, served: Served, as_json: bool, model: str | None, lines: int, follow: bool) -> None:
    """Print the last lines of llama-server's output. Of a pool, that of the model NAME."""
    slot = served.slot(model)
    if follow:
        for line in slot.follow_logs(lines):
            say_json({"line": line}, one_line=True) if as_json else say(line)
        return
    output = slot.logs(lines)
    if as_json:
        say_json({"lines": list(output)})
        return
    for line in output:
        say(line)


@remote_command(
    NAME,
    click.Option(["--after"], type=click.IntRange(0), metavar="N", help="Start after event N."),
)
def events(*, served: Served, as_json: bool, model: str | None, after: int | None) -> None:
    """Print transitions and progress as they happen, until Ctrl-C.

    Of a pool: those of all models, or of the one that is named.
    """
    slot = served.slot(model)
    whole = served.pool if model is None else None
    for event in (whole or slot).events(after, progress=True):
        if as_json:
            say_json(event.as_dict(), one_line=True)
        else:
            say_event(event)
