"""What became of the last loads, for whoever asks later.

A dictionary of what the machine has concluded. The owner fills it in each step before the snapshot
shows the step, so a load is in flight in the snapshot or has an outcome here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import Concluded, Loaded, Timings
from orchestrator.settings.target import Target

_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """A load that has ended.

    Attributes:
        accepted_at: Unix seconds.
        timings: Seconds in each phase; `total` counts up to the answer.
    """

    generation: Generation
    target: Target
    accepted_at: float
    timings: Timings
    answer: Loaded | Problem


class History:
    """The last loads by generation, in the order in which they ended. Owner's thread writes."""

    def __init__(self) -> None:
        self.records: dict[Generation, LoadRecord] = {}
        self.newest: LoadRecord | None = None

    def add(self, ended: Concluded, *, now: float, story: tuple[str, ...]) -> None:
        """Keep what became of a load, and forget the oldest.

        Args:
            now: Monotonic seconds.
            story: The last transitions; what went wrong carries them.
        """
        total_s, answer, timings = now - ended.accepted_at, ended.answer, ended.timings
        if isinstance(answer, Problem):
            answer = replace(answer, story=story)
        if isinstance(answer, Loaded) and answer.generation == ended.generation:
            timings = answer.timings  # as its callers were told
        else:
            timings = replace(timings, total=total_s)
        record = LoadRecord(ended.generation, ended.target, time.time() - total_s, timings, answer)
        self.records[ended.generation] = record
        while len(self.records) > _KEPT:
            del self.records[next(iter(self.records))]
        self.newest = record  # last: who sees it sees the rest
