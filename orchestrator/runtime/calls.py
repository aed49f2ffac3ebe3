"""What both facades share: options, life cycle, requests, and the methods that only read.

A call takes a ticket and posts one fact to the owner, which has its model looked up. Nothing here
decides anything, and reading takes no lock. The facades differ only in how a call waits for its
answer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, cast

from orchestrator import errors
from orchestrator.base import log
from orchestrator.base.paths import PathNames, names_of_own
from orchestrator.base.tokens import Generation, Ticket
from orchestrator.errors import Problem, no_thread_as_error
from orchestrator.machine import facts
from orchestrator.machine.context import Context, Policy
from orchestrator.machine.plan import Plan
from orchestrator.machine.recovery import RestartPolicy
from orchestrator.machine.states import State
from orchestrator.models import on_disk
from orchestrator.models.listings import Listings
from orchestrator.models.roots import Folder, model_roots
from orchestrator.runtime.answers import (
    LeasedServer,
    LoadOutcome,
    LoadProgress,
    OnDisk,
    Options,
    PastLoad,
    Status,
    prompts_status,
)
from orchestrator.runtime.effects import ServerSettings
from orchestrator.runtime.gate import Gate
from orchestrator.runtime.look_up import LookUps
from orchestrator.runtime.options import check_choice, check_count, check_switch, restart_policy
from orchestrator.runtime.owner import Call, Owner
from orchestrator.runtime.parts import Parts
from orchestrator.runtime.ports import LogPosition, Progress
from orchestrator.runtime.sizes import Needed, Sizes
from orchestrator.runtime.snapshot import KnownNames, Observer, Snapshot
from orchestrator.server.devices import Device
from orchestrator.server.state_dir import cache_dir
from orchestrator.settings import reach
from orchestrator.settings.checks import checked_seconds
from orchestrator.settings.drafting import accepted_modes
from orchestrator.settings.fields import SETTINGS, LoadFields, StrPath
from orchestrator.settings.flags import CACHE_TYPES
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest

RequestLike = LoadRequest | StrPath | None
"""A request, a `model_path`, or None where `model_path` is given by name."""

MakeFact = Callable[[Ticket], facts.Request]
"""Returns the request of a call."""


class Facade:
    """The common base of `Orchestrator` and `AsyncOrchestrator`."""

    def __init__(
        self,
        *,
        llama_server: str | os.PathLike[str] = "auto",
        slot: str = "default",
        state_dir: str | os.PathLike[str] | None = None,
        kill_grace_s: float = 5.0,
        drain_timeout_s: float = 30.0,
        drain_policy: Literal["wait", "cut"] = "wait",
        abandoned_load: Literal["cancel", "continue"] = "cancel",
        restart: Literal["never", "on-crash"] | RestartPolicy = "never",
        idle_ttl_s: float | None = None,
        server_env: Mapping[str, str] | None = None,
        models_dir: Folder | Iterable[Folder] = (),
        protect_server: bool = True,
        on_host_exit: Literal["stop", "keep"] = "stop",
        keep_s: float = 60.0,
        hang_timeout_s: float | None = 60.0,
        warm: bool = True,
        keep_prompts: bool = False,
        keep_prompts_mib: int = 1024,
        parts: Parts | None = None,
    ) -> None:
        """Check the options. `start`, or the first call, claims the slot.

        Args:
            llama_server: Path of the llama-server binary. `"auto"` tries LLAMA_SERVER_PATH, then
                PATH, then the embedded server; `"embedded"` uses that one only.
            slot: Name of the process slot. A slot has one orchestrator, and at most one server.
            state_dir: Folder of all slots; by default the state directory of the user.
            kill_grace_s: Seconds between SIGTERM and SIGKILL; 0 sends SIGKILL at once.
            drain_timeout_s: Seconds for which a swap or an unload waits for held leases.
            drain_policy: `wait` for leases, or `cut`: stop the server at once.
            abandoned_load: `cancel` or `continue` a load whose last caller has gone away.
            restart: `on-crash` restarts a Healthy server that exits by itself; `never` does not. A
                `RestartPolicy` is `on-crash` with waits of your own.
            idle_ttl_s: Unload a model after this many seconds without use; None = never. The
                `idle_ttl_s` of a request takes precedence, and a `pinned` model stays loaded.
            server_env: Environment variables for the server, besides those on the allow-list.
            models_dir: One or more folders that must contain all local models; relative names are
                looked up in them. Empty = models may be anywhere.
            protect_server: Give every server a random API key of its own, which only `lease()` and
                the pass-through have. False lets every program and web page of this machine use
                the server's port.
            on_host_exit: What becomes of a Healthy server when this orchestrator is closed, or its
                process ends in any way: `stop` it, or `keep` it for the next owner of the slot,
                which goes on with it.
            keep_s: Seconds for which it is kept; after that it is stopped.
            hang_timeout_s: End a server that has neither answered nor worked for so many seconds,
                as if it had exited; None = never.
            warm: Read the files of the next model into the page cache while the running server
                drains and ends, where they fit into memory.
            keep_prompts: Save what a chat server has computed of its prompts before it is stopped
                for another model, and restore it when the same target comes back.
            keep_prompts_mib: Size of all that is saved, in MiB; the oldest goes first.
            parts: Replacements for the parts of an orchestrator, for tests and embedders.

        Raises:
            InvalidRequest: an option is not usable; `field` names it.
            StateDirError: there is no home folder for the default of `state_dir`.
        """
        check_choice("abandoned_load", abandoned_load, "cancel", "continue")
        check_choice("drain_policy", drain_policy, "wait", "cut")
        grace_s = checked_seconds("kill_grace_s", kill_grace_s)
        drain_s = checked_seconds("drain_timeout_s", drain_timeout_s)
        if drain_policy == "cut":
            drain_s = 0.0
        if idle_ttl_s is not None:
            idle_ttl_s = checked_seconds("idle_ttl_s", idle_ttl_s, zero=False)
        check_switch("protect_server", protect_server)
        check_choice("on_host_exit", on_host_exit, "stop", "keep")
        keep_s = checked_seconds("keep_s", keep_s, zero=False)
        if hang_timeout_s is not None:
            hang_timeout_s = checked_seconds("hang_timeout_s", hang_timeout_s, zero=False)
        check_switch("warm", warm)
        check_switch("keep_prompts", keep_prompts)
        check_count("keep_prompts_mib", keep_prompts_mib)
        keeps = on_host_exit == "keep"
        roots = model_roots(models_dir)
        self._parts = parts or Parts()
        self._clock = self._parts.clock
        self._slot_name = slot
        self._state_dir = state_dir
        self._cache = cache_dir(state_dir)
        restarts = restart_policy(restart)
        self._policy = Policy(
            drain_s,
            abandoned_load,
            restarts,
            idle_ttl_s,
            keeps_server=keeps,
            warms=warm,
            keeps_prompts=keep_prompts,
        )
        self._servers = ServerSettings(
            grace_s,
            dict(server_env or {}),
            protect_server,
            keep_s=keep_s if keeps else 0.0,
            hang_timeout_s=hang_timeout_s,
            keep_prompts_mib=keep_prompts_mib if keep_prompts else None,
        )
        state_names = names_of_own(self._cache.parent, "<state>")
        self._roots = roots
        self._known = KnownNames((state_names, roots.names if roots else ()))
        self._source = self._parts.source(self._cache / "hub", roots)
        self._sizes = Sizes(self._cache, self._parts.devices)
        self._look_ups = LookUps(
            self._parts, self._source, os.fspath(llama_server), self._cache, self._sizes
        )
        self._listings = Listings(self._source, self._parts.workers)
        self._owner: Owner | None = None
        self._pid = 0
        self._folder: Path | None = None
        self._is_closed = False
        self._life = threading.Lock()  # for starting and closing only
        self._tickets = itertools.count(1)
        self._observers: list[Observer] = []

    # -------------------------------------------------------------------------- life cycle

    def _check_usable(self, *, again: bool = False) -> None:
        if self._owner is not None and self._pid != os.getpid():
            raise errors.WrongProcess.because(
                f"this orchestrator belongs to process {self._pid}: make one in this process, "
                "with a slot of its own",
                field="slot",
            )
        if self._is_closed and not again:
            raise errors.ShuttingDown.because("this orchestrator has been closed: start it again")

    def _start(self, *, again: bool = False) -> Owner:
        """Return the owner; the first call claims the slot and starts it.

        Args:
            again: Whether to do so after a close, too: a call that comes late must not.
        """
        owner = self._owner
        if owner is None or (again and self._is_closed):
            with self._life:
                self._check_usable(again=again)
                if self._owner is None or self._owner.has_ended:
                    self._claim()
                self._is_closed = False
        self._check_usable()
        return cast("Owner", self._owner)

    def _claim(self) -> None:
        parts, workers, look_ups = self._parts, self._parts.workers(), self._look_ups
        source, settings, sizes = self._source, self._servers, self._sizes
        slot = parts.slot(self._slot_name, self._state_dir)
        # The owner must not hold this object: it is told when nobody does any more.
        with contextlib.ExitStack() as undo, no_thread_as_error():
            slot.claim()
            undo.callback(slot.release)
            owner: Owner = parts.owner(
                lambda post: parts.effects(
                    slot,
                    post,
                    source,
                    workers,
                    settings,
                    lambda: owner.gate.inside > 0,
                    sizes,
                    lambda command: look_ups.answer(command, owner.snapshot),
                ),
                policy=self._policy,
                clock=self._clock,
                observers=self._observers,
                tickets=self._tickets,
                before=self._owner,
            )
            undo.callback(owner.effects.close)
            owner.start(slot.name)
            undo.pop_all()
        self._pid, self._folder = os.getpid(), slot.directory
        self._owner = owner  # last: other threads read it without the lock
        self._at_exit = partial(_end_at_exit, owner, parts.wait, self._pid)
        parts.at_exit(self._at_exit)

    def _close(self, *, keep: bool = True) -> None:
        """Cancel loads, stop the server or leave it to the next owner, and release the slot.

        Raises:
            SlotOccupied: a process of the slot could not be killed; the slot is released anyway.
        """
        if self._owner is not None and self._pid != os.getpid():
            return  # the lock may have been held when this process was forked
        with self._life:
            self._is_closed, owner = True, self._owner
            self._listings.close()
            if owner is None or owner.has_ended:
                return
            answer = _shut_down(owner, self._parts.wait, keep=keep)  # can be called again
            self._parts.not_at_exit(self._at_exit)
        unwrap(answer)

    def __del__(self) -> None:
        owner = getattr(self, "_owner", None)  # None: the options were refused
        if owner is not None and not owner.has_ended and self._pid == os.getpid():
            owner.drop()
            message = f"an open {type(self).__name__} was dropped, and is closed: call close()"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)

    # ----------------------------------------------------------------------------- reading

    def status(self) -> Status:
        """Return the present state, the loaded model and the load in flight. Never blocks."""
        owner = self._owner
        if owner is None:
            return self._snapshot.status(self._clock(), self._progress_of)
        status = owner.snapshot.status(self._clock(), self._progress_of, owner.gate)
        store = owner.effects.prompts
        return status if store is None else replace(status, prompts=prompts_status(store.counts))

    def progress(self) -> LoadProgress:
        """Return the phase and the bytes of the load in flight. Never blocks."""
        return self._snapshot.progress(self._progress_of)

    def observe(self, observer: Observer) -> None:
        """Call `observer` with a `StepReport` after every step. It must not block or call back."""
        self._observers.append(observer)

    @property
    def lease_count(self) -> int:
        """The number of leases that are held."""
        owner = self._owner
        return owner.snapshot.leases(owner.gate) if owner is not None else 0

    @contextlib.contextmanager
    def leased_at_once(self) -> Iterator[LeasedServer | None]:
        """Lease the server without waiting, as `lease` does first; None if none is Healthy.

        Raises:
            ShuttingDown, WrongProcess: as every call.
        """
        owner, who = self._owner, object()
        if owner is None:
            yield None
            return
        self._check_usable()
        gate = owner.gate
        try:
            yield gate.enter(who)
        finally:  # it may have entered when it was interrupted
            gate.leave(who)

    @property
    def slot_folder(self) -> Path:
        """The folder of its slot, which is private; once it has started."""
        if self._folder is None:
            raise errors.ShuttingDown.because("this orchestrator has not started")
        return self._folder

    def judge_of_prompts(self, generation: Generation) -> Callable[[int], None] | None:
        """Return what to tell the `cache_n` of this server's first answer to, if that shows
        whether the prompts that were restored are of use.
        """
        store = self._owner.effects.prompts if self._owner is not None else None
        return store.judge_of(generation) if store is not None else None

    @property
    def last_event_id(self) -> int:
        """The number of the newest event; 0 before the first one."""
        return self._owner.events.last_id if self._owner else 0

    def logs(self, lines: int = 200) -> tuple[str, ...]:
        """Return the last lines of output of the present or last server, oldest first."""
        return self._owner.effects.log_tail(lines) if self._owner else ()

    def plan(self, request: RequestLike = None, **fields: Unpack[LoadFields]) -> Plan:
        """Return what `load` would do with the same arguments, and why, without doing it.

        Reads the model and the server from disk, and asks the Hub for a model that is not cached
        completely (at most once a minute). This blocks in `AsyncOrchestrator` too: call it through
        `asyncio.to_thread`. Raises what `load` raises before it stops anything.
        """
        self._check_usable()
        wanted = request_of(request, fields)
        return self._look_ups.plan(wanted, self._snapshot, self._clock())

    def outcome(self, generation: int) -> LoadOutcome | Problem | None:
        """Return the result of a load, or its problem; None while it is in flight.

        Raises:
            UnknownGeneration: there is no such load, or it is not among the last 256.
        """
        return self.past_load(generation).outcome

    def past_load(self, generation: int) -> PastLoad:
        """Return a load that is in flight or has ended. Raises what `outcome` raises."""
        self._check_usable()
        found = self._snapshot.loads(self._clock()).get(Generation(generation))
        if found is None:
            message = f"no load has generation {generation}, or it is not remembered any more"
            raise errors.UnknownGeneration.because(message, field="generation")
        return found

    def history(self, limit: int = 20) -> list[PastLoad]:
        """Return the last loads, in flight or ended, newest first."""
        loads = self._snapshot.loads(self._clock())
        newest = sorted(loads, reverse=True)[: max(0, limit)]
        return [loads[generation] for generation in newest]

    def options(self) -> Options:
        """Return the values that the server binary accepts for `cache_type_kv` and
        `speculative_type`. Runs the binary once and remembers its answer.

        Raises:
            ServerUnavailable: there is no usable binary.
        """
        catalogue = self._look_ups.catalogue(self._look_ups.server())
        return Options(list(CACHE_TYPES), accepted_modes(catalogue))

    def check_sent(self, request: LoadRequest) -> None:
        """Refuse a request from elsewhere whose extra args read files or reach other machines.

        `models_dir` confines such args, and a list that a load has become Healthy with may be sent
        back.

        Raises:
            RefusedArgument: names the flag.
        """
        args = request.llama_extra_args or ()
        if self._source.is_confined or args in dict(self._snapshot.ctx.committed_args).values():
            return
        for flag, path in reach.named_paths(args):
            what, way = "reaches other machines", "load in the program that owns the model"
            if path is not None:
                what, way = "may read a file", f"set models_dir, or {way}"
            message = (
                f"{flag or repr(path)} in llama_extra_args {what}: over HTTP this is refused where "
                f"the API has keys or is reached from elsewhere; {way}"
            )
            raise errors.RefusedArgument.because(message, field="llama_extra_args")

    def known_paths(self) -> tuple[PathNames, ...]:
        """Return the display names of all paths in its answers; see `KnownNames.now`."""
        return self._known.now(self._snapshot)

    @property
    def _snapshot(self) -> Snapshot:
        if self._owner is not None:
            return self._owner.snapshot
        return self._at_rest()

    def _at_rest(self) -> Snapshot:
        return Snapshot(State.IDLE, Context(self._policy), time.time(), self._clock())

    def _progress_of(self, generation: Generation) -> Progress | None:
        return self._owner.effects.progress(generation) if self._owner is not None else None

    # ------------------------------------------------------------------------------- of a pool

    def begin(self) -> Snapshot:
        """Claim the slot, also again after a close, and return what was found there. Blocks."""
        return self._start(again=True).snapshot

    def log_since(self, position: LogPosition) -> tuple[LogPosition, tuple[str, ...]]:
        """Return the output after a position, and the position after that; see `LogPosition`."""
        owner = self._owner
        return owner.effects.log_since(position) if owner is not None else (position, ())

    @property
    def generation(self) -> Generation:
        """The last load."""
        return self._snapshot.ctx.generation

    @property
    def policy(self) -> Policy:
        return self._policy

    def call_models(self, alias: str) -> None:
        """Give the servers of all later loads this name for their model."""
        self._look_ups.alias = alias

    def plan_of(self, request: LoadRequest) -> Plan:
        """Plan, also after a close. Blocks."""
        snapshot = self._snapshot
        if snapshot.ctx.is_shutting_down:
            snapshot = self._at_rest()
        return self._look_ups.plan(request, snapshot, self._clock())

    def open_call(self) -> Call:
        """Claim the slot, also again after a close, and open a call. Blocks."""
        return self._start(again=True).call()

    def send_load(self, call: Call, request: LoadRequest) -> None:
        self._send(call, self._load_fact(request))

    def send_unload(self, call: Call, *, cut: bool) -> None:
        self._send(call, self._unload_fact(None, cut))

    def give_back(self, *, keep: bool) -> None:
        """Close without the checks of `close`. Blocks."""
        self._close(keep=keep)

    def need_of(self, request: LoadRequest) -> Needed:
        """Return what a start would need. Blocks; raises what `plan` raises."""
        target = self._look_ups.target(request, self._snapshot, self._clock())
        return self._sizes.needed(target)

    def known_need(self, request: LoadRequest) -> Memory | None:
        """Return the server's own figure of an earlier start, without asking the Hub. Blocks."""
        return self._sizes.known(self._look_ups.find(request, self._snapshot, self._clock()).target)

    def devices(self) -> Sequence[Device]:
        """Return the devices that a server could use, the host first. Blocks."""
        server = self._look_ups.server()
        return self._parts.devices(replace(server, catalogue=self._look_ups.catalogue(server)))

    def on_disk(self) -> OnDisk:
        """Return the models on this machine: in the Hub's cache, and in `models_dir`. Blocks."""
        roots, free_mib = self._roots, {}
        found = on_disk.found(roots.folders if roots else ())
        if roots is not None:
            found = [replace(one, model_path=roots.found(one.model_path)) for one in found]
        with contextlib.suppress(errors.OrchestratorError):
            free_mib = {device.name: device.free_mib for device in self.devices()}
        return OnDisk(found, on_disk.free_bytes(), free_mib)

    @property
    def gate(self) -> Gate | None:
        """The gate of the present or last server."""
        return self._owner.gate if self._owner is not None else None

    # ---------------------------------------------------------------------------- requests

    def _load_fact(self, request: LoadRequest) -> MakeFact:
        return lambda ticket: facts.LookUpRequested(ticket, request, "load", self._clock())

    def _prefetch_fact(self, request: LoadRequest) -> MakeFact:
        return lambda ticket: facts.LookUpRequested(ticket, request, "prefetch", self._clock())

    def _unload_fact(self, model_path: str | None, cut: object) -> MakeFact:
        check_switch("cut", cut)
        model = (model_path or "").strip() or None
        return lambda ticket: facts.UnloadRequested(ticket, model, self._clock(), bool(cut))

    def _cancel_fact(self, request_id: str | None, generation: int | None) -> MakeFact:
        if (request_id is None) == (generation is None):
            message = "cancel needs exactly one of load_request_id and generation"
            raise errors.InvalidRequest.because(message, field="load_request_id")
        return lambda ticket: facts.CancelRequested(ticket, request_id, generation, self._clock())

    def _lease_fact(self, ticket: Ticket) -> facts.LeaseRequested:
        return facts.LeaseRequested(ticket, self._clock())

    def _send(self, call: Call, make_fact: MakeFact) -> None:
        """Post the request of a call."""
        cast("Owner", self._owner).ask(call, make_fact(call.ticket))

    def _wait(self, call: Call, future: Future[Any]) -> Any:
        """Block until a future of a call has its result."""
        with call.withdrawn_on_error():
            return self._parts.wait(future)


