"""`pull`: download a model from the Hub into the cache, with a progress bar for every file.

It needs no orchestrator and claims no slot; every later load finds the files.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import click

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.cli import INTERRUPTED, options
from orchestrator.cli.output import download_bars, say, say_json, say_note
from orchestrator.errors import OrchestratorError
from orchestrator.models.hub.download import RequestedModel
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.models.hub.records import Records
from orchestrator.runtime.answers import prefetch_outcome
from orchestrator.server.state_dir import cache_dir
from orchestrator.settings.reference import split_reference

_JSON_EVERY_S = 0.5


@click.command(
    params=[
        click.Argument(["model"], shell_complete=options.complete_model),
        options.setting("gguf_variant"),
        *options.HUB,
        options.JSON,
    ]
)
@click.option("--state-dir", metavar="DIR", help="Folder for records of verified files.")
def pull(*, model: str, state_dir: str | None, as_json: bool, **fields: Any) -> int:
    """Download MODEL (owner/name or owner/name:VARIANT); Ctrl-C keeps partial files."""
    request = options.load_request(model, **fields)
    if split_reference(request.model_path) is None or os.path.exists(request.model_path):
        raise click.UsageError(f"{model} is not a Hub repo: give owner/name.")
    progress = FetchProgress()
    try:
        with _json_lines(progress) if as_json else _bars(progress):
            wanted = RequestedModel(request, Records(cache_dir(state_dir) / "hub"))
            files = wanted.fetch(CancelToken(Generation(0)), progress)
    except KeyboardInterrupt:
        say("stopped: partial files are kept, and the next pull resumes them", stderr=True)
        return INTERRUPTED
    except OrchestratorError as error:
        if not as_json:
            raise
        say_json(error.problem.as_dict(), one_line=True)  # a line like all others
        return 1
    outcome = prefetch_outcome(request, files)
    if as_json:
        say_json(outcome.as_dict(), one_line=True)
        return 0
    say(("✓ ", "bold green"), (outcome.model_path, "bold"), f"  {outcome.gguf_variant}")
    for path in outcome.files:
        say(f"  {path}")
    say_note({"note": outcome.note})
    return 0


@contextlib.contextmanager
def _bars(progress: FetchProgress) -> Iterator[None]:
    bars = download_bars()
    tasks: dict[str, Any] = {}

    def show() -> None:
        for name, (done, size) in progress.files.items():
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=size, completed=done, note="")
            bars.update(tasks[name], completed=done, note=progress.note or "")

    progress.on_change = show
    with bars:
        yield
        show()


@contextlib.contextmanager
def _json_lines(progress: FetchProgress) -> Iterator[None]:
    """Print the progress as a JSON line, at most twice a second, and once more at the end."""
    due_at = 0.0

    def report() -> None:
        files = {n: {"done": done, "size": size} for n, (done, size) in progress.files.items()}
        totals = {"bytes_done": progress.bytes_done, "bytes_total": progress.bytes_total}
        say_json({**totals, "files": files, "note": progress.note}, one_line=True)

    def show() -> None:
        nonlocal due_at
        if time.monotonic() >= due_at:
            due_at = time.monotonic() + _JSON_EVERY_S
            report()

    progress.on_change = show
    yield
    report()
