"""`models import`: the configuration of another program as the catalogue of a pool."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

import click

from orchestrator.cli import options
from orchestrator.cli.catalogues import DEFAULT_FILE
from orchestrator.cli.drafts import exists, toml_text, write_draft
from orchestrator.cli.llama_swap import Converted, convert
from orchestrator.cli.output import Failure, say, say_json
from orchestrator.cli.yaml_file import read_yaml
from orchestrator.errors import InvalidCatalogue
from orchestrator.pool.catalogue import catalogue_of
from orchestrator.pool.places import Places, dotted
from orchestrator.settings.flags import is_encodable


@click.group("import")
def import_() -> None:
    """Write a catalogue from the configuration of another program."""


@import_.command(
    "llama-swap",
    params=[
        click.Argument(["config"], type=click.Path(path_type=Path)),
        click.Argument(["file"], default=DEFAULT_FILE, type=click.Path(path_type=Path)),
        click.Option(["--force"], is_flag=True, help="Overwrite the file."),
        options.JSON,
    ],
)
def llama_swap(*, config: Path, file: Path, force: bool, as_json: bool) -> int:
    """Write a catalogue from llama-swap's CONFIG, and say what has no counterpart in it.

    The default of FILE is models.toml. Commands become the fields of their models; macros are
    replaced, also those of the environment. Needs the extra `yaml`.
    """
    if file.exists() and not force:
        raise exists(file)
    tables, lines = read_yaml(config)
    if not isinstance(tables, Mapping) or not isinstance(tables.get("models", {}), Mapping):
        raise _unusable(f"{config} has no table of models: give the configuration of llama-swap")
    is_beside = config.absolute().parent == file.absolute().parent
    made = convert(tables, os.environ, None if is_beside else config.absolute().parent)
    places = Places(str(config), lines)
    text = _text(made, places)
    if not is_encodable(text):
        raise _unusable(f"{config} has text that is not Unicode: look for \\ud800 and its like")
    try:
        catalogue_of(tomllib.loads(text), file.absolute().parent)
    except InvalidCatalogue as error:
        detail = f"{error.message}: change {config}, and import it again"
        raise Failure({**error.problem.as_dict(), "detail": detail}) from error
    write_draft(file, text, is_forced=force)
    _say(file, made, places, as_json=as_json)
    return 0


def _unusable(detail: str) -> Failure:
    title = "File cannot be used"
    return Failure({"category": "unusable_file", "title": title, "detail": detail})


def _text(made: Converted, places: Places) -> str:
    """Return the catalogue, with each remark at its entry or at the top."""
    remarks = [f"Converted from {places.file}."]
    for path, why in made.remarks:
        line = f"{dotted(path)}: {why}"
        draft = made.drafts.get(made.names.get(path[1], "")) if path[0] == "models" else None
        (remarks if draft is None else draft.comments).append(line)
    remarks += [f"serve --llama-server {one} starts the same server" for one in made.programs]
    return toml_text(made.drafts.values(), remarks, made.pool)


def _say(file: Path, made: Converted, places: Places, *, as_json: bool) -> None:
    left_out = [
        {"place": dotted(path), "line": places.line(path), "why": why} for path, why in made.remarks
    ]
    if as_json:
        models = [{"name": one.name, **one.members} for one in made.drafts.values()]
        found = {"pool": made.pool, "models": models, "llama_server": made.programs}
        say_json({"file": str(file), **found, "not_carried_over": left_out})
        return
    for one in left_out:
        line = "" if one["line"] is None else f":{one['line']}"
        say((f"{places.file}{line}: ", "dim"), f"{one['place']}: ", (str(one["why"]), "dim"))
    count = f"{len(made.drafts)} models" if len(made.drafts) != 1 else "1 model"
    say(("✓ ", "green"), f"{file}: {count}  ", (f"llama-orchestrator models check {file}", "dim"))
