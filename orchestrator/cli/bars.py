"""Bars of a download, the same in `pull` and `run`: bytes, rate, and the time that is left."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from orchestrator.cli.output import console


def download_bars() -> Progress:
    """Return an empty set of bars on stderr; a task has a field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="yellow"),
        console=console(stderr=True),
    )
