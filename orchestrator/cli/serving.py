"""`serve` and `run`: an orchestrator, or a pool, in this process behind HTTP, until a signal.

It is closed before the HTTP server: closing ends event streams and waiting loads, and no client may
see the end of the service while a llama-server is alive. SIGINT ends with 130, SIGTERM and SIGHUP
with 0; no server is left in any case. Of a pool without a controlling terminal SIGHUP reads the
catalogue again. A signal that was ignored at the start, as under `nohup` or in the background of a
shell, stays ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from orchestrator.base.addresses import is_loopback
from orchestrator.cli import INTERRUPTED, by_name, config, logs, options
from orchestrator.cli.answers import say_clients, say_loaded
from orchestrator.cli.loading import LoadView
from orchestrator.cli.output import (
    Failure,
    never_wait,
    say,
    say_field,
    say_json,
)
from orchestrator.cli.reloading import Reloader, has_terminal
from orchestrator.errors import InvalidCatalogue, InvalidRequest, OrchestratorError, Superseded
from orchestrator.machine.states import State
from orchestrator.pool.by_hand import HandFields
from orchestrator.pool.pool import AsyncModelPool, AsyncModelView
from orchestrator.runtime.answers import LoadOutcome
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.settings.request import LoadRequest

if TYPE_CHECKING:
    import uvicorn

_BAR_EVERY_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Named:
    """A model of a catalogue, and how it is loaded."""

    name: str
    how: HandFields


Wanted = LoadRequest | Named
"""What `run` loads."""


@dataclass(frozen=True, slots=True)
class Service:
    """What both commands serve, where, and to whom.

    Attributes:
        owner: Of the servers.
        reloader: Reads the catalogue of a pool again; an orchestrator has none.
    """

    owner: AsyncOrchestrator | AsyncModelPool
    reloader: Reloader | None
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
        from orchestrator.http.server import url_of

        return url_of(self.listener)


@click.command(params=[config.config_option(), *config.SERVING, options.JSON])
def serve(**given: Any) -> int:
    """Serve the API until Ctrl-C: with no model loaded, or the models of a catalogue by name."""
    return _run(None, "info", **given)


@click.command(cls=options.ModelCommand, params=[*options.MODEL, *options.START, *serve.params])
def run(**given: Any) -> int:
    """Load a model and serve it, until Ctrl-C.

    Flags that are not listed here go to llama-server, e.g. --top-k 20 --seed 42. With --models,
    MODEL is a name of the catalogue, which has its settings, and all of its models are served.
    """
    serving = {name: given.pop(name) for name in {*config.PARAMETERS.values(), "as_json"}}
    if serving["models"] is None:
        return _run(options.load_request(**given), "warning", **serving)
    name, how = by_name.by_hand(**given)
    if name is None:
        raise click.UsageError("MODEL is missing: give the name of a model of the catalogue.")
    return _run(Named(name, how), "warning", **serving)


def _run(
    wanted: Wanted | None,
    level: logs.Level,
    *,
    log_format: logs.Format,
    log_level: logs.Level | None,
    **given: Any,
) -> int:
    if given["watch"] and given["models"] is None:
        raise click.UsageError("--watch needs --models: without a catalogue nothing is read again.")
    never_wait()
    logs.configure(log_level or ("error" if given["quiet"] else level), log_format)
    with _service(**given) as service:
        return _run_loop(_serve(service, wanted))


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
    models: str | None,
    watch: bool,
    **for_orchestrator: Any,
) -> Iterator[Service]:
    """Check everything that can be checked before anything is started, and listen."""
    for_orchestrator["hang_timeout_s"] = hang_timeout_s or None
    keys = options.keys_in(api_key_file)
    from orchestrator.http.guards.origins import checked_hosts

    try:
        hosts = checked_hosts((host, *allowed_hosts))
        given = {name: value for name, value in for_orchestrator.items() if value is not None}
        reloader = None if models is None else Reloader(models, watches=watch)
        owner = AsyncOrchestrator(**given) if models is None else AsyncModelPool(models, **given)
    except InvalidCatalogue as error:
        raise Failure(error.problem.as_dict()) from error
    except InvalidRequest as error:
        raise click.UsageError(error.message) from error
    grants = owner.grants if isinstance(owner, AsyncModelPool) else ()
    if not keys and not grants and not is_loopback(host):
        raise click.UsageError(
            f"--host {host} can be reached from other machines: give --api-key-file too, or set "
            f"{options.API_KEY_VARIABLE}."
        )
    with _listen(host, port) as listener:
        try:
            yield Service(owner, reloader, listener, keys, hosts, as_json, quiet)
        except OrchestratorError as error:
            if isinstance(error, InvalidRequest) and error.field == "slot":  # checked at start
                raise click.UsageError(error.message) from error
            raise Failure(error.problem.as_dict()) from error


def _listen(host: str, port: int) -> socket.socket:
    from orchestrator.http.server import listener

    try:
        return listener(host, port)
    except (OSError, UnicodeError) as error:
        remedy = "give another --host or --port"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            remedy = "it is in use; --port 0 picks a free one"
        detail = f"cannot listen on {host}:{port}: {remedy}"
        problem = {"category": "address", "title": "Address not available", "detail": detail}
        raise Failure(problem) from error


if sys.platform == "win32":
    _run_loop = asyncio.run
else:
    import uvloop

    _run_loop = uvloop.run


def _handlers(
    stop: Callable[[int], object], reloader: Reloader | None
) -> dict[int, Callable[[int], object]]:
    found: dict[int, Callable[[int], object]] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if sys.platform == "win32":
        found[signal.SIGBREAK] = stop
    elif reloader is not None and not has_terminal():
        found[signal.SIGHUP] = reloader.ask
    else:
        found[signal.SIGHUP] = stop
    return found


def _on_signal(
    loop: asyncio.AbstractEventLoop, signum: int, handler: Callable[[int], object]
) -> None:
    if sys.platform == "win32":  # its loops know no signals
        signal.signal(signum, lambda *_: loop.call_soon_threadsafe(handler, signum))
    else:
        loop.add_signal_handler(signum, handler, signum)


async def _serve(service: Service, wanted: Wanted | None) -> int:
    """Serve until a signal; load what is wanted first, and end if that fails."""
    loop, owner = asyncio.get_running_loop(), service.owner
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(signum: int) -> None:
        if not stopped.done():
            stopped.set_result(signum)

    reloader = service.reloader
    for signum, handler in _handlers(stop, reloader).items():
        if signal.getsignal(signum) is not signal.SIG_IGN:
            _on_signal(loop, signum, handler)
    http = _http_server(service)
    gc.freeze()  # a full collection over all that stays would hold up every request for 30 ms
    tasks: list[asyncio.Task[Any]] = []
    try:
        await owner.start()
        tasks.append(asyncio.create_task(http.serve(sockets=[service.listener])))
        if reloader is not None and isinstance(owner, AsyncModelPool):
            tasks.append(asyncio.create_task(reloader.run(owner)))
        if wanted is None or not service.as_json:
            _announce(service)
        if wanted is not None:
            await _load(service, wanted, stopped, tasks)
        return INTERRUPTED if await stopped == signal.SIGINT else 0
    finally:
        await owner.close()
        http.should_exit = True
        if reloader is not None:
            reloader.close()
        await asyncio.gather(*tasks, return_exceptions=True)


def _http_server(service: Service) -> uvicorn.Server:
    from orchestrator.http import create_app
    from orchestrator.http.server import server_of

    is_pool = isinstance(service.owner, AsyncModelPool)
    served: dict[str, Any] = {"pool" if is_pool else "orch": service.owner}
    app = create_app(
        **served,
        api_keys=service.api_keys,
        allowed_hosts=service.allowed_hosts,
        end_on_signals=False,
    )
    return server_of(app)


async def _load(
    service: Service,
    wanted: Wanted,
    stopped: asyncio.Future[int],
    tasks: list[asyncio.Task[Any]],
) -> None:
    """Load until settled or stopped, and print every transition until the owner closes."""
    slot: AsyncOrchestrator | AsyncModelView
    if isinstance(wanted, Named):
        assert isinstance(service.owner, AsyncModelPool)  # noqa: S101 (made together)
        slot = service.owner[wanted.name]
        loading = asyncio.create_task(slot.load(**wanted.how))
    else:
        assert isinstance(service.owner, AsyncOrchestrator)  # noqa: S101
        slot = service.owner
        loading = asyncio.create_task(slot.load(wanted))
    tasks += [asyncio.create_task(_print_transitions(service, slot, loading)), loading]
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


async def _print_transitions(
    service: Service,
    slot: AsyncOrchestrator | AsyncModelView,
    loading: asyncio.Task[LoadOutcome],
) -> None:
    is_shown = service.is_silent
    view = LoadView(time.time())
    bar = asyncio.create_task(_show_bytes(service, slot, view))
    try:
        async for event in slot.events(after=0):
            if not service.is_silent:
                view.transition(event)
            if event.trigger == "exited" and (exit_ := slot.status().last_exit):
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


async def _show_bytes(
    service: Service, slot: AsyncOrchestrator | AsyncModelView, view: LoadView
) -> None:
    while not service.is_silent:
        view.progress(slot.progress())
        await asyncio.sleep(_BAR_EVERY_S)


def _announce(service: Service) -> None:
    if service.as_json:
        say_json({"url": service.url}, one_line=True)
    elif not service.quiet:
        say_field("API", (service.url, "bold"), ("  panel: /  docs: /docs  Ctrl-C stops", "dim"))
        if isinstance(service.owner, AsyncModelPool):
            say_field("models", ", ".join(service.owner.catalogue.models) or "none")
        say_clients(service.url)
