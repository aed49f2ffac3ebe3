"""`serve` and `run`: an orchestrator in this process behind HTTP, until a signal.

The orchestrator is closed before the HTTP server: closing ends event streams and waiting loads,
and no client may see the end of the service while llama-server is alive. SIGINT ends with 130,
SIGTERM and SIGHUP with 0; no server is left in any case. A signal that was ignored at the start, as
under `nohup` or in the background of a shell, stays ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click
import uvloop

from orchestrator.base.addresses import is_loopback
from orchestrator.cli import INTERRUPTED, config, logs, options
from orchestrator.cli.client import say_clients, say_loaded
from orchestrator.cli.loading import LoadView
from orchestrator.cli.output import (
    Failure,
    never_wait,
    say,
    say_field,
    say_json,
)
from orchestrator.errors import InvalidRequest, OrchestratorError, Superseded
from orchestrator.machine.states import State
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.settings.request import LoadRequest

if TYPE_CHECKING:
    import uvicorn

_OPEN_REQUESTS_S: Final = 2
_BACKLOG: Final = 1024
_BAR_EVERY_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Service:
    """What both commands serve, where, and to whom."""

    orch: AsyncOrchestrator
    listener: socket.socket
    api_keys: tuple[str, ...]
    allowed_hosts: frozenset[str]
    as_json: bool
    quiet: bool

    @property
    def is_silent(self) -> bool:
        """Whether nothing is printed for people."""
        return self.as_json or self.quiet

    @property
    def url(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@click.command(params=[config.config_option(), *config.SERVING, options.JSON])
def serve(**given: Any) -> int:
    """Serve the API, with no model loaded, until Ctrl-C."""
    return _run(None, "info", **given)


@click.command(cls=options.ModelCommand, params=[*options.MODEL, *options.START, *serve.params])
def run(**given: Any) -> int:
    """Load a model and serve it, until Ctrl-C.

    Flags that are not listed here go to llama-server, e.g. --top-k 20 --seed 42.
    """
    serving = {name: given.pop(name) for name in {*config.PARAMETERS.values(), "as_json"}}
    return _run(options.load_request(**given), "warning", **serving)


def _run(
    request: LoadRequest | None,
    level: logs.Level,
    *,
    log_format: logs.Format,
    log_level: logs.Level | None,
    **given: Any,
) -> int:
    never_wait()
    logs.configure(log_level or ("error" if given["quiet"] else level), log_format)
    with _service(**given) as service:
        return uvloop.run(_serve(service, request))


@contextlib.contextmanager
def _service(
    *,
    host: str,
    port: int,
    api_key_file: str | None,
    allowed_hosts: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    hang_timeout_s: float,
    **for_orchestrator: Any,
) -> Iterator[Service]:
    """Check everything that can be checked before anything is started, and listen."""
    for_orchestrator["hang_timeout_s"] = hang_timeout_s or None
    keys = options.keys_in(api_key_file)
    if not keys and not is_loopback(host):
        raise click.UsageError(
            f"--host {host} can be reached from other machines: give --api-key-file too, or set "
            f"{options.API_KEY_VARIABLE}."
        )
    from orchestrator.http.guards.origins import checked_hosts

    try:
        hosts = checked_hosts((host, *allowed_hosts))
        given = {name: value for name, value in for_orchestrator.items() if value is not None}
        orch = AsyncOrchestrator(**given)
    except InvalidRequest as error:
        raise click.UsageError(error.message) from error
    with _listen(host, port) as listener:
        try:
            yield Service(orch, listener, keys, hosts, as_json, quiet)
        except OrchestratorError as error:
            if isinstance(error, InvalidRequest) and error.field == "slot":  # checked at start
                raise click.UsageError(error.message) from error
            raise Failure(error.problem.as_dict()) from error


def _listen(host: str, port: int) -> socket.socket:
    """Return a listener that names its protocol: without it asyncio leaves Nagle's algorithm on,
    and a response waits 40 ms for the acknowledgement of its head.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        remedy = "give another --host or --port"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            remedy = "it is in use; --port 0 picks a free one"
        detail = f"cannot listen on {host}:{port}: {remedy}"
        problem = {"category": "address", "title": "Address not available", "detail": detail}
        raise Failure(problem) from error
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, listener.detach())


