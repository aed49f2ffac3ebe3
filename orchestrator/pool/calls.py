"""What `ModelPool` and `AsyncModelPool` share: the life cycle, the catalogue, what is read."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, overload

from orchestrator.base import log
from orchestrator.base.log import event_log
from orchestrator.base.paths import PathNames, without_folders
from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import (
    InvalidRequest,
    Problem,
    ShuttingDown,
    WrongProcess,
    no_thread_as_error,
)
from orchestrator.machine.plan import Plan
from orchestrator.machine.states import State as SlotState
from orchestrator.pool import facts
from orchestrator.pool.budget import budget_of, on_devices
from orchestrator.pool.by_hand import ByHand, EarlyCancels
from orchestrator.pool.catalogue import (
    Catalogue,
    Changes,
    Match,
    check_pins,
    difference,
    merge,
    reader_of,
    with_pin,
    without_entry,
)
from orchestrator.pool.context import Context, Policy, Turn
from orchestrator.pool.elsewhere import Watch
from orchestrator.pool.entries import Entry, PoolSettings
from orchestrator.pool.feed import Feed
from orchestrator.pool.foresight import foreseen
from orchestrator.pool.keys import Grant, grants_of
from orchestrator.pool.ledger import NO_LIMIT, Amounts
from orchestrator.pool.owner import EVICTIONS, Granted, Lease, PoolCall, PoolOwner
from orchestrator.pool.slots import PoolSlots, left_in, made
from orchestrator.pool.states import State
from orchestrator.pool.status import ModelStatus, PoolSnapshot, PoolStatus, devices_of, waiting_of
from orchestrator.pool.values import AUTO, Memory
from orchestrator.pool.values import budget as checked_budget
from orchestrator.runtime.answers import LoadOutcome, LoadProgress, Status
from orchestrator.runtime.calls import Facade
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.ports import LogPosition
from orchestrator.server.slot import Slot
from orchestrator.settings.fields import StrPath
from orchestrator.settings.memory import total
from orchestrator.settings.request import LoadRequest

_ADOPTION_S: Final = 15.0
_SHUTDOWN_S: Final = 120.0
_log = event_log("orchestrator.pool")

F = TypeVar("F", bound=Facade)
Make = Callable[[Catalogue], Catalogue]
Check = Callable[[LoadRequest], None] | None


class PoolFacade(Generic[F]):
    """The common base of `ModelPool` and `AsyncModelPool`."""

    _facade: type[F]

    def __init__(
        self,
        models: StrPath | Mapping[str, Any],
        *,
        folder: StrPath = os.curdir,
        memory: str | Mapping[str, str] = "auto",
        slot: str = "default",
        state_dir: StrPath | None = None,
        parts: Parts | None = None,
        **options: Any,
    ) -> None:
        """Read the catalogue and check the options. `start`, or the first call, claims the slots.

        Args:
            models: The path of a TOML file, or the same as a mapping; see docs/catalogue.md.
            folder: Where relative paths of a mapping start; those of a file start in its folder.
            memory: Budget of the first device, e.g. `"12 GiB"`, or of each in a mapping by device;
                `"auto"` is what the catalogue says.
            slot: Name of the pool. The model `name` has the slot `{slot}.{name}`.
            state_dir: Folder of all slots; by default the state directory of the user.
            parts: Replacements for the parts of an orchestrator, for tests and embedders.
            **options: Every other option of `Orchestrator` but `idle_ttl_s`.

        Raises:
            InvalidCatalogue: it says where the mistake is.
            InvalidRequest: an option is not usable; `field` names it.
        """
        if "idle_ttl_s" in options:
            message = "idle_ttl_s belongs into the catalogue, below [pool] or [models.NAME]"
            raise InvalidRequest.because(message, field="idle_ttl_s")
        self._memory = checked_budget("memory", memory)
        self.feed: Feed = Feed()
        self._early = EarlyCancels()
        self._read = reader_of(models, folder)
        self._catalogue = self._read()
        self.grants: tuple[Grant, ...] = grants_of(self._catalogue)
        self._runtime: dict[str, Entry] = {}
        self._name = slot
        self._state_dir = state_dir
        self._parts = parts or Parts()
        self._clock = self._parts.clock
        restart = options.pop("restart", "never")
        self._make = partial(self._facade, state_dir=state_dir, parts=parts, **options)
        scout = self._make(slot=slot, restart=restart)  # checks the options
        self._scout = scout  # and is never started
        self._restart, self._keeps = scout.policy.restart, scout.policy.keeps_server
        self._life = threading.Lock()  # for starting, closing and the catalogue only
        self._make_owner: Callable[..., PoolOwner] = PoolOwner
        self._owner: PoolOwner | None = None
        self._pid = 0
        self._folder: Path | None = None
        self._watch = Watch()
        self._slots: PoolSlots[F] = self._new_slots(lambda _: None)  # before a start
        self._known: tuple[tuple[object, ...], tuple[PathNames, ...]] | None = None

    def _new_slots(self, post: Callable[[facts.Fact], None]) -> PoolSlots[F]:
        # The slots must not hold this object: their owner is told when nobody does any more.
        make = partial(made, self._make, self._name, self.feed)
        slots: PoolSlots[F] = PoolSlots(make, post, self._parts.workers(), self._clock)
        slots.entries = self._catalogue.models
        slots.restarts, slots.keeps = self._restart is not None, self._keeps
        self._slots = slots
        return slots

    # -------------------------------------------------------------------------------- life cycle

    def _started(self, *, again: bool = False) -> PoolOwner:
        owner = self._owner
        if owner is not None and self._pid != os.getpid():
            raise WrongProcess.because(
                f"this pool belongs to process {self._pid}: make one in this process, "
                "with a slot of its own",
                field="slot",
            )
        if owner is None or (again and owner.has_ended):
            with self._life:
                if self._owner is None or (again and self._owner.has_ended):
                    self._claim()
                owner = self._owner
        if owner is None or owner.has_ended:
            raise ShuttingDown.because("this pool has been closed: start it again")
        return owner

    def _claim(self) -> None:
        slot = self._parts.slot(self._name, self._state_dir)
        slot.claim()
        self.feed.begin()
        try:
            with no_thread_as_error():
                owner = self._start_owner(slot)
        except BaseException:
            slot.release()
            raise
        self._pid, self._folder = os.getpid(), slot.directory
        self._owner = owner  # last: other threads read it without the lock

    def _start_owner(self, slot: Slot) -> PoolOwner:
        """Find what a dead owner has left, and tell the machine of the catalogue and the budget."""
        ended = partial(_ended, slot, self.feed, self._watch)
        owner = self._make_owner(self._new_slots, self._clock, ended)
        slots = self._slots
        slots.devices = self._scout.devices()
        owner.start(slot.name)
        try:
            # until it is known what the servers hold that are adopted
            no_limit = Amounts.of({device.name: NO_LIMIT for device in slots.devices})
            owner.post(facts.Configured(Policy(), no_limit, self._clock()))
            for entry in self._catalogue.models.values():
                self._define(owner, slots, entry)
            self._check_pins(self._catalogue)
            adopted = self._adopt(slots, slot)
            owner.post(self._configured(self._catalogue, adopted))
        except BaseException:
            owner.stop()
            raise
        self._watch.of(self._catalogue.models.values())
        now = self._clock()
        for name in self._catalogue.pool.preload:
            owner.post(facts.Preloaded(name, now))
        owner.until_done()
        return owner

    def _define(
        self, owner: PoolOwner, slots: PoolSlots[F], entry: Entry, *, is_other: bool = True
    ) -> None:
        definition = slots.definition(entry)
        if definition is not None:
            owner.post(facts.Defined(entry.name, definition, self._clock(), is_other))

    def _adopt(self, slots: PoolSlots[F], slot: Slot) -> dict[str, int]:
        """Adopt the servers that were kept for us, and end those of no entry. Return what they hold
        in MiB by device.
        """
        left: dict[str, Future[bool]] = {}
        for name in left_in(slot):
            done: Future[bool] = Future()
            left[name] = done
            slots.adopt(name, done.set_result)
        held: list[Mapping[str, int]] = []
        for name, done in left.items():
            if done.result(_ADOPTION_S) and name in self._catalogue.models:
                loaded = slots.facade(name).status().loaded
                if loaded is not None and loaded.memory is not None:
                    held.append(loaded.memory.devices)
            elif name not in self._catalogue.models:
                gone: Future[bool] = Future()
                slots.end(name, gone.set_result)
                gone.result(_SHUTDOWN_S)
        return total(*held)

    def _configured(self, catalogue: Catalogue, held: Mapping[str, int]) -> facts.Configured:
        """Return the settings of a catalogue as a fact."""
        pool = catalogue.pool
        budget = budget_of(self._budget(pool), pool.headroom, self._slots.devices, held)
        policy = Policy(
            max_wait_s=pool.max_wait_s,
            min_resident_s=pool.min_resident_s,
            max_waiting=pool.max_waiting,
            held_s=pool.held_s,
            max_resident=pool.max_resident,
        )
        if self._restart is not None:
            policy = replace(policy, restart=self._restart)
        return facts.Configured(policy, Amounts.of(budget), self._clock())

    def _budget(self, pool: PoolSettings) -> Memory | Literal["auto"]:
        return pool.memory if self._memory == AUTO else self._memory

    def _check_pins(self, catalogue: Catalogue) -> None:
        """Refuse pinned models that are known to exceed a budget that is given, not found."""
        given, slots = self._budget(catalogue.pool), self._slots
        if given != AUTO:
            needs = slots.known_needs(catalogue.models.values())
            check_pins(catalogue, on_devices(given, slots.devices), needs)

    def _close_all(self, *, keep: bool = True) -> None:
        """End every server or leave it to the next owner, and release the slots."""
        if self._owner is not None and self._pid != os.getpid():
            return  # the lock may have been held when this process was forked
        with self._life:
            owner = self._owner
            if owner is None or owner.has_ended:
                return
            self._slots.keeps = keep and self._keeps
            owner.post(facts.ShutdownRequested(self._clock()))
            owner.is_empty.wait(_SHUTDOWN_S)
            owner.stop()
            log.flush()

    def __del__(self) -> None:
        owner = getattr(self, "_owner", None)  # None: the options were refused
        if owner is not None and not owner.has_ended and self._pid == os.getpid():
            owner.drop()
            message = f"an open {type(self).__name__} was dropped, and is closed: call close()"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)

    # ------------------------------------------------------------------------------------ reading

    @property
    def slot_folder(self) -> Path:
        """The folder of its slot, which is private; once the pool has started."""
        if self._folder is None:
            raise ShuttingDown.because("this pool has not started")
        return self._folder

    def match(self, name: str | None) -> Match:
        """Return the entry that a caller means; None is the default.

        Raises:
            ModelNotFound: it lists what there is.
        """
        return self._catalogue.match(name)

    def entry(self, name: str | None) -> Entry:
        """Return the entry that a name stands for; None is the default. Raises ModelNotFound."""
        return self.match(name).entry

    def _own(self, name: str | None) -> Entry:
        """Return an entry of ours; raises also InvalidRequest for one of another server."""
        return self.check_own(self.match(name).entry)

    def check_own(self, entry: Entry) -> Entry:
        """Return an entry, unless it is of another server. Raises InvalidRequest."""
        if entry.request is None:
            message = f"{entry.name} is served elsewhere ({entry.base_url}): it is not ours to load"
            raise InvalidRequest.because(message, field="model")
        return entry

    @property
    def catalogue(self) -> Catalogue:
        """The models as they are now."""
        return self._catalogue

    @overload
    def status(self, name: None = None) -> PoolStatus: ...
    @overload
    def status(self, name: str) -> Status: ...
    def status(self, name: str | None = None) -> PoolStatus | Status:
        """Return the budget, every model and who waits; with a name, the slot of that model. Never
        blocks.

        Raises:
            ModelNotFound: there is no such model.
        """
        if name is not None:
            return self.slot_status(self.match(name).entry.name)
        return self.status_of(self._catalogue)

    def status_of(self, catalogue: Catalogue) -> PoolStatus:
        """Return the part of the status that is of these entries only."""
        seen = PoolSnapshot(self._ctx, self._clock())
        models = [self._model_status(entry, seen) for entry in catalogue.models.values()]
        waiting = [one for one in waiting_of(seen.ctx, seen.now) if one.model in catalogue.models]
        return PoolStatus(devices_of(seen.ctx, catalogue.models), models, waiting)

    def model_status(self, name: str) -> ModelStatus:
        """Return one model, by any of its names.

        Raises:
            ModelNotFound: there is no such model.
        """
        entry = self.match(name).entry
        return self._model_status(entry, PoolSnapshot(self._ctx, self._clock()))

    def _model_status(self, entry: Entry, seen: PoolSnapshot) -> ModelStatus:
        if seen.state_of(entry.name) is State.ABSENT:
            generation, problem = self._slots.generation(entry.name), self._watch.problem(entry)
            return seen.model(entry, generation=generation, problem=problem)
        gate = self._slots.gate(entry.name)
        slot = self._slots.facade(entry.name).status()
        return seen.model(entry, slot, gate.used_at if gate is not None else None)

    def reserved_mib(self, name: str) -> int:
        """Return what a model holds of all budgets now."""
        return sum(n for _, n in self._ctx.ledger.of(name).of_devices().by_account)

    @property
    def is_ready(self) -> bool:
        """Whether it has started, the preloads are settled, and no shutdown has begun."""
        owner = self._owner
        if owner is None or owner.has_ended or owner.ctx.is_shutting_down:
            return False
        return all(waiter.kind != "preload" for waiter in owner.ctx.waiting)

    @property
    def evictions(self) -> dict[str, int]:
        """How many models were stopped for others or because they were idle, by reason."""
        return dict.fromkeys(EVICTIONS, 0) | (self._owner.evictions if self._owner else {})

    @property
    def has_ended(self) -> bool:
        """Whether it is closed, or about to be."""
        owner = self._owner
        return owner is not None and (owner.has_ended or owner.ctx.is_shutting_down)

    def progresses(self) -> Iterator[tuple[str, LoadProgress]]:
        """Yield the progress of every start in flight that has bytes."""
        for entry in self._ctx.entries:
            if entry.state is State.STARTING:
                step = self._slots.facade(entry.name).progress()
                if step.bytes_done is not None:
                    yield entry.name, step

    def next_generation(self, name: str, *, force_reload: bool) -> Generation:
        """Return the generation that a load would have now, or the one that it would join."""
        known, newest = self._ctx.find(name), self._slots.generation(name)
        is_there = known is not None and known.state in (State.STARTING, State.RESIDENT)
        is_there = is_there and not (force_reload or (known is not None and known.is_changed))
        return newest if is_there and newest else Generation(newest + 1)

    def log_since(self, name: str, position: LogPosition) -> tuple[LogPosition, tuple[str, ...]]:
        """Return the output of a model's servers after a position, and the position after that."""
        return self._slots.facade(name).log_since(position)

    def known_paths(self) -> tuple[PathNames, ...]:
        """Return the display names of all paths in its answers; see `KnownNames.now`."""
        facades = (self._scout, *self._slots.facades)
        parts = (
            *(facade.known_paths() for facade in facades),
            tuple(one.failure.names for one in self._ctx.entries if one.failure is not None),
        )
        if self._known is None or self._known[0] != parts:
            self._known = parts, tuple(map(without_folders, chain.from_iterable(parts)))
        return self._known[1]

    @property
    def _ctx(self) -> Context:
        return self._owner.ctx if self._owner is not None else Context()

    def _plan(self, name: str | None, *, force_reload: bool = False) -> Plan:
        """Return what a load would do, and what would be evicted for it. Blocks."""
        entry, owner = self._own(name), self._started()
        request = entry.request
        assert request is not None  # noqa: S101 (of `_own`)
        ctx = owner.ctx
        known, facade = ctx.find(entry.name), self._slots.facade(entry.name)
        plan = facade.plan_of(replace(request, force_reload=force_reload))
        is_starting = known is not None and known.state is State.STARTING and not known.is_changed
        if plan.action == "none" or (is_starting and not force_reload):
            return replace(plan, action="none", memory=None, free=None, fits=None)
        evict, problem = foreseen(self._slots, ctx, entry, self._clock(), force_reload)
        memory = PoolSnapshot(ctx, 0.0).model(entry).memory or plan.memory
        return replace(plan, memory=memory, fits=problem is None, evict=evict, free=None)

    # ------------------------------------------------------------------------------------- calls

    def _lease_or_call(
        self, entry: Entry, turn: Turn | None
    ) -> tuple[Lease, None] | tuple[None, PoolCall]:
        kind: Literal["lease", "request"] = "lease" if turn is None else "request"
        if (lease := self._lease_at_once(entry, kind)) is not None:
            return lease, None
        return None, self._want(entry, kind, turn=turn)

    def _lease_at_once(self, entry: Entry, kind: Literal["lease", "request"]) -> Lease | None:
        """Enter the gate of a resident model, without asking the machine."""
        owner = self._started()
        known = owner.ctx.find(entry.name)
        if known is None or known.state is not State.RESIDENT or known.is_changed:
            return None
        if (gate := self._slots.gate(entry.name)) is None:
            return None
        who = object()
        if kind != "request":
            server = gate.enter(who)
        elif any(owner.ctx.waiters_of(entry.name)):
            return None  # those come first
        else:
            server = gate.admit(who)
        return Lease(entry.name, gate, who, server) if server is not None else None

    def _leave(self, call: PoolCall | None, lease: Lease | None) -> None:
        """Leave; a lease may have been granted when the wait for it was interrupted."""
        if call is not None and lease is None and not call.settled.cancel():
            answer = call.settled.result()
            lease = answer.lease if isinstance(answer, Granted) else None
        if lease is not None:
            lease.gate.leave(lease.who)
            if (owner := self._owner) is not None:
                owner.left(lease.name, lease.gate)

    def _want(
        self,
        entry: Entry,
        kind: Literal["lease", "request", "load"],
        *,
        hand: ByHand | None = None,
        turn: Turn | None = None,
    ) -> PoolCall:
        owner = self._started()
        call, now = owner.call(entry.name, kind, hand), self._clock()
        force = hand is not None and hand.force_reload
        request_id = hand.load_request_id if hand is not None else None
        if request_id is not None and self._early.arrives((entry.name, request_id), now):
            owner.dismiss(call)
            return call
        owner.post(facts.Wanted(entry.name, call.ticket, kind, now, force, turn or Turn()))
        return call

    def _ask_unload(self, name: str | None, *, cut: bool) -> PoolCall:
        return self._ask(self._own(name), partial(facts.UnloadRequested, cut=cut))

    def _ask(self, entry: Entry, fact: Callable[[str, Ticket, float], facts.Fact]) -> PoolCall:
        """Post a fact about an entry that is answered when it is carried out."""
        owner = self._started()
        call = owner.call(entry.name, "end")
        owner.post(fact(entry.name, call.ticket, self._clock()))
        return call

    def _outcome(self, entry: Entry, granted: Granted) -> LoadOutcome:
        loaded = self._slots.facade(entry.name).status().loaded
        if loaded is None:
            problem = Problem("server_exited", f"the server of {entry.name} has exited since")
            raise problem.error()
        how: Literal["loaded", "already_loaded"] = (
            "already_loaded" if granted.is_at_once else "loaded"
        )
        return replace(loaded, status=how, evicted=list(granted.evicted))

    def _ask_cancel(self, name: str | None) -> PoolCall:
        return self._ask(self._own(name), facts.CancelRequested)

    def _cancel_named(self, name: str | None, request_id: str) -> bool:
        """Cancel the loads of a model that have this id, and return whether there was one."""
        entry, owner = self._own(name), self._started()
        if owner.dismiss_named(entry.name, request_id):
            return True
        self._early.remember((entry.name, request_id), self._clock())
        return owner.dismiss_named(entry.name, request_id)  # it may have arrived meanwhile

    def slot_status(self, name: str) -> Status:
        """Return the status of a model's slot; what only gives the slot back is not shown."""
        found, known = self._slots.facade(name).status(), self._ctx.find(name)
        is_absent = known is None or known.state is State.ABSENT
        return replace(found, state=SlotState.IDLE) if is_absent else found

    def facade_of(self, name: str) -> F:
        """Return the orchestrator of a model, for reading."""
        return self._slots.facade(name)

    # --------------------------------------------------------------------------------- catalogue

    def _pin(self, name: str, pinned: bool) -> Entry:
        own = self._own(name).name
        return self._put(own, partial(with_pin, name=own, pinned=pinned), is_new=False)

    def _put(self, name: str, make: Make, check: Check = None, is_new: bool = True) -> Entry:
        owner = self._started()
        with self._life:
            made = make(self._catalogue)
            entry = made.models[name]
            if check is not None and entry.request is not None:
                check(entry.request)
            if not is_new:
                self._check_pins(made)
            self._take(made)
            if is_new or name in self._runtime:
                self._runtime[name] = entry
            self._define(owner, self._slots, entry, is_other=is_new)
        owner.until_done()
        return entry

    def _ask_remove(self, name: str) -> PoolCall | None:
        self._started()
        with self._life:
            entry = self.match(name).entry
            made = without_entry(self._catalogue, entry.name)
            self._take(made)
            self._runtime.pop(entry.name, None)
            if entry.request is None:
                return None
            return self._ask(entry, lambda name, ticket, at: facts.Removed(name, at, ticket))

    def _take(self, catalogue: Catalogue) -> None:
        """Go on with another catalogue. What follows from it is posted under the same lock, so that
        changes reach the machine in the order in which they were made.
        """
        self._catalogue, self._slots.entries = catalogue, catalogue.models
        self._watch.of(catalogue.models.values())

    def _reload(self, read: Callable[[], Catalogue] | None = None) -> Changes:
        """Read the catalogue again, or another one; a mistake changes nothing."""
        if read is None and self._catalogue.file is None:
            message = "this catalogue is no file: use add and remove, or give reload another one"
            raise InvalidRequest.because(message, field="models")
        owner, read = self._started(), read or self._read
        with self._life:
            old, new = self._catalogue, merge(read(), self._runtime)
            changes = difference(old, new)
            if new.pool != old.pool:
                self._slots.devices = self._scout.devices()
            self._check_pins(new)
            self._read, grants = read, grants_of(new)
            self._take(new)
            self.grants = grants
            if new.pool != old.pool:
                owner.post(self._configured(new, _reserved(owner.ctx)))
            for name in changes.removed:
                owner.post(facts.Removed(name, self._clock()))
            for name in (*changes.added, *changes.changed):
                is_other = name in changes.added or old.models[name].reloads(new.models[name])
                self._define(owner, self._slots, new.models[name], is_other=is_other)
        owner.until_done()
        return changes


def _ended(slot: Slot, feed: Feed, watch: Watch) -> None:
    """What follows when all slots have been given back."""
    watch.of(())
    feed.events.close()
    slot.release()


def _reserved(ctx: Context) -> dict[str, int]:
    whole = ctx.ledger.total(name for name, _ in ctx.ledger.reservations)
    return dict(whole.of_devices().by_account)
