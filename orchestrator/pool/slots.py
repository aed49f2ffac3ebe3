"""The slots of a pool: one for each entry that has had a server, made when it is first needed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from typing import Final, Generic, TypeVar

from orchestrator.base.threads import NoThread
from orchestrator.base.tokens import Generation
from orchestrator.base.workers import Workers
from orchestrator.errors import OrchestratorError, problem_of
from orchestrator.pool import commands, facts
from orchestrator.pool.budget import on_devices
from orchestrator.pool.context import Definition, Need
from orchestrator.pool.entries import Entry
from orchestrator.pool.feed import Feed
from orchestrator.pool.ledger import Amounts
from orchestrator.pool.slot import PoolSlot
from orchestrator.runtime.calls import Facade
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.ports import Clock
from orchestrator.server.devices import Device
from orchestrator.server.slot import LONGEST_NAME, Slot
from orchestrator.settings.flags import value_of
from orchestrator.settings.memory import HOST
from orchestrator.settings.request import LoadRequest

_REST_S: Final = 30.0
_FIRST: Final = Generation(1)  # of a server that was found
F = TypeVar("F", bound=Facade)


class PoolSlots(Generic[F]):
    """Carries out what the pool's machine decides about servers.

    Args:
        make: Makes the orchestrator of an entry.

    Attributes:
        entries: Of the catalogue as it is now.
        devices: Of this machine, once they are known.
        restarts: Whether a server that ends by itself comes back.
        keeps: Whether a shutdown leaves Healthy servers to the next owner.
    """

    def __init__(
        self,
        make: Callable[[str], F],
        post: Callable[[facts.Fact], None],
        workers: Workers,
        clock: Clock,
    ) -> None:
        self.entries: Mapping[str, Entry] = {}
        self.devices: Sequence[Device] = ()
        self.restarts: bool = False
        self.keeps: bool = False
        self._make = make
        self._post = post
        self._workers = workers
        self._clock = clock
        self._guard = threading.Lock()  # of the two below
        self._facades: dict[str, F] = {}
        self._beside: dict[str, int] = {}  # MiB of the host that the server does not fit
        self._slots: dict[str, PoolSlot] = {}

    # --------------------------------------------------------------------------- from any thread

    def facade(self, name: str) -> F:
        """Return the orchestrator of an entry."""
        with self._guard:
            if (facade := self._facades.get(name)) is None:
                facade = self._facades[name] = self._make(name)
            return facade

    @property
    def facades(self) -> tuple[F, ...]:
        """The orchestrators that have been made so far."""
        return tuple(self._facades.values())

    def generation(self, name: str) -> Generation:
        """Return the last load in a model's slot."""
        facade = self._facades.get(name)
        return facade.generation if facade is not None else Generation(0)

    def slot(self, name: str) -> PoolSlot:
        facade = self.facade(name)
        with self._guard:
            if (slot := self._slots.get(name)) is None:
                slot = PoolSlot(name, facade, self._post, self._workers, self._clock)
                self._slots[name] = slot
            return slot

    def definition(self, entry: Entry) -> Definition | None:
        """Return what the pool's machine decides by; None for a server that is not ours."""
        request = entry.request
        if request is None:
            return None
        need = None
        if entry.memory is not None:
            need = Need(Amounts.of(on_devices(entry.memory, self.devices)), "declared")
        return Definition(
            need,
            size_bytes=_size_of(request.model_path),
            request=request,
            weight=entry.weight,
            is_pinned=entry.pinned,
            group=entry.group,
            idle_ttl_s=request.idle_ttl_s or None,
            restarts=self.restarts,
        )

    def known_needs(self, entries: Iterable[Entry]) -> dict[str, Mapping[str, int]]:
        """Return the MiB by device of the pinned ones, where declared or exact. Blocks."""
        known: dict[str, Mapping[str, int]] = {}
        for entry in entries:
            if entry.request is None or not entry.pinned:
                continue
            if entry.memory is not None:
                known[entry.name] = on_devices(entry.memory, self.devices)
                continue
            with contextlib.suppress(OrchestratorError):  # its first load will say so
                if (memory := self.facade(entry.name).known_need(entry.request)) is not None:
                    known[entry.name] = memory.devices
        return known

    def need_of(self, name: str, request: LoadRequest) -> tuple[Need, int]:
        """Return what a start would take, at least if its context is Auto, and the bytes of its
        files. Blocks.
        """
        needed = self.facade(name).need_of(request)
        self._beside[name] = needed.beside_mib
        least = Amounts.of(needed.least.devices) if needed.least is not None else None
        memory = needed.memory
        return Need(Amounts.of(memory.devices), memory.source, least), needed.size_bytes

    def adopt(self, name: str, ended: Callable[[bool], None]) -> None:
        self.slot(name).adopt(_FIRST, ended)

    def end(self, name: str, ended: Callable[[bool], None]) -> None:
        """End what was found in the slot of no entry."""
        self.slot(name).close(keep=False, ended=ended)

    def rest(self) -> None:
        """Block until every slot has come to rest, but not for ever."""
        futures.wait([slot.done() for slot in tuple(self._slots.values())], _REST_S)

    # ----------------------------------------------------------------------- on the owner's thread

    def gate(self, name: str) -> Gate | None:
        slot = self._slots.get(name)
        return slot.gate if slot is not None else None

    def start(self, command: commands.Start) -> None:
        if command.request is None:
            raise LookupError("this definition does not say what to load")
        request = replace(command.request, idle_ttl_s=None)
        if command.is_fitted:
            request = self._fitted(request, command)
        self.slot(command.name).start(command.generation, request)

    def stop(self, command: commands.Stop) -> None:
        slot, name, generation = self.slot(command.name), command.name, command.generation
        if command.reason == "shutdown":

            def ended(is_empty: bool) -> None:
                report = facts.Emptied if is_empty else facts.BecameStuck
                self._post(report(name, generation, self._clock()))

            slot.close(keep=self.keeps, ended=ended)
        else:
            slot.stop(generation, cut=command.cut)

    def measure(self, command: commands.Measure) -> None:
        """Find out what a start needs, and how much of that are files."""
        name, edition, entry = command.name, command.edition, self.entries.get(command.name)

        def failed(error: BaseException) -> None:
            self._post(facts.MeasureFailed(name, edition, problem_of(error), self._clock()))

        def run() -> None:
            try:
                need, size_bytes = self.need_of(name, _request(entry))
            except BaseException as error:  # noqa: BLE001 (who wants it waits for an answer)
                failed(error)
                return
            self._post(facts.Measured(name, edition, need, self._clock(), size_bytes))

        try:
            self._workers.submit(run)
        except NoThread as error:
            failed(error)

    def _fitted(self, request: LoadRequest, command: commands.Start) -> LoadRequest:
        """Have the server reduce its context until it takes no more than is reserved.

        It leaves so much of each device free; a server without GPUs counts from all of the host.
        """
        if _flag(request, "-fitt", "--fit-target"):
            return request
        gpus = [device for device in self.devices if device.name != HOST]
        reserved = command.reserved
        own_mib = reserved[HOST] - self._beside.get(command.name, 0)
        margins = [gpu.free_mib - reserved[gpu.name] for gpu in gpus]
        margins = margins or [one.total_mib - own_mib for one in self.devices]
        margin = ",".join(str(max(0, mib)) for mib in margins)
        args = (*(request.llama_extra_args or ()), "--fit-target", margin)
        return replace(request, llama_extra_args=args)


def _size_of(path: str) -> int:
    """Return the bytes of a local model; others are measured."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _request(entry: Entry | None) -> LoadRequest:
    """Return what is loaded for an entry of ours."""
    if entry is None or entry.request is None:
        raise LookupError("this model is gone, or not ours to start")
    return entry.request


def _flag(request: LoadRequest, *names: str) -> str | None:
    return value_of(request.llama_extra_args or (), *names)


def made(make: Callable[..., F], pool: str, feed: Feed, name: str) -> F:
    """Return the orchestrator of an entry; in answers its models have the entry's name."""
    facade = make(slot=_slot_of(pool, name))
    facade.call_models(name)
    feed.attach(name, facade)
    return facade


def _slot_of(pool: str, name: str) -> str:
    whole = f"{pool}.{name}"
    if len(whole) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return f"{whole[: LONGEST_NAME - 17]}.{digest}"


def left_in(slot: Slot) -> list[str]:
    """Return the names of the models whose slots a dead owner has left with a record."""
    folder, prefix, record = slot.directory.parent, f"{slot.name}.", slot.record_path.name
    try:
        found = sorted(path for path in folder.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []
    return [path.name.removeprefix(prefix) for path in found if (path / record).exists()]
