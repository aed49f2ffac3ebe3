"""The commands that talk to a running orchestrator: `Orchestrator.connect` for the terminal.

Ctrl-C during a load closes the connection, which withdraws this caller.
"""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import click

from orchestrator.cli import INTERRUPTED, options
from orchestrator.cli.loading import loading_shown, progress_parts
from orchestrator.cli.output import (
    Failure,
    console,
    mib_text,
    say,
    say_field,
    say_json,
    say_note,
    say_problem,
    say_reload_reasons,
    state_part,
)
from orchestrator.errors import InvalidRequest, OrchestratorError
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.runtime.remote import RemoteOrchestrator
from orchestrator.settings.fields import ECHOED

_LINES: Final = click.IntRange(1, 2000)
_WATCH_EVERY_S: Final = 1.0

_OPTIONS: Final = (
    click.Option(["--url"], default=options.DEFAULT_URL, show_default=True, help="Service URL."),
    click.Option(
        ["--api-key-file"],  # every user can read a command line, so the key is never in it
        type=click.Path(),
        envvar=f"{options.API_KEY_VARIABLE}_FILE",
        metavar="F",
        help=f"File with the API key; default: ${options.API_KEY_VARIABLE}, if set.",
    ),
    options.JSON,
)


def remote_command(
    *params: click.Parameter, cls: type[click.Command] = click.Command
) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a command of these parameters; the function gets `remote` and `as_json` too."""

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def call(*, url: str, api_key_file: str | None, **given: Any) -> int | None:
            key = next(iter(options.keys_in(api_key_file)), None)
            try:
                remote = Orchestrator.connect(url, key)
            except InvalidRequest as error:
                raise click.UsageError(f"--url: {error.message}.") from error
            try:
                return function(remote=remote, **given)
            except OrchestratorError as error:
                raise Failure(error.problem.as_dict()) from error

        return click.command(cls=cls, params=[*params, *_OPTIONS])(call)

    return decorate


@remote_command(
    *(*options.MODEL, *options.START),
    options.setting("idle_ttl_s", "--idle-ttl", metavar="S"),
    *map(options.setting, ("force_reload", "on_busy")),
    options.setting("load_request_id", metavar="ID"),
    click.Option(["--clear-args"], is_flag=True, help="Do not inherit llama-server flags."),
    click.Option(["--no-wait"], is_flag=True, help="Print the generation and return at once."),
    cls=options.ModelCommand,
)
def load(
    *, remote: RemoteOrchestrator, as_json: bool, clear_args: bool, no_wait: bool, **fields: Any
) -> int:
    """Load a model, and wait until it is Healthy. Ctrl-C withdraws the request."""
    request = options.load_request(**fields)
    if clear_args and request.llama_extra_args is None:
        request = replace(request, llama_extra_args=())
    if no_wait:
        generation = remote.submit(request)
        if as_json:
            say_json({"generation": generation})
        else:
            say("accepted as generation ", (str(generation), "bold"))
        return 0
    with loading_shown(remote, is_silent=as_json):
        try:
            outcome = remote.load(request)
        except KeyboardInterrupt:
            say("withdrawn: the load is cancelled, unless others wait for it", stderr=True)
            return INTERRUPTED
    if as_json:
        say_json(outcome.as_dict())
        return 0
    is_new = outcome.status == "loaded"
    took = f"in {outcome.timings_s.total * 1000:,.0f} ms" if is_new else "already loaded"
    say(("✓ Healthy", "bold green"), (f"  {took}", "dim"))
    say_loaded(outcome.as_dict(), remote.url)
    say_reload_reasons([reason.as_dict() for reason in outcome.reload_reasons])
    return 0


@remote_command(
    options.MODEL_ARGUMENT,
    click.Option(["--cut"], is_flag=True, help="End the requests that use the server."),
)
def unload(*, remote: RemoteOrchestrator, as_json: bool, model: str | None, cut: bool) -> None:
    """Stop the server, and wait until the slot is verified empty.

    With MODEL, only if that model is loaded or loading.
    """
    with console(stderr=True).status("unloading"):
        answer = remote.unload(model, cut=cut)
    if as_json:
        say_json(answer.as_dict())
    elif answer.status == "unloaded":
        say(("✓ ", "green"), "unloaded: the slot is empty")
    else:
        say(("· ", "dim"), f"{model} is neither loaded nor loading: nothing was changed")


@remote_command(
    click.Option(["--load-request-id"], metavar="ID", help="The handle given to the load."),
    click.Option(["--generation"], type=int, metavar="N", help="The generation of the load."),
)
def cancel(
    *,
    remote: RemoteOrchestrator,
    as_json: bool,
    load_request_id: str | None,
    generation: int | None,
) -> None:
    """Cancel one load that is in flight; a loaded model stays."""
    if (load_request_id is None) == (generation is None):
        raise click.UsageError("Give exactly one of --load-request-id and --generation.")
    is_cancelled = remote.cancel(load_request_id, generation)
    if as_json:
        say_json({"cancelled": is_cancelled})
    elif is_cancelled:
        say(("✓ ", "green"), "cancelled")
    else:
        say(("· ", "dim"), "no such load is in flight")


@remote_command(click.Option(["-w", "--watch"], is_flag=True, help="Print it anew until Ctrl-C."))
def status(*, remote: RemoteOrchestrator, as_json: bool, watch: bool) -> None:
    """Show the state, the loaded model and its settings."""
    shown: dict[str, Any] = {}
    while True:
        answer = remote.status().as_dict()
        changed = {**answer, "uptime_s": 0}
        if as_json and changed != shown:
            say_json(answer, one_line=watch)
        elif not as_json and (sys.stdout.isatty() or changed != shown):
            if watch:
                click.clear()  # nothing, unless stdout is a terminal
            _say_status(answer, remote)
        shown = changed
        if not watch:
            return
        time.sleep(_WATCH_EVERY_S)


def _say_status(answer: Mapping[str, Any], remote: RemoteOrchestrator) -> None:
    say(state_part(answer["state"]), (f"  for {answer['uptime_s']:,.1f} s", "dim"))
    if answer["draining_left_s"] is not None:
        left = f", for {answer['draining_left_s']:,.1f} s at most"
        requests = "1 request" if answer["leases"] == 1 else f"{answer['leases']} requests"
        say_field("waits for", f"{requests} of this server{left}")
        say_field("", ("to end them: llama-orchestrator unload MODEL --cut", "dim"))
    elif answer["leases"]:
        say_field("requests", f"{answer['leases']}")
    if (pid := answer["occupied_by"]) is not None:
        say(("  process ", "red"), f"{pid} did not exit and still occupies the slot")
    if recovery := answer["recovery"]:
        left = ""
        if recovery["left_s"]:
            next_start = {"waiting": "restarts within", "cooling_down": "no restart for"}
            left = f", {next_start[recovery['phase']]} {recovery['left_s']:,.1f} s"
        say_field("recovery", f"{recovery['failures']} failures in a row{left}")
    if loading := answer["loading"]:
        say_field("loading", loading["model_path"], (f"  {loading['phase']}", "yellow"))
        if parts := progress_parts(remote.progress()):
            say_field("progress", *parts)
    if loaded := answer["loaded"]:
        say_loaded(loaded, remote.url)
    if answer["last_error"]:
        say_problem(answer["last_error"])


@remote_command(*options.MODEL, options.setting("force_reload"), cls=options.ModelCommand)
def plan(*, remote: RemoteOrchestrator, as_json: bool, **fields: Any) -> None:
    """Show what a load would do and why, without doing it."""
    plan = remote.plan(options.load_request(**fields))
    if as_json:
        say_json(plan.as_dict())
        return
    actions = {
        "none": "do nothing: the model is already loaded",
        "load": "load the model",
        "reload": "reload the model",
    }
    say("a load would ", (actions[plan.action], "bold"))
    say_reload_reasons([reason.as_dict() for reason in plan.reload_reasons])
    say_note(plan.as_dict())
    if plan.memory is not None:
        say_memory(plan.memory.as_dict(), free=plan.free, fits=plan.fits)
    say_field("argv", shlex.join(plan.argv))


def say_memory(
    memory: Mapping[str, Any], free: Mapping[str, int] | None = None, fits: bool | None = None
) -> None:
    """Print what a server takes of memory, and what is free."""
    fitted = ", context reduced to fit" * memory.get("fitted", False)
    say_field("memory", mib_text(memory["mib"]), (f"  {memory['source']}{fitted}", "dim"))
    for device, mib in memory["devices"].items():
        room = f" of {mib_text(free[device])} free" if free and device in free else ""
        say_field("", (f"{device}: {mib_text(mib)}{room}", "dim"))
    if fits is False:
        say_field("", ("does not fit", "red"))


def say_clients(url: str) -> None:
    """Print the base URL for clients of a service."""
    say_field("clients", (f"{url}/v1", "bold"), ("  base URL of OpenAI clients", "dim"))


def say_loaded(loaded: Mapping[str, Any], url: str | None = None) -> None:
    """Print the loaded model, its server and its settings; with a URL, that for clients too."""
    variant = f"  {loaded['gguf_variant']}" if loaded["gguf_variant"] else ""
    say_field("model", loaded["model_path"], variant)
    if url is not None:
        say_clients(url)
    origin = ", adopted" if loaded.get("adopted") else ""
    say_field("server", loaded["base_url"], (f"  pid {loaded['pid']}{origin}", "dim"))
    requested = loaded["requested_context_length"] or "Auto"
    say_field("context", f"{loaded['context_length']}", (f"  requested: {requested}", "dim"))
    if memory := loaded.get("memory"):
        say_memory(memory)
    settings = [
        f"{name} {loaded[name]}"
        for name in ("cache_type_kv", "speculative_type", *ECHOED)
        if loaded.get(name) is not None and name != "chat_template_override"  # may be long
    ]
    say_field("settings", ", ".join(settings))
    if loaded["llama_extra_args"]:
        say_field("flags", shlex.join(loaded["llama_extra_args"]))
    say_note(loaded)


@remote_command(
    click.Option(["-n", "--lines"], type=_LINES, default=200, help="How many; default: 200."),
    click.Option(["-f", "--follow"], is_flag=True, help="Print new lines too, until Ctrl-C."),
)
def logs(*, remote: RemoteOrchestrator, as_json: bool, lines: int, follow: bool) -> None:
    """Print the last lines of llama-server's output."""
    if follow:
        for line in remote.follow_logs(lines):
            say_json({"line": line}, one_line=True) if as_json else say(line)
        return
    output = remote.logs(lines)
    if as_json:
        say_json({"lines": list(output)})
        return
    for line in output:
        say(line)


@remote_command(
    click.Option(["--after"], type=click.IntRange(0), metavar="N", help="Start after event N.")
)
def events(*, remote: RemoteOrchestrator, as_json: bool, after: int | None) -> None:
    """Print transitions and progress as they happen, until Ctrl-C."""
    for event in remote.events(after, progress=True):
        if as_json:
            say_json(event.as_dict(), one_line=True)
        elif event.kind == "transition":
            what = f"  {event.trigger}, generation {event.generation}"
            at = time.strftime("%H:%M:%S", time.localtime(event.at))
            number = (f"{event.id:>5}  {at}  ", "dim")
            say(number, f"{event.source} → ", state_part(event.dest), what)
        elif event.fraction is not None:
            say((f"{'':>15}  {event.phase} {event.fraction:.0%}", "dim"))
