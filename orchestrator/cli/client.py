"""The commands that talk to a running orchestrator over HTTP.

The standard library's client follows neither proxy variables nor redirects: a key goes to the given
address and nowhere else. Ctrl-C during a load closes the connection, which withdraws this caller.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import click

from orchestrator.cli import options
from orchestrator.cli.output import (
    Failure,
    console,
    say,
    say_field,
    say_json,
    say_note,
    say_problem,
    say_reload_reasons,
    state_part,
)
from orchestrator.settings.fields import ECHOED

Json = dict[str, Any]

_PREFIX: Final = "/api/inference"
_LINES: Final = click.IntRange(1, 2000)
_CONNECTIONS: Final = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


@dataclass(frozen=True, slots=True)
class Remote:
    """A running orchestrator."""

    url: str
    key: str | None = None

    def get(self, path: str, *, timeout_s: float = 10.0) -> Json:
        """Return the JSON at a path; raises `Failure` if refused or if no orchestrator is there."""
        with self._response("GET", path, timeout_s=timeout_s) as response:
            return self._json(response)

    def post(self, path: str, body: Json, *, timeout_s: float | None = None) -> Json:
        """Post JSON, and return the JSON of the response; raises as `get` does."""
        sent = {"Content-Type": "application/json"}
        with self._response("POST", path, sent, json.dumps(body), timeout_s) as response:
            return self._json(response)

    def lines(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[str]:
        """Yield the lines of a stream until it ends; raises as `get` does."""
        with self._response("GET", path, headers) as response:
            if response.status >= 400:
                self._json(response)
            for line in response:
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    @contextlib.contextmanager
    def _response(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        base = urlsplit(self.url)
        try:
            make_connection, port = _CONNECTIONS[base.scheme], base.port
        except (KeyError, ValueError):
            message = f"--url must be an http or https URL, not {self.url!r}."
            raise click.UsageError(message) from None
        try:
            with contextlib.closing(
                make_connection(base.hostname or "", port, timeout=timeout_s)
            ) as connection:
                connection.request(
                    method, base.path.rstrip("/") + path, body, {**(headers or {}), **key}
                )
                yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            what = f"does not respond ({why}): start `llama-orchestrator serve`, or give --url"
            raise self._unreachable("No orchestrator there", what) from error

    def _json(self, response: http.client.HTTPResponse) -> Json:
        with contextlib.suppress(ValueError):
            document = json.loads(response.read())
            if isinstance(document, dict):
                if response.status >= 400:
                    raise Failure(document)
                return document
        raise self.not_understood()

    def not_understood(self) -> Failure:
        """Return the error of an answer that is none of an orchestrator's."""
        return self._unreachable("Not an orchestrator", "does not speak this API")

    def _unreachable(self, title: str, what: str) -> Failure:
        detail = f"{self.url} {what}"
        return Failure({"category": "unreachable", "title": title, "detail": detail})


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


