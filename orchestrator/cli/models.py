"""`models`: the models of a pool that is served, else what is on this machine; and catalogues."""

from __future__ import annotations

import time

import click

from orchestrator.cli import by_name, options
from orchestrator.cli.catalogues import check, init
from orchestrator.cli.imports import import_
from orchestrator.cli.output import Failure, byte_text, say, say_json
from orchestrator.cli.services import key_option, served_at
from orchestrator.errors import OrchestratorError
from orchestrator.models import on_disk
from orchestrator.models.on_disk import ModelOnDisk

_PLACES = {"cache": "in the Hub's cache", "folder": "in --models-dir"}


@click.group(
    invoke_without_command=True,
    commands=[init, check, import_],
    params=[
        click.Option(
            ["--models-dir", "models_dirs"],
            multiple=True,
            metavar="DIR",
            help="A folder; may be repeated.",
        ),
        click.Option(["--url"], metavar="URL", help="List the models of the pool at this URL."),
        key_option(),
        options.JSON,
    ],
)
@click.pass_context
def models(
    ctx: click.Context,
    /,
    *,
    models_dirs: tuple[str, ...],
    url: str | None,
    api_key_file: str | None,
    as_json: bool,
) -> None:
    """List the models of the pool that is served on this machine, with state and memory.

    Where none is, or with --models-dir: the models on disk with size and last use, in the Hub's
    cache and in folders. The commands below write and check the catalogue of a pool.
    """
    if ctx.invoked_subcommand is not None:
        return
    if models_dirs and url is not None:
        raise click.UsageError("--models-dir lists folders, --url a service: give one of them.")
    served = None if models_dirs else served_at(url or options.DEFAULT_URL, api_key_file)
    if served is None or (served.pool is None and url is None):
        _say_found(_on_disk(models_dirs), as_json=as_json)
        return
    answer = served.of_pool().as_dict()
    say_json(answer) if as_json else by_name.say_pool(answer)


def _on_disk(folders: tuple[str, ...]) -> list[ModelOnDisk]:
    try:
        return on_disk.found(folders)
    except OrchestratorError as error:
        raise Failure(error.problem.as_dict()) from error


def _say_found(found: list[ModelOnDisk], *, as_json: bool) -> None:
    if as_json:
        say_json({"models": [model.as_dict() for model in found]})
        return
    place = None
    for model in found:
        if model.where != place:
            place = model.where
            say((_PLACES[place], "dim"))
        used = time.strftime("%Y-%m-%d", time.localtime(model.last_used_at))
        say(f"  {byte_text(model.size_bytes):>10}  ", (f"{used}  ", "dim"), model.model_path)
    if not found:
        say(("no models: ", "dim"), "llama-orchestrator pull owner/name downloads one")
