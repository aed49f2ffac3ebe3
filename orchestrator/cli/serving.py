"""`serve` and `run`: an orchestrator of this process behind HTTP, until a signal.

The orchestrator is closed first and the HTTP server after it: closing is what ends event streams
and waiting loads, and nobody may be told "stopped" while a server lives. SIGINT ends with 130,
SIGTERM and SIGHUP with 0; whatever happens, no server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from orchestrator.cli import INTERRUPTED, client, config, logs, options
from orchestrator.cli.bars import download_bars
from orchestrator.cli.output import Failure, say, say_json, settings_line, state_line
from orchestrator.errors import InvalidRequest, OrchestratorError, Superseded
from orchestrator.machine.states import State
from orchestrator.runtime.orchestrator import AsyncOrchestrator
from orchestrator.settings.request import LoadRequest

if TYPE_CHECKING:
    import uvicorn

_OPEN_REQUESTS_S: Final = 2
_BACKLOG: Final = 1024
_BAR_EVERY_S: Final = 0.1
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Setup:
    """What both commands need: who serves, where, to whom."""

    orch: AsyncOrchestrator
    listener: socket.socket
    api_keys: tuple[str, ...]
    allowed_hosts: frozenset[str]
    as_json: bool

    @property
    def url(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@click.command()
@config.config_option()
@config.serving_options()
@options.json_option()
def serve(*, log_format: logs.Format, **given: Any) -> int:
    """Serve the API with nothing loaded."""
    logs.configure("info", log_format)
    with _setup(**given) as setup:
        return _run(_host(setup, None))


@click.command(cls=options.ModelCommand)
@options.model_options()
@options.start_options()
@config.config_option()
@config.serving_options()
@options.json_option()
def run(*, log_format: logs.Format, **given: Any) -> int:
    """Load a model and serve it, until Ctrl-C.

    Flags that are not listed here go to llama-server, e.g. --top-k 20 --seed 42.
    """
    logs.configure("warning", log_format)
    settings = {str(setting.name) for setting in config.settings_of(run).values()} - {"log_format"}
    ours = {name: given.pop(name) for name in (*settings, "as_json")}
    request = options.load_request(**given)
    with _setup(**ours) as setup:
        return _run(_host(setup, request))


def _run(host: Coroutine[Any, Any, int]) -> int:
    """As `asyncio.run`, on the fastest event loop there is here."""
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        return runner.run(host)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it knows no Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


@contextlib.contextmanager
def _setup(
    *,
    host: str,
    port: int,
    api_key_file: str | None,
    allowed_hosts: tuple[str, ...],
    as_json: bool,
    **for_orchestrator: Any,
) -> Iterator[Setup]:
    """Check everything that can be checked before anything is started.

    Raises:
        click.UsageError: an option is not usable.
        Failure: the address cannot be had.
    """
    keys = options.keys_in(api_key_file)
    if not keys and not options.is_loopback(host):
        raise click.UsageError(
            f"--host {host} can be reached from other machines: give --api-key-file too, or set "
            f"{options.API_KEY_VARIABLE}."
        )
    from orchestrator.http.guards.keys import shareable
    from orchestrator.http.guards.origins import checked_hosts

    try:
        hosts = checked_hosts((host, *allowed_hosts))
        given = {name: value for name, value in for_orchestrator.items() if value is not None}
        orch = AsyncOrchestrator(protect_server=shareable(keys), **given)
    except InvalidRequest as error:
        raise click.UsageError(error.message) from error
    with _listen(host, port, as_json) as listener:
        try:
            yield Setup(orch, listener, keys, hosts, as_json)
        except InvalidRequest as error:
            if error.field == "slot":  # its name is looked at when it is claimed
                raise click.UsageError(error.message) from error
            raise Failure(error.problem.as_dict(), as_json=as_json) from error
        except OrchestratorError as error:
            raise Failure(error.problem.as_dict(), as_json=as_json) from error


def _listener(host: str, port: int, family: socket.AddressFamily) -> socket.socket:
    """As `socket.create_server`, which does not name the protocol: asyncio then leaves Nagle's
    algorithm on, and an answer waits 40 ms for the acknowledgement of its head.
    """
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen(host: str, port: int, as_json: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return _listener(host, port, family)
    except (OSError, UnicodeError) as error:
        remedy = "give another --host or --port"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            remedy = "it is in use; --port 0 takes any free one"
        detail = f"{host}:{port} cannot be listened on: {remedy}"
        members = {"category": "address", "title": "No address to serve on", "detail": detail}
        raise Failure(members, as_json=as_json) from error


class _Stop:
    """The first signal that asked this process to end."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in _SIGNALS:
            loop.add_signal_handler(signum, self._ask, signum)

    def _ask(self, signum: int) -> None:
        if self.signum is None:
            self.signum = signum
            self._asked.set()

    async def asked(self) -> None:
        await self._asked.wait()

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.signum == signal.SIGINT else 0


