"""What servers take of memory: their own figures, kept for the next start, or an estimate.

A server that fits unset arguments to the memory prints a figure for what they want, or two that
grow, where each of its slots has a context of its own. If that is too much, it prints one for the
least that it can do with, and perhaps others that it tries. A draft model has a figure beside each
but the smaller of the two. What the server takes in the end is printed only at its exit, so it is
computed from the context that it reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from orchestrator.base.private_file import read_file, write_json
from orchestrator.machine.context import Running
from orchestrator.machine.facts import ServerFacts
from orchestrator.models import estimate
from orchestrator.models.local import identity_of
from orchestrator.server.devices import Device, spread
from orchestrator.server.json_log import Figure
from orchestrator.settings.drafting import has_draft_model
from orchestrator.settings.flags import value_of
from orchestrator.settings.memory import HOST, Memory, total
from orchestrator.settings.reach import named_files
from orchestrator.settings.resources import resources_of
from orchestrator.settings.target import ServerBinary, Target

_MOST: Final = 1000  # command lines
_LEAST_CONTEXT: Final = 4096  # llama-server's default of --fit-ctx


class Room(NamedTuple):
    """What a server would need, and find; see `Plan`."""

    memory: Memory
    free: dict[str, int]
    fits: bool | None


class Needed(NamedTuple):
    """What a start would need.

    Attributes:
        least: With the smallest context that the server would choose; None if it may not choose.
        beside_mib: The part that is not the server's to fit.
        size_bytes: Of the files that it would read.
    """

    memory: Memory
    least: Memory | None
    beside_mib: int
    size_bytes: int


class Sizes:
    """What is known of the memory of servers on this machine.

    Args:
        cache: Folder for the exact figures.
        devices: Returns what a server could use, and what is free now.
    """

    def __init__(self, cache: Path, devices: Callable[[ServerBinary], Sequence[Device]]) -> None:
        self._file = cache / "memory.json"
        self._devices = devices
        self._kept: dict[str, dict[str, int]] | None = None
        self._turn = threading.Lock()

    def expected(self, target: Target, devices: Sequence[Device] | None = None) -> Memory:
        """Return what a server would take: its own figure of an earlier start, or an estimate."""
        if (known := self.known(target)) is not None:
            return known
        found = estimate.estimate(target, estimate.files_of(target))
        devices = self._devices(target.server) if devices is None else devices
        return Memory.of("estimate", spread(found, devices, target))

    def known(self, target: Target) -> Memory | None:
        """Return the server's own figure of an earlier start; None if there has been none."""
        kept = self._read().get(_key(target))
        return _exact(target, kept) if kept is not None else None

    def needed(self, target: Target) -> Needed:
        """Return what a start would need."""
        devices = self._devices(target.server)
        return self._needed(target, devices)

    def room(self, target: Target, running: Running | None = None) -> Room:
        """Return what a start would need and find, if `running` were stopped for it."""
        devices = self._devices(target.server)
        free = {device.name: device.free_mib for device in devices}
        if running is not None and running.memory is not None:
            held = _returned(running.target, running.memory)
            free = {device: mib + held.get(device, 0) for device, mib in free.items()}
        needed = self._needed(target, devices)
        is_known = all(device in free for device in needed.memory.devices)
        least = (needed.least or needed.memory).devices
        fits = _fits(needed.memory.devices, free) or _fits(least, free)
        return Room(needed.memory, free, fits if is_known else None)

    def _needed(self, target: Target, devices: Sequence[Device]) -> Needed:
        memory, smallest = self.expected(target, devices), _with_least_context(target)
        least = self.expected(smallest, devices) if smallest is not None else None
        if least is not None and least.mib >= memory.mib:
            least = None
        return Needed(memory, least, estimate.beside_mib(target), target.model.size_bytes)

    def printed(self, target: Target, figures: Sequence[Figure]) -> Memory | None:
        """Return what a server that is loading would take; None if it has not said it."""
        return _exact(target, _wanted(_rounds(target, figures))) if figures else None

    def taken(self, target: Target, figures: Sequence[Figure], server: ServerFacts) -> Memory:
        """Return what a server that has become ready has taken."""
        if not figures:
            return self.expected(target)
        rounds = _rounds(target, figures)
        wanted, last = _wanted(rounds), rounds[-1]
        self._keep(target, wanted)
        if _sum(last) == _sum(wanted):
            return _exact(target, wanted)
        fitted = _fitted(target, wanted, last, server.context_length)
        return _exact(target, fitted, fitted=True)

    def _read(self) -> dict[str, dict[str, int]]:
        if self._kept is None:
            self._kept = _figures_in(self._file)
        return self._kept

    def _keep(self, target: Target, figure: dict[str, int]) -> None:
        key = _key(target)
        with self._turn:
            if self._read().get(key) == figure:
                return
            kept = _figures_in(self._file)  # others write it too
            kept.pop(key, None)
            kept[key] = figure  # the last ones stay
            self._kept = dict(list(kept.items())[-_MOST:])
            write_json(self._file, self._kept)