def _command(
    *params: click.Parameter, cls: type[click.Command] = click.Command
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of these parameters; the function gets `remote` and `as_json` too."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def call(*, url: str, api_key_file: str | None, **given: Any) -> None:
            remote = Remote(url, next(iter(options.keys_in(api_key_file)), None))
            try:
                function(remote=remote, **given)
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise remote.not_understood() from error

        return click.command(cls=cls, params=[*params, *_OPTIONS])(call)

    return decorate


@_command(
    *(*options.MODEL, *options.START),
    options.setting("idle_ttl_s", "--idle-ttl", metavar="S"),
    *map(options.setting, ("force_reload", "on_busy")),
    options.setting("load_request_id", metavar="ID"),
    click.Option(["--clear-args"], is_flag=True, help="Do not inherit llama-server flags."),
    click.Option(["--no-wait"], is_flag=True, help="Print the generation and return at once."),
    cls=options.ModelCommand,
)
def load(*, remote: Remote, as_json: bool, clear_args: bool, no_wait: bool, **fields: Any) -> None:
    """Load a model, and wait until it is Healthy."""
    request = options.load_request(**fields, url=remote.url)
    body = {**request.as_dict(), "hf_token": request.hf_token}
    if clear_args:
        body["llama_extra_args"] = body["llama_extra_args"] or []
    with console(stderr=True).status("loading"):
        path = _PREFIX + "/load" + ("?wait=false" if no_wait else "")
        answer = remote.post(path, body)
    if as_json:
        say_json(answer)
    elif no_wait:
        say("accepted as generation ", (str(answer["generation"]), "bold"))
    else:
        took = f"in {answer['timings_s']['total'] * 1000:,.0f} ms"
        is_new = answer["status"] == "loaded"
        say(("✓ Healthy", "bold green"), (f"  {took if is_new else 'already loaded'}", "dim"))
        say_loaded(answer)
        say_reload_reasons(answer["reload_reasons"])


@_command(click.Argument(["model"], required=False))
def unload(*, remote: Remote, as_json: bool, model: str | None) -> None:
    """Stop the server, and wait until the slot is verified empty.

    With MODEL, only if that model is loaded or loading.
    """
    body = {} if model is None else {"model_path": options.absolute(model, remote.url)}
    with console(stderr=True).status("unloading"):
        answer = remote.post(_PREFIX + "/unload", body)
    if as_json:
        say_json(answer)
    elif answer["status"] == "unloaded":
        say(("✓ ", "green"), "unloaded: the slot is empty")
    else:
        say(("· ", "dim"), f"{model} is neither loaded nor loading: nothing was changed")


@_command(
    click.Option(["--load-request-id"], metavar="ID", help="The handle given to the load."),
    click.Option(["--generation"], type=int, metavar="N", help="The generation of the load."),
)
def cancel(*, remote: Remote, as_json: bool, **given: str | int | None) -> None:
    """Cancel one load that is in flight; a loaded model stays."""
    body = {name: value for name, value in given.items() if value is not None}
    if len(body) != 1:
        raise click.UsageError("Give exactly one of --load-request-id and --generation.")
    answer = remote.post(_PREFIX + "/cancel", body)
    if as_json:
        say_json(answer)
    elif answer["cancelled"]:
        say(("✓ ", "green"), "cancelled")
    else:
        say(("· ", "dim"), "no such load is in flight")


@_command()
def status(*, remote: Remote, as_json: bool) -> None:
    """Show the state, the loaded model and its settings."""
    answer = remote.get(_PREFIX + "/status")
    if as_json:
        say_json(answer)
        return
    say(state_part(answer["state"]), (f"  for {answer['uptime_s']:,.1f} s", "dim"))
    if answer["draining_left_s"] is not None:
        left = f", for {answer['draining_left_s']:,.1f} s at most"
        say_field("waits for", f"{answer['leases']} requests of this server{left}")
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
    if loaded := answer["loaded"]:
        say_loaded(loaded)
    if answer["last_error"]:
        say_problem(answer["last_error"])


@_command(*options.MODEL, options.setting("force_reload"), cls=options.ModelCommand)
def plan(*, remote: Remote, as_json: bool, **fields: Any) -> None:
    """Show what a load would do and why, without doing it."""
    request = options.load_request(**fields, url=remote.url).as_dict()
    answer = remote.post(_PREFIX + "/plan", request)
    if as_json:
        say_json(answer)
        return
    actions = {
        "none": "do nothing: the model is already loaded",
        "load": "load the model",
        "reload": "reload the model",
    }
    say("a load would ", (actions[answer["action"]], "bold"))
    say_reload_reasons(answer["reload_reasons"])
    say_note(answer)
    say_field("argv", shlex.join(answer["argv"]))


def say_loaded(loaded: Mapping[str, Any]) -> None:
    """Print the loaded model, its server and its settings."""
    variant = f"  {loaded['gguf_variant']}" if loaded["gguf_variant"] else ""
    say_field("model", loaded["model_path"], variant)
    say_field("server", loaded["base_url"], (f"  pid {loaded['pid']}", "dim"))
    requested = loaded["requested_context_length"] or "Auto"
    say_field("context", f"{loaded['context_length']}", (f"  requested: {requested}", "dim"))
    settings = [
        f"{name} {loaded[name]}"
        for name in ("cache_type_kv", "speculative_type", *ECHOED)
        if loaded.get(name) is not None and name != "chat_template_override"  # may be long
    ]
    say_field("settings", ", ".join(settings))
    if loaded["llama_extra_args"]:
        say_field("flags", shlex.join(loaded["llama_extra_args"]))
    say_note(loaded)


@_command(
    click.Option(["-n", "--lines"], type=_LINES, default=200, help="How many; default: 200."),
    click.Option(["-f", "--follow"], is_flag=True, help="Print new lines too, until Ctrl-C."),
)
def logs(*, remote: Remote, as_json: bool, lines: int, follow: bool) -> None:
    """Print the last lines of llama-server's output."""
    path = f"{_PREFIX}/logs?lines={lines}"
    if follow:
        for line in remote.lines(path + "&follow=true"):
            say_json({"line": line}, one_line=True) if as_json else say(line)
        return
    answer = remote.get(path)
    if as_json:
        say_json(answer)
        return
    for line in answer["lines"]:
        say(line)


@_command(
    click.Option(["--after"], type=click.IntRange(0), metavar="N", help="Start after event N.")
)
def events(*, remote: Remote, as_json: bool, after: int | None) -> None:
    """Print transitions and progress as they happen, until Ctrl-C."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    event: dict[str, str] = {}
    for line in remote.lines(_PREFIX + "/events", headers):
        name, _, value = line.partition(": ")
        if line:
            event[name] = value
        elif "data" in event:
            _say_event(event, as_json=as_json)
            event = {}


def _say_event(event: Mapping[str, str], *, as_json: bool) -> None:
    data = json.loads(event["data"])
    number, kind = event.get("id", ""), event.get("event", "")
    if as_json:
        say_json({"id": int(number), "kind": kind, **data}, one_line=True)
    elif kind == "transition":
        what = f"  {data['trigger']}, generation {data['generation']}"
        say((f"{number:>5}  ", "dim"), f"{data['source']} → ", state_part(data["dest"]), what)
    elif data.get("fraction") is not None:
        say((f"{'':>5}  {data['phase']} {data['fraction']:.0%}", "dim"))
