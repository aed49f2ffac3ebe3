"""`pull`: a model from the Hub into the cache, with a bar for every file.

No orchestrator is needed and no slot is claimed: what is fetched is found by every load later.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import click

from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.cli import INTERRUPTED, options
from orchestrator.cli.bars import download_bars
from orchestrator.cli.output import Failure, say, say_json
from orchestrator.errors import OrchestratorError
from orchestrator.models.hub.download import Hub, is_hub
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.runtime.answers import PrefetchOutcome, prefetch_outcome
from orchestrator.server.slot import cache_dir

_TELL_EVERY_S = 0.5


@click.command()
@click.argument("model")
@click.option("--gguf-variant", metavar="V", help="Quant label, e.g. Q4_K_M.")
@options.hub_options()
@click.option("--state-dir", metavar="DIR", help="Folder of the slots, and of what was verified.")
@options.json_option()
def pull(*, model: str, state_dir: str | None, as_json: bool, **fields: Any) -> int:
    """Download MODEL (owner/name or owner/name:VARIANT); Ctrl-C keeps what is there."""
    request = options.load_request(model, None, **fields)
    if not is_hub(request.model_path) or os.path.exists(request.model_path):
        raise click.UsageError(f"{model} is no repo on the Hub: give owner/name.")
    hub = Hub(cache_dir(state_dir) / "hub")
    progress, token = FetchProgress(), CancelToken(Generation(0))
    shown = _lines(progress) if as_json else _bars(progress)
    try:
        with shown:
            files = hub.fetch(request, token, progress)
    except KeyboardInterrupt:
        say("stopped; what is there is kept, and the next pull goes on from it", stderr=True)
        return INTERRUPTED
    except OrchestratorError as error:
        if as_json:  # a line like all others
            say_json(error.problem.as_dict(), one_line=True)
            return 1
        raise Failure(error.problem.as_dict()) from error
    _show(prefetch_outcome(request, files), as_json=as_json)
    return 0


def _show(outcome: PrefetchOutcome, *, as_json: bool) -> None:
    if as_json:
        say_json(outcome.as_dict(), one_line=True)
        return
    say(("✓ ", "bold green"), (outcome.model_path, "bold"), f"  {outcome.gguf_variant}")
    for path in outcome.files:
        say(f"  {path}")
    if outcome.note:
        say(("  note  ", "yellow"), outcome.note)


@contextlib.contextmanager
def _bars(progress: FetchProgress) -> Iterator[None]:
    """A bar for every file, with its rate and the time that is left."""
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
def _lines(progress: FetchProgress) -> Iterator[None]:
    """A JSON line now and then, for programs."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_TELL_EVERY_S):
            say_json(_members(progress), one_line=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    say_json(_members(progress), one_line=True)


def _members(progress: FetchProgress) -> dict[str, Any]:
    files = {name: {"done": done, "size": size} for name, (done, size) in progress.files.items()}
    return {
        "bytes_done": progress.bytes_done,
        "bytes_total": progress.bytes_total,
        "files": files,
        "note": progress.note,
    }