def _exact(target: Target, figure: dict[str, int], *, fitted: bool = False) -> Memory:
    beside = {HOST: estimate.beside_mib(target)}
    return Memory.of("exact", figure, beside, server_mib=_sum(figure), fitted=fitted)


def _rounds(target: Target, figures: Sequence[Figure]) -> list[dict[str, int]]:
    """Return what the server has tried: each time the figure of its model, which is told by its
    weights, and that of its draft model, which may be the same file.
    """
    rounds: list[list[Figure]] = []
    asked, has_draft = resources_of(target), has_draft_model(target.extra_args)
    drafts_after = 2 if asked.caches > 1 and not asked.context else 1
    for figure in figures:
        is_other = bool(rounds) and figure.model_mib != rounds[0][0].model_mib
        is_second = len(rounds) >= drafts_after and len(rounds[-1]) == 1
        if is_other or (has_draft and is_second):
            rounds[-1].append(figure)
        else:
            rounds.append([figure])
    return [total(*(figure.devices for figure in one)) for one in rounds]


def _sum(figure: Mapping[str, int]) -> int:
    return sum(figure.values())


def _wanted(rounds: list[dict[str, int]]) -> dict[str, int]:
    return max(rounds, key=_sum)


def _fitted(
    target: Target, most: dict[str, int], least: dict[str, int], context: int | None
) -> dict[str, int]:
    """Return what is between all and the least, as the context is; memory grows evenly with it."""
    shape = estimate.files_of(target).model.shape
    if shape is None or context is None:
        return most
    fit_context = value_of(target.extra_args, "-fitc", "--fit-ctx") or ""
    smallest = int(fit_context) if fit_context.isdecimal() else _LEAST_CONTEXT
    largest = shape.context_length
    if context >= largest or smallest >= largest:
        return least  # layers were moved instead
    part = max(0.0, (context - smallest) / (largest - smallest))
    names = total(most, least)
    return {n: round(least.get(n, 0) + part * (most.get(n, 0) - least.get(n, 0))) for n in names}


def _returned(target: Target, memory: Memory) -> dict[str, int]:
    """Return what the end of a server surely gives back: mapped weights are in the page cache,
    which makes room anyway, and a cache of prompts may be empty.
    """
    unsure = (target.model.size_bytes >> 20) + estimate.beside_mib(target)
    return {d: max(0, mib - unsure) if d == HOST else mib for d, mib in memory.devices.items()}


def _fits(need: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(mib <= free.get(device, 0) for device, mib in need.items())


def _with_least_context(target: Target) -> Target | None:
    """Return the target whose server has fitted itself to very little; None = it would not."""
    request = target.request
    if request.max_seq_length or value_of(target.extra_args, "-c", "--ctx-size"):
        return None
    return replace(target, request=replace(request, max_seq_length=_LEAST_CONTEXT))


def _key(target: Target) -> str:
    """Return what stands for the files, the command line and the binary."""
    named = []
    for _, path in named_files(target.extra_args):
        with contextlib.suppress(OSError, ValueError):
            named.append(identity_of(path))
    whole = (sorted(target.identity().items()), target.files, named)
    return hashlib.sha256(repr(whole).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _figures_in(file: Path) -> dict[str, dict[str, int]]:
    try:
        kept: Any = json.loads(read_file(file))
        return {
            str(key): {str(device): int(mib) for device, mib in figure.items()}
            for key, figure in kept.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