def _shut_down(owner: Owner, wait: Callable[[Future[Any]], Any], *, keep: bool = True) -> Any:
    """Shut the machine of an owner down, stop it, and return the answer."""
    call = owner.call()
    owner.ask(call, facts.ShutdownRequested(call.ticket, owner.clock(), keep))
    with call.withdrawn_on_error():
        answer = wait(call.settled)
    owner.stop()
    log.flush()
    return answer


def _end_at_exit(owner: Owner, wait: Callable[[Future[Any]], Any], pid: int) -> None:
    if pid == os.getpid() and not owner.has_ended:
        unwrap(_shut_down(owner, wait))


def unwrap(answer: Any) -> Any:
    """Return an answer, or raise the error if it is a problem."""
    if isinstance(answer, Problem):
        raise answer.error()
    return answer


def request_of(request: RequestLike, fields: LoadFields) -> LoadRequest:
    """Return the request that the arguments of a call describe.

    Raises:
        MalformedRequest: a field is unknown, missing, given twice, or has the wrong type.
        InvalidRequest: a value is not usable.
    """
    if isinstance(request, LoadRequest):
        values = {name: getattr(request, name) for name in SETTINGS}
        return LoadRequest.from_dict({**values, **fields}) if fields else request
    if request is None:
        return LoadRequest(**fields)
    if "model_path" in fields:
        message = "model_path is given twice: by position and by name"
        raise errors.MalformedRequest.because(message, field="model_path")
    return LoadRequest.from_dict({"model_path": request, **fields})
