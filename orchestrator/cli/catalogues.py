"""`models init` and `models check`: the catalogue of a pool before it is served.

Both find out what each model needs on this machine, and start no server for that.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from orchestrator.cli import config, logs, options
from orchestrator.cli.drafts import Draft, exists, toml_text, unique_name, write_draft
from orchestrator.cli.output import Failure, byte_text, mib_text, say, say_json, say_problem
from orchestrator.errors import (
    HubRateLimited,
    HubUnreachable,
    InvalidCatalogue,
    OrchestratorError,
    Problem,
)
from orchestrator.models import on_disk
from orchestrator.models.on_disk import ModelOnDisk
from orchestrator.pool.budget import budget_of, on_devices
from orchestrator.pool.catalogue import Catalogue, catalogue_of, check_pins, read_catalogue
from orchestrator.pool.entries import Entry
from orchestrator.pool.keys import grants_of
from orchestrator.pool.ledger import Amounts
from orchestrator.runtime.orchestrator import Orchestrator
from orchestrator.server.devices import Device
from orchestrator.settings.memory import Memory

DEFAULT_FILE: Final = "models.toml"
_OF_MACHINE: Final = (
    config.config_option(),
    *(one for one in config.SERVING if one.name in {"llama_server", "state_dir", "models_dir"}),
)
_ELSEWHERE: Final = "served elsewhere"
_UNKNOWN: Final = "not known"


@click.command(
    params=[
        click.Argument(["file"], default=DEFAULT_FILE, type=click.Path(path_type=Path)),
        click.Option(["--force"], is_flag=True, help="Overwrite the file."),
        *(*_OF_MACHINE, options.JSON),
    ]
)
def init(*, file: Path, force: bool, as_json: bool, **of_machine: Any) -> int:
    """Write a first catalogue: the models in the Hub's cache and in --models-dir.

    The default of FILE is models.toml. Each model has a comment with the memory that it needs.
    """
    logs.configure("warning")
    if file.exists() and not force:
        raise exists(file)
    orch = _orchestrator(**of_machine)
    found = on_disk.found(of_machine["models_dir"])
    drafts = drafts_of(found)
    if not drafts:
        title, where = "No models", "in the Hub's cache and in --models-dir"
        detail = f"there are no models {where}: llama-orchestrator pull owner/name downloads one"
        raise Failure({"category": "no_models", "title": title, "detail": detail})
    catalogue = catalogue_of({"models": {one.name: one.members for one in drafts}})
    shown = []
    for draft, model in zip(drafts, found, strict=True):
        memory, why = _need(orch, catalogue.models[draft.name])
        need = why if memory is None else f"{mib_text(memory.mib)} ({memory.source})"
        draft.comments.append(f"{byte_text(model.size_bytes)} on disk; memory: {need}")
        of_memory = memory and memory.as_dict()
        shown.append({"name": draft.name, **draft.members, "memory": of_memory})
    text = toml_text(drafts)
    catalogue_of(tomllib.loads(text))  # what is written can be read
    write_draft(file, text, is_forced=force)
    if as_json:
        say_json({"file": str(file), "models": shown})
        return 0
    for draft in drafts:
        say(f"  {draft.name:<24}  ", (draft.comments[0], "dim"))
    say(("✓ ", "green"), f"{file}  ", (f"llama-orchestrator serve --models {file}", "dim"))
    return 0


def drafts_of(found: Iterable[ModelOnDisk]) -> list[Draft]:
    """Return an entry for each model, named after its repo or its file."""
    found = list(found)
    repos = [one.model_path.partition(":")[0] for one in found if one.where == "cache"]
    drafts: dict[str, Draft] = {}
    for one in found:
        path = one.model_path
        if one.where == "cache":
            repo, _, variant = path.partition(":")
            wanted = repo.partition("/")[2].removesuffix("-GGUF").removesuffix("-gguf")
            if repos.count(repo) > 1:
                wanted = f"{wanted}-{variant.removesuffix('.gguf')}"
        else:
            path = str(Path(path).absolute())
            wanted = Path(path).stem.partition("-00001-of-")[0]
        name = unique_name(wanted, drafts)
        drafts[name] = Draft(name, {"model_path": path})
    return list(drafts.values())


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of one entry; `memory` is None where it is not known."""

    entry: Entry
    verdict: str
    memory: Memory | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        memory = self.memory and self.memory.as_dict()
        return {
            "name": self.entry.name,
            "verdict": self.verdict,
            "memory": memory,
            "note": self.note,
        }