async def _host(setup: Setup, request: LoadRequest | None) -> int:
    """Serve until a signal; with a request, load that first and end when it fails."""
    stop = _Stop()
    http = _http_server(setup)
    tasks: list[asyncio.Task[Any]] = []
    try:
        await setup.orch.start()
        tasks.append(asyncio.create_task(http.serve(sockets=[setup.listener])))
        if request is None:
            _announce(setup)
        else:
            await _load(setup, request, stop, tasks)
        await stop.asked()
        return stop.exit_code
    finally:
        await setup.orch.close()
        http.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)


def _http_server(setup: Setup) -> uvicorn.Server:
    import uvicorn

    from orchestrator.http import create_app

    class Server(uvicorn.Server):
        """Leaves the signals to us."""

        def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()

    return Server(
        uvicorn.Config(
            create_app(setup.orch, api_keys=setup.api_keys, allowed_hosts=setup.allowed_hosts),
            server_header=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_OPEN_REQUESTS_S,
        )
    )


async def _load(
    setup: Setup, request: LoadRequest, stop: _Stop, tasks: list[asyncio.Task[Any]]
) -> None:
    """Load, and say what happens until the orchestrator is closed.

    Raises:
        OrchestratorError: the load failed.
    """
    said_healthy = asyncio.Event()
    tasks.append(asyncio.create_task(_tell(setup, said_healthy)))
    loading = asyncio.create_task(setup.orch.load(request))
    tasks += [loading, stopped := asyncio.create_task(stop.asked())]
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        return
    try:
        outcome = loading.result()
    except Superseded:  # by somebody who asked over HTTP, whose load goes on
        say("superseded by a newer load; still serving", stderr=True)
        return
    if setup.as_json:
        say_json({"url": setup.url, "outcome": outcome.as_dict()}, one_line=True)
        return
    await said_healthy.wait()
    say()
    client.show_settings(outcome.as_dict())
    _announce(setup)


async def _tell(setup: Setup, said_healthy: asyncio.Event) -> None:
    """Print a line for every state, until the orchestrator is closed."""
    started = time.time()
    bar: asyncio.Task[None] | None = None
    async for event in setup.orch.events(after=0):
        if event.kind != "transition":
            continue
        state = State(event.data["dest"])
        if bar is not None:
            bar.cancel()
            await asyncio.gather(bar, return_exceptions=True)
            bar = None
        if state is State.DOWNLOADING and not setup.as_json and sys.stderr.isatty():
            bar = asyncio.create_task(_show_download(setup.orch))
        if not setup.as_json:
            say(*state_line((event.data["at"] - started) * 1000, state, event.data["pid"]))
        if event.data["trigger"] == "exited" and (exit_ := setup.orch.status().last_exit):
            say(f"  the server ended by itself, status {exit_.returncode}", stderr=True)
        if state is State.HEALTHY:
            said_healthy.set()


async def _show_download(orch: AsyncOrchestrator) -> None:
    """A bar while bytes arrive; for a model that is here already there is none."""
    while (total := orch.progress().bytes_total) is None:  # noqa: ASYNC110 (display only)
        await asyncio.sleep(_BAR_EVERY_S)
    with download_bars() as bars:
        loading = orch.status().loading
        task = bars.add_task(loading.model_path if loading else "", total=total, note="")
        while True:
            bars.update(task, completed=orch.progress().bytes_done or 0)
            await asyncio.sleep(_BAR_EVERY_S)


def _announce(setup: Setup) -> None:
    if setup.as_json:
        say_json({"url": setup.url}, one_line=True)
        return
    settings_line(
        "API", (setup.url, "bold"), ("  the panel; /docs lists the routes; Ctrl-C stops", "dim")
    )
