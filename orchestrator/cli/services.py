"""The service that a command talks to: one slot, or a pool of models by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from orchestrator.cli import options
from orchestrator.cli.output import Failure
from orchestrator.errors import InvalidRequest, ModelNotFound, OrchestratorError, Unreachable
from orchestrator.pool.pool import ModelPool
from orchestrator.pool.remote import RemoteModelPool, RemoteModelView
from orchestrator.pool.status import PoolStatus
from orchestrator.runtime.asks import Ask
from orchestrator.runtime.connection import Connection
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.runtime.remote import RemoteOrchestrator
from orchestrator.runtime.service import Service

_COMPLETION_S: Final = 0.5


def key_option() -> click.Option:
    return click.Option(
        ["--api-key-file"],  # every user can read a command line, so the key is never in it
        type=click.Path(),
        envvar=f"{options.API_KEY_VARIABLE}_FILE",
        metavar="F",
        help=f"File with the API key; default: ${options.API_KEY_VARIABLE}, if set.",
    )


_OPTIONS: Final = (
    click.Option(["--url"], default=options.DEFAULT_URL, show_default=True, help="Service URL."),
    key_option(),
    options.JSON,
)


@dataclass(frozen=True, slots=True)
class Served:
    """What answers at a URL.

    Attributes:
        orch: Its one slot; of a pool that of the default model.
        pool: The pool, if it is one.
        status: Of the pool when the command began, or why there is none.
    """

    orch: RemoteOrchestrator
    pool: RemoteModelPool | None
    status: PoolStatus | OrchestratorError

    @property
    def url(self) -> str:
        return self.orch.url

    def slot(self, name: str | None) -> RemoteOrchestrator | RemoteModelView:
        """Return the slot of a model of a pool, or the one that there is.

        Raises:
            ModelNotFound: the pool has no such model.
            UsageError: a name is given, and there is no pool.
        """
        if name is None:
            return self.orch
        if self.pool is None:
            raise click.UsageError("this service has one slot and no names: leave NAME out.")
        return self.pool[name]

    def nearest(self, name: str) -> str | None:
        """Return the name that is most like one that there is not."""
        names = names_of(self.status) if isinstance(self.status, PoolStatus) else ()
        return next(iter(get_close_matches(name, names, n=1)), None)

    def of_pool(self) -> PoolStatus:
        """Return the status of the pool.

        Raises:
            Failure: there is no pool.
        """
        if isinstance(self.status, PoolStatus):
            return self.status
        if isinstance(self.status, ModelNotFound | Unreachable):
            raise Failure(self.status.problem.as_dict())
        detail = f"{self.url} serves one slot, no pool: llama-orchestrator status shows it"
        raise Failure({"category": "no_pool", "title": "No pool", "detail": detail})


def names_of(status: PoolStatus) -> list[str]:
    """Return every name that a request may use, in the order of the catalogue."""
    names: list[str] = []
    for model in status.models:
        names += (model.name, *model.aliases)
        names += (f"{model.name}:{preset}" for preset in model.presets)
    return names


def remote_command(
    *params: click.Parameter, cls: type[click.Command] = click.Command
) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a command of these parameters; the function gets `served` and `as_json` too."""

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def call(*, url: str, api_key_file: str | None, **given: Any) -> int | None:
            served = served_at(url, api_key_file)
            try:
                return function(served=served, **given)
            except ModelNotFound as error:
                near = served.nearest(given.get("model") or given.get("model_option") or "")
                hint = f". Did you mean {near}?" if near else ""
                problem = error.problem.as_dict()
                raise Failure({**problem, "detail": problem["detail"] + hint}) from error
            except OrchestratorError as error:
                raise Failure(error.problem.as_dict()) from error

        return click.command(cls=cls, params=[*params, *_OPTIONS])(call)

    return decorate


def served_at(url: str, api_key_file: str | None) -> Served:
    """Find out what answers at a URL. What is no pool, or nothing, is taken for one slot, whose
    first request then reports it.
    """
    key = next(iter(options.keys_in(api_key_file)), None)
    try:
        orch, pool = Orchestrator.connect(url, key), ModelPool.connect(url, key)
    except InvalidRequest as error:
        raise click.UsageError(f"--url: {error.message}.") from error
    try:
        return Served(orch, pool, pool.status())
    except OrchestratorError as error:
        return Served(orch, None, error)


def complete_name(ctx: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a model of the pool that answers, if one does."""
    return [CompletionItem(name) for name in _names(ctx) if name.startswith(begun)]


def complete_model(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a name of the pool that answers; without a pool a repo of the cache, or a file."""
    return complete_name(ctx, param, begun) or options.complete_model(ctx, param, begun)


def _names(ctx: click.Context) -> list[str]:
    key = next(iter(options.keys_in(ctx.params.get("api_key_file"))), None)
    url = ctx.params.get("url") or options.DEFAULT_URL
    ask = Ask("GET", "/api/models", PoolStatus.from_dict, timeout_s=_COMPLETION_S)
    try:
        return names_of(Connection(Service(url, key), "").now(ask))
    except (OrchestratorError, click.ClickException):
        return []


NAME: Final = click.Argument(
    ["model"], required=False, metavar="[NAME]", shell_complete=complete_name
)
MODEL: Final = options.model_options(complete_model)
MODEL_ARGUMENT: Final = MODEL[0]