@click.command(
    params=[
        click.Argument(["file"], type=click.Path(path_type=Path)),
        *(*_OF_MACHINE, options.JSON),
    ]
)
def check(*, file: Path, as_json: bool, **of_machine: Any) -> int:
    """Check a catalogue: its mistakes, and what never fits on this machine."""
    logs.configure("warning")
    problems: list[Problem] = []
    checked: list[Checked] = []
    budget: dict[str, int] = {}
    try:
        catalogue = read_catalogue(file)
        grants_of(catalogue)
    except InvalidCatalogue as error:
        problems.append(error.problem)
    else:
        orch = _orchestrator(**of_machine)
        devices = orch.devices()
        budget = budget_of(catalogue.pool.memory, catalogue.pool.headroom, devices)
        checked = [
            _checked(entry, catalogue, orch, devices, budget, problems)
            for entry in catalogue.models.values()
        ]
        needs = {one.entry.name: one.memory.devices for one in checked if one.memory}
        try:
            check_pins(catalogue, budget, needs)
        except InvalidCatalogue as error:
            problems.append(error.problem)
    if as_json:
        say_json(
            {
                "file": str(file),
                "budget": budget,
                "models": [one.as_dict() for one in checked],
                "problems": [problem.as_dict() for problem in problems],
            }
        )
    else:
        _say_checked(file, budget, checked, problems)
    return 1 if problems else 0


def _checked(
    entry: Entry,
    catalogue: Catalogue,
    orch: Orchestrator,
    devices: Sequence[Device],
    budget: Mapping[str, int],
    problems: list[Problem],
) -> Checked:
    """Return what one entry needs; what is wrong with it becomes a problem at its place."""
    if entry.request is None:
        return Checked(entry, _ELSEWHERE)
    table = ("models", entry.name)
    try:
        needed = orch.need_of(entry.request)
        memory = needed.memory
        if entry.memory is not None:
            memory = Memory.of("declared", on_devices(entry.memory, devices))
        if _fits(memory, budget):
            return Checked(entry, "fits", memory)
        least = memory if entry.memory is not None else needed.least or memory
    except (HubUnreachable, HubRateLimited) as error:
        return Checked(entry, _UNKNOWN, note=error.message)
    except OrchestratorError as error:
        problems.append(catalogue.places.error(error.message, table, error.field).problem)
        return Checked(entry, "cannot be loaded")
    if _fits(least, budget):
        return Checked(entry, "fits with a smaller context", memory)
    need, room = Amounts.of(least.devices), Amounts.of(budget)
    lacking = [device for device, _ in need.beyond(room).by_account]
    whole = " and ".join(f"{budget.get(device, 0)} MiB of {device}" for device in lacking)
    message = f"it needs {need}, and the budget is {whole}: choose a smaller model or context"
    placed = catalogue.places.error(message, table)
    problems.append(Problem("too_large", placed.message, placed.field))
    return Checked(entry, "never fits", memory)


def _fits(memory: Memory, budget: Mapping[str, int]) -> bool:
    return Amounts.of(memory.devices).fits(Amounts.of(budget))


def _say_checked(
    file: Path, budget: Mapping[str, int], checked: list[Checked], problems: list[Problem]
) -> None:
    if budget:
        parts = ", ".join(f"{device} {mib_text(mib)}" for device, mib in budget.items())
        say(("budget  ", "bold"), parts)
    for one in checked:
        need = "" if one.memory is None else f"{mib_text(one.memory.mib)} ({one.memory.source})"
        verdict = f"{one.verdict}: {one.note}" if one.note else one.verdict
        say(f"  {one.entry.name:<24}  {need:<24}  ", (verdict, "dim"))
    for problem in problems:
        say_problem(problem.as_dict())
    if not problems:
        say(("✓ ", "green"), f"{file} can be served")


def _orchestrator(
    llama_server: str, state_dir: str | None, models_dir: tuple[str, ...]
) -> Orchestrator:
    """Return one that is asked about models, and never started."""
    return Orchestrator(llama_server=llama_server, state_dir=state_dir, models_dir=models_dir)


def _need(orch: Orchestrator, entry: Entry) -> tuple[Memory | None, str]:
    """Return what an entry needs of memory, or why that is not known."""
    assert entry.request is not None  # noqa: S101 (it has a model_path)
    try:
        return orch.need_of(entry.request).memory, ""
    except OrchestratorError as error:
        return None, f"{_UNKNOWN}: {error.message}"
