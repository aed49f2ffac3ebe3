"""`load`, `unload`, `cancel`, `status` and `plan`: questions to a running orchestrator over HTTP.

The standard library's client, because it follows no proxy variable and no redirect, so a key goes
to the address that was given and nowhere else. Ctrl-C during a load closes the connection, which
withdraws this caller.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import click

from orchestrator.cli import options
from orchestrator.cli.output import (
    STYLES,
    Failure,
    console,
    list_reasons,
    say,
    say_json,
    settings_line,
    show_problem,
)
from orchestrator.machine.states import State
from orchestrator.settings.fields import SHOWN

_PREFIX: Final = "/api/inference"
_QUICK_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Remote:
    """A running orchestrator, as the options of a command name it."""

    url: str
    key: str | None
    as_json: bool

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Ask, and return the answer's JSON.

        Raises:
            Failure: it refused, or there is nothing that speaks this API.
        """
        headers = {}
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with self._asked(method, path, payload, headers, timeout_s) as answer:
            status, data = answer.status, answer.read()
        return self._members(status, data)

    def lines(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[str]:
        """Ask for a stream, and yield its lines until it ends.

        Raises:
            Failure: as `call`.
        """
        with self._asked("GET", path, None, headers or {}, None) as answer:
            if answer.status >= 400:
                self._members(answer.status, answer.read())
            for line in answer:
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        payload: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> Iterator[http.client.HTTPResponse]:
        base = urlsplit(self.url)
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            connection = kind[base.scheme](base.hostname or "", base.port, timeout=timeout_s)
        except (KeyError, ValueError):
            raise click.UsageError(f"--url {self.url!r} is not an http(s) address.") from None
        try:
            with contextlib.closing(connection):
                where = base.path.rstrip("/") + path
                connection.request(method, where, payload, {**headers, **key})
                yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def _members(self, status: int, data: bytes) -> dict[str, Any]:
        try:
            members = json.loads(data)
        except ValueError:
            members = None
        if not isinstance(members, dict):
            raise self._failure("unreachable", "Not an orchestrator", "does not speak this API")
        if status >= 400:
            raise Failure(members, as_json=self.as_json)
        return members

    def _unreachable(self, error: Exception) -> Failure:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        what = f"does not answer ({why}): start one with `llama-orchestrator serve`, or give --url"
        return self._failure("unreachable", "No orchestrator there", what)

    def _failure(self, category: str, title: str, what: str) -> Failure:
        members = {"category": category, "title": title, "detail": f"{self.url} {what}"}
        return Failure(members, as_json=self.as_json)


def remote_options() -> options.Decorator:
    """`--url`, the key and `--json`."""
    return options.together(
        click.option("--url", default=options.DEFAULT_URL, show_default=True),
        options.key_option("The key the orchestrator wants"),
        options.json_option(),
    )


def _remote(url: str, api_key_file: str | None, as_json: bool) -> Remote:
    return Remote(url, next(iter(options.keys_in(api_key_file)), None), as_json)


@click.command(cls=options.ModelCommand)
@options.model_options()
@options.start_options()
@options.idle_ttl_option("Unload it after this long without use.")
@click.option("--force-reload", is_flag=True, help="Reload even when nothing differs.")
@click.option("--on-busy", type=click.Choice(["supersede", "queue", "reject"]))
@click.option("--load-request-id", metavar="ID", help="A handle for `cancel`.")
@click.option("--clear-args", is_flag=True, help="Do not inherit earlier llama-server flags.")
@click.option("--no-wait", is_flag=True, help="Print the generation and return.")
@remote_options()
def load(
    *,
    url: str,
    api_key_file: str | None,
    as_json: bool,
    clear_args: bool,
    no_wait: bool,
    **fields: Any,
) -> None:
    """Load a model, and wait until it is Healthy."""
    remote = _remote(url, api_key_file, as_json)
    wanted = options.load_request(**fields, url=url)
    request = {**wanted.as_dict(), "hf_token": wanted.hf_token}
    if clear_args:
        request["llama_extra_args"] = request["llama_extra_args"] or []
    path = _PREFIX + "/load" + ("?wait=false" if no_wait else "")
    with console(stderr=True).status("loading"):
        answer = remote.call("POST", path, request)
    if as_json:
        say_json(answer)
    elif no_wait:
        say("accepted as generation ", (str(answer["generation"]), "bold"))
    else:
        show_loaded(answer)


@click.command()
@click.argument("model", required=False)
@remote_options()
def unload(*, model: str | None, url: str, api_key_file: str | None, as_json: bool) -> None:
    """Stop the server; returns when the slot is verified empty."""
    body = {} if model is None else {"model_path": options.absolute(model, url)}
    with console(stderr=True).status("unloading"):
        answer = _remote(url, api_key_file, as_json).call("POST", _PREFIX + "/unload", body)
    if as_json:
        say_json(answer)
    elif answer["status"] == "unloaded":
        say(("✓ ", "green"), "unloaded: the slot is empty")
    else:
        say(("· ", "dim"), f"{model} is neither loaded nor loading: nothing was changed")


@click.command()
@click.option("--load-request-id", metavar="ID", help="The handle given to the load.")
@click.option("--generation", type=int, metavar="N")
@remote_options()
def cancel(
    *,
    load_request_id: str | None,
    generation: int | None,
    url: str,
    api_key_file: str | None,
    as_json: bool,
) -> None:
    """End one load that is in flight, never a running model."""
    if (load_request_id is None) == (generation is None):
        raise click.UsageError("Give exactly one of --load-request-id and --generation.")
    named: dict[str, Any] = {"load_request_id": load_request_id, "generation": generation}
    body = {name: value for name, value in named.items() if value is not None}
    answer = _remote(url, api_key_file, as_json).call("POST", _PREFIX + "/cancel", body)
    if as_json:
        say_json(answer)
    elif answer["cancelled"]:
        say(("✓ ", "green"), "cancelled")
    else:
        say(("· ", "dim"), "no such load is in flight")


@click.command()
@remote_options()
def status(*, url: str, api_key_file: str | None, as_json: bool) -> None:
    """Say what is true right now."""
    remote = _remote(url, api_key_file, as_json)
    answer = remote.call("GET", _PREFIX + "/status", timeout_s=_QUICK_S)
    if as_json:
        say_json(answer)
        return
    state = State(answer["state"])
    say((f"{state}", STYLES[state]), (f"  for {answer['uptime_s']:,.1f} s", "dim"))
    if (pid := answer["occupied_by"]) is not None:
        say(("  process ", "red"), f"{pid} would not die and keeps the slot occupied")
    if recovery := answer["recovery"]:
        what = {"waiting": "starts again within", "cooling_down": "is not started for"}
        when = (
            f"{what[recovery['phase']]} {recovery['left_s']:,.1f} s" if recovery["left_s"] else ""
        )
        settings_line("recovery", f"{recovery['failures']} failures in a row  ", when)
    if loading := answer["loading"]:
        settings_line("loading", loading["model_path"], (f"  {loading['phase']}", "yellow"))
    if loaded := answer["loaded"]:
        show_settings(loaded)
    if answer["last_error"]:
        show_problem(answer["last_error"])


@click.command(cls=options.ModelCommand)
@options.model_options()
@click.option("--force-reload", is_flag=True, help="As for a load that must reload.")
@remote_options()
def plan(*, url: str, api_key_file: str | None, as_json: bool, **fields: Any) -> None:
    """Say what a load would do, and why, without doing it."""
    remote = _remote(url, api_key_file, as_json)
    request = options.load_request(**fields, url=url).as_dict()
    answer = remote.call("POST", _PREFIX + "/plan", request)
    if as_json:
        say_json(answer)
        return
    meaning = {"none": "nothing: it runs already", "load": "load it", "reload": "reload it"}
    say("it would ", (meaning[answer["action"]], "bold"))
    list_reasons(answer["reload_reasons"])
    settings_line("argv", shlex.join(answer["argv"]))


def show_loaded(answer: Mapping[str, Any]) -> None:
    """Print the answer to a load."""
    total_ms = answer["timings_s"]["total"] * 1000
    took = "already loaded" if answer["status"] == "already_loaded" else f"in {total_ms:,.0f} ms"
    say(("✓ Healthy", "bold green"), (f"  {took}", "dim"))
    show_settings(answer)
    list_reasons(answer["reload_reasons"])


def show_settings(loaded: Mapping[str, Any]) -> None:
    """Print what runs and with which settings."""
    variant = f"  {loaded['gguf_variant']}" if loaded["gguf_variant"] else ""
    settings_line("model", loaded["model_path"], variant)
    settings_line("server", loaded["base_url"], (f"  pid {loaded['pid']}", "dim"))
    asked = loaded["requested_context_length"] or "Auto"
    settings_line("context", f"{loaded['context_length']}", (f"  asked for {asked}", "dim"))
    names = ("cache_type_kv", "speculative_type", *SHOWN)
    told = {name: loaded[name] for name in names if loaded.get(name) is not None}
    told.pop("chat_template_override", None)  # as long as it likes
    settings_line("settings", ", ".join(f"{name} {value}" for name, value in told.items()))
    if loaded["llama_extra_args"]:
        settings_line("flags", shlex.join(loaded["llama_extra_args"]))


@click.command()
@click.option("-n", "--lines", type=click.IntRange(1, 2000), default=200, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with every new line, until Ctrl-C.")
@remote_options()
def logs(*, lines: int, follow: bool, url: str, api_key_file: str | None, as_json: bool) -> None:
    """Print what the server printed last."""
    remote = _remote(url, api_key_file, as_json)
    path = f"{_PREFIX}/logs?lines={lines}"
    if follow:
        for line in remote.lines(path + "&follow=true"):
            say_json({"line": line}, one_line=True) if as_json else say(line)
        return
    answer = remote.call("GET", path, timeout_s=_QUICK_S)
    if as_json:
        say_json(answer)
        return
    for line in answer["lines"]:
        say(line)


@click.command()
@click.option("--after", type=click.IntRange(0), metavar="N", help="Begin after this event.")
@remote_options()
def events(*, after: int | None, url: str, api_key_file: str | None, as_json: bool) -> None:
    """Print what happens, as it happens, until Ctrl-C."""
    remote = _remote(url, api_key_file, as_json)
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    told: dict[str, Any] = {}
    for line in remote.lines(_PREFIX + "/events", headers):
        name, _, value = line.partition(": ")
        if line:
            told[name] = value
        elif "data" in told:
            _tell_event(told, as_json=as_json)
            told = {}


def _tell_event(told: dict[str, Any], *, as_json: bool) -> None:
    members = json.loads(told["data"])
    number, kind = told.get("id", ""), told.get("event", "")
    if as_json:
        say_json({"id": int(number), "kind": kind, **members}, one_line=True)
    elif kind == "transition":
        dest = State(members["dest"])
        what = f"  {members['trigger']}, generation {members['generation']}"
        say((f"{number:>5}  ", "dim"), f"{members['source']} → ", (dest, STYLES[dest]), what)
    elif members.get("fraction") is not None:
        say((f"{'':>5}  {members['phase']} {members['fraction']:.0%}", "dim"))