async def _serve(service: Service, request: LoadRequest | None) -> int:
    """Serve until a signal; with a request, load that first and end if it fails."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(signum: int) -> None:
        if not stopped.done():
            stopped.set_result(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            loop.add_signal_handler(signum, stop, signum)
    http = _http_server(service)
    gc.freeze()  # a full collection over all that stays would hold up every request for 30 ms
    tasks: list[asyncio.Task[Any]] = []
    try:
        await service.orch.start()
        tasks.append(asyncio.create_task(http.serve(sockets=[service.listener])))
        if request is None or not service.as_json:
            _announce(service)
        if request is not None:
            await _load(service, request, stopped, tasks)
        return INTERRUPTED if await stopped == signal.SIGINT else 0
    finally:
        await service.orch.close()
        http.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)


def _http_server(service: Service) -> uvicorn.Server:
    import uvicorn

    from orchestrator.http import create_app
    from orchestrator.http.connections import IDLE_S, BoundedProtocol

    app = create_app(
        service.orch,
        api_keys=service.api_keys,
        allowed_hosts=service.allowed_hosts,
        end_on_signals=False,
    )
    http = uvicorn.Server(
        uvicorn.Config(
            app,
            server_header=False,
            log_config=None,
            access_log=False,
            http=BoundedProtocol,
            timeout_keep_alive=int(IDLE_S),
            timeout_graceful_shutdown=_OPEN_REQUESTS_S,
        )
    )
    # The signals are ours.
    http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    return http


async def _load(
    service: Service,
    request: LoadRequest,
    stopped: asyncio.Future[int],
    tasks: list[asyncio.Task[Any]],
) -> None:
    """Load until settled or stopped, and print every transition until the orchestrator closes."""
    loading = asyncio.create_task(service.orch.load(request))
    tasks += [asyncio.create_task(_print_transitions(service, loading)), loading]
    either: set[asyncio.Future[Any]] = {loading, stopped}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return
    try:
        outcome = loading.result()
    except Superseded:  # by an HTTP client, whose load goes on
        say("superseded by a newer load; still serving", stderr=True)
        return
    if service.as_json:
        say_json({"url": service.url, "outcome": outcome.as_dict()}, one_line=True)


async def _print_transitions(service: Service, loading: asyncio.Task[LoadOutcome]) -> None:
    is_shown = service.is_silent
    view = LoadView(time.time())
    bar = asyncio.create_task(_show_bytes(service, view))
    try:
        async for event in service.orch.events(after=0):
            if not service.is_silent:
                view.transition(event)
            if event.trigger == "exited" and (exit_ := service.orch.status().last_exit):
                say(f"  the server exited by itself, status {exit_.returncode}", stderr=True)
            if event.trigger == "hung":
                say("  the server hung: it neither answered nor worked", stderr=True)
            if event.dest == State.HEALTHY and not is_shown:
                is_shown = True
                (outcome,) = await asyncio.gather(loading, return_exceptions=True)
                if isinstance(outcome, LoadOutcome):
                    say()
                    say_loaded(outcome.as_dict())
    finally:
        bar.cancel()
        view.end_bar()


async def _show_bytes(service: Service, view: LoadView) -> None:
    while not service.is_silent:
        view.progress(service.orch.progress())
        await asyncio.sleep(_BAR_EVERY_S)


def _announce(service: Service) -> None:
    if service.as_json:
        say_json({"url": service.url}, one_line=True)
    elif not service.quiet:
        say_field("API", (service.url, "bold"), ("  panel: /  docs: /docs  Ctrl-C stops", "dim"))
        say_clients(service.url)
