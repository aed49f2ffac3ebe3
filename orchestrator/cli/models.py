"""`models`: what is on this machine and needs no download, and the catalogue of a pool."""

from __future__ import annotations

import time

import click

from orchestrator.cli import options
from orchestrator.cli.catalogues import check, init
from orchestrator.cli.imports import import_
from orchestrator.cli.output import Failure, byte_text, say, say_json
from orchestrator.errors import OrchestratorError
from orchestrator.models import on_disk

_PLACES = {"cache": "in the Hub's cache", "folder": "in --models-dir"}


@click.group(invoke_without_command=True, params=[options.JSON], commands=[init, check, import_])
@click.option(
    "--models-dir", "models_dirs", multiple=True, metavar="DIR", help="A folder; may be repeated."
)
@click.pass_context
def models(ctx: click.Context, /, *, models_dirs: tuple[str, ...], as_json: bool) -> None:
    """List the models on disk with size and last use: in the Hub's cache and in folders.

    The commands below write and check the catalogue of a pool.
    """
    if ctx.invoked_subcommand is not None:
        return
    try:
        found = on_disk.found(models_dirs)
    except OrchestratorError as error:
        raise Failure(error.problem.as_dict()) from error
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
