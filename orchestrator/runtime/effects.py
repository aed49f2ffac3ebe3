"""The real effects of one owner: the slot's processes, the model files and the probes.

Servers are started and ended by the slot's keeper, to which the warden speaks. Everything
else that may block (Hub requests, downloads, probes) runs on the worker threads of the process.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Final

from orchestrator.base import threads, waitable
from orchestrator.base.log import event_log
from orchestrator.base.private_file import replace_file
from orchestrator.base.threads import NoThread
from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.base.workers import Workers
from orchestrator.errors import OrchestratorError, Problem, StateDirError, problem_of
from orchestrator.machine import facts
from orchestrator.machine.commands import (
    Download,
    Effect,
    Kill,
    LookUp,
    Probe,
    Resolve,
    Spawn,
    Warm,
    failure_of,
)
from orchestrator.machine.facts import Child, Emptied, Fact, KillFailed, SlotEvidence
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.models.source import ModelSource
from orchestrator.runtime.handover import Remembered, first_changed, recalled
from orchestrator.runtime.ports import LogPosition, SlotLock
from orchestrator.runtime.sizes import Sizes
from orchestrator.server import gpu_memory
from orchestrator.server.child import ServerProcess
from orchestrator.server.environment import check_server_env, child_environment
from orchestrator.server.keepers import Left
from orchestrator.server.page_cache import read_ahead
from orchestrator.server.prompts import PromptStore
from orchestrator.server.readiness import ReadProgress, wait_ready
from orchestrator.server.slot import Slot
from orchestrator.server.warden import Warden
from orchestrator.server.watch import Watch
from orchestrator.settings.argv import build_argv
from orchestrator.settings.memory import Memory
from orchestrator.settings.target import Target

_log = event_log("orchestrator.effects")

_WORTH_READING: Final = 16 << 20  # what is smaller is read in less time than a swap takes
_DIRECT: Final = frozenset({"--direct-io", "-dio"})
_CLOSE_S: Final = 5.0  # cancelled work takes some 10 ms to end its child processes


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Options of an orchestrator for its servers."""

    kill_grace_s: float
    env: Mapping[str, str]
    are_protected: bool
    keep_s: float = 0.0  # after the end of the host
    hang_timeout_s: float | None = None
    keep_prompts_mib: int | None = None  # None = they are not kept


@dataclass(slots=True)
class _HeldLock:
    """The slot's locked file descriptor, until it is closed."""

    fd: int | None

    def release(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class ProcessEffects:
    """Effects on a claimed slot. What a dead owner has left there is the first fact.

    Args:
        post: Gets the facts, on any thread.
        is_used: Whether anybody has a lease.
        sizes: What servers take of memory.
        look_up: Looks up the model of a call; it blocks.

    Raises:
        InvalidRequest: a variable in `settings.env` is not allowed (field `server_env`).
        NoThread: there can be no thread to own the slot's processes.
    """

    def __init__(
        self,
        slot: Slot,
        post: Callable[[Fact], None],
        source: ModelSource,
        workers: Workers,
        settings: ServerSettings,
        is_used: Callable[[], bool],
        sizes: Sizes,
        look_up: Callable[[LookUp], facts.ModelRequested],
    ) -> None:
        check_server_env(settings.env)
        self._slot = slot
        self._post = post
        self._source = source
        self._workers = workers
        self._settings = settings
        self._is_used = is_used
        self._sizes = sizes
        self._look_up = look_up
        self._template_path = str(slot.directory / "chat-template.jinja")
        self._server: ServerProcess | None = None
        self._port: int | None = None  # of the server, once it is Healthy
        self._ended: ServerProcess | None = None
        self._ended_at = -math.inf
        self._target: Target | None = None  # of the server
        self._memory: Memory | None = None  # that it has printed
        self.prompts: PromptStore | None = self._prompt_store()
        self._watch: Watch | None = None
        self._warming = threading.Event()  # set: what reads ahead is to end
        self._progress: dict[Generation, ReadProgress | FetchProgress] = {}
        self._in_flight: set[Future[None]] = set()
        self._warden = Warden(
            slot, post, kill_grace_s=settings.kill_grace_s, keep_s=settings.keep_s
        )
        with contextlib.ExitStack() as undo:
            workers.claim()
            undo.callback(workers.release)
            threads.start(self._warden)
            undo.callback(self._warden.close)
            if (left := self._warden.keepers.prepare()) is not None:
                self._find(left)
            undo.pop_all()

    def _find(self, left: Left) -> None:
        """Report what a dead owner has left; a server that was kept is ours from now on."""
        process, kept = left.process, left.kept
        memory = recalled(kept.memory) if kept is not None else None
        if kept is not None and process is not None and memory is not None:
            generation, key = memory.generation, memory.api_key
            self._server = self._warden.adopt(process, kept, generation, key)
            self._target = memory.target
            child = Child(generation, process.pid)
            self._post(facts.Found(generation, time.monotonic(), child, memory.target))
            return
        if kept is not None:
            waitable.close(kept.output_fd)
        stranger = None if process is None else Child(Generation(0), process.pid)
        self._post(facts.Found(Generation(0), time.monotonic(), stranger, None))

    # ----------------------------------------------------------------------- on the owner's thread

    def take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        evidence = self._warden.keepers.is_empty()
        if not evidence.is_empty:
            return evidence, None
        evidence, fd = self._slot.take_lock()
        return evidence, None if fd is None else _HeldLock(fd)

    def child_is_alive(self, child: Child) -> bool:
        server = self._server
        return server is not None and server.pid == child.pid and server.is_alive

    def can_be_kept(self, child: Child) -> bool:
        return self.child_is_alive(child) and self._warden.keepers.can_keep

    def start(self, effect: Effect, token: CancelToken, lock: SlotLock | None) -> None:
        match effect:
            case Kill():
                self._end_watch()
                self._kill(effect, token)
            case Spawn():
                self._warming.set()  # from now on the server reads
                self._spawn(effect, lock)
            case Resolve() | Download():
                fetched = self._progress[effect.generation] = FetchProgress()
                self._submit(effect, lambda: self._fetch(effect, token, fetched))
            case Probe():
                loaded = self._progress[effect.generation] = ReadProgress(effect.size_bytes)
                self._submit(effect, lambda: self._probe(effect, token, loaded))

    def _kill(self, command: Kill, token: CancelToken) -> None:
        """Save the prompts, if they are to be kept, and empty the slot whatever becomes of that."""
        empty = partial(self._warden.empty, command, self._server, self._emptied)
        store, server, port, target = self.prompts, self._server, self._port, command.saves
        if store is None or server is None or port is None or target is None:
            empty()
            return

        def run() -> None:
            try:
                store.save(target, server, port, token)
            finally:
                empty()

        try:
            self._run(run)
        except NoThread:
            empty()

    def warm(self, command: Warm, token: CancelToken) -> None:
        is_direct = _DIRECT & set(command.target.extra_args)  # past the page cache
        if is_direct or command.target.model.size_bytes < _WORTH_READING:
            return
        server, over = self._server, threading.Event()
        self._warming = over
        paths = [file.path for file in command.target.model.files]
        progress = ReadProgress(command.target.model.size_bytes)
        self._progress[command.generation] = progress  # until the next phase has its own

        def run() -> None:
            pids = server.family() if server is not None else set()
            with contextlib.suppress(OSError):  # the server will say what is wrong
                count = read_ahead(
                    paths, pids, lambda: over.is_set() or token.is_set(), progress.advance_to
                )
                _log("debug", "model.warmed", generation=command.generation, bytes=count)
            is_of_use = progress.bytes_done > 0 and not token.is_set()
            if not is_of_use and self._progress.get(command.generation) is progress:
                self._progress.pop(command.generation, None)

        self._workers.submit(run)

    def look_up(self, command: LookUp) -> None:
        self._workers.submit(lambda: self._post(looked_up(command, self._look_up)))

    def progress(self, generation: Generation) -> ReadProgress | FetchProgress | None:
        return self._progress.get(generation)

    def log_since(self, position: LogPosition) -> tuple[LogPosition, tuple[str, ...]]:
        server = self._server
        if server is None:
            return position, ()
        seen = position[1] if position[0] == server.generation else 0
        total, lines = server.output.since(seen)
        return (server.generation, total), lines

    def log_tail(self, count: int) -> tuple[str, ...]:
        return self._server.output.tail(count) if self._server is not None else ()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def close(self, *, keep: bool = False) -> None:
        self._end_watch()
        self._warming.set()
        wait(tuple(self._in_flight), _CLOSE_S)
        self._warden.close(keep=keep)
        self._workers.release()
        self._slot.release()

    def _spawn(self, command: Spawn, lock: SlotLock | None) -> None:
        if not isinstance(lock, _HeldLock) or lock.fd is None:
            raise TypeError("a spawn needs the lock of its slot")
        try:
            template = self._write_template(command.target.request.chat_template_override)
            prompts = str(self.prompts.folder) if self.prompts is not None else None
            argv = build_argv(command.target, template_file=template, prompts_folder=prompts)
            key = secrets.token_urlsafe(32) if self._settings.are_protected else None
            kind = command.target.server.kind
            environment = child_environment(self._settings.env, self._slot, key, kind)
            memory = Remembered(command.generation, command.target, key).as_text()
            self._target, self._memory = command.target, None
            self._warden.spawn(
                command.generation, argv, environment, lock.fd, memory, self._spawned
            )
        except OrchestratorError as error:
            self._remove_template()
            self._post(facts.SpawnFailed(command.generation, time.monotonic(), error.problem))
        finally:
            lock.release()

    def _spawned(self, server: ServerProcess) -> None:
        self._server, self._port = server, None
        child = Child(server.generation, server.pid)
        self._post(facts.Spawned(server.generation, time.monotonic(), child))
        if (target := self._target) is not None and target.has_json_log:
            server.listeners.append(lambda: self._hear(server, target))

    def _hear(self, server: ServerProcess, target: Target) -> None:
        """Report the memory that a server has printed, until it is ready."""
        if self._port is None and server is self._server:
            memory = self._sizes.printed(target, server.output.figures)
            if memory is not None and memory != self._memory:
                self._memory = memory
                self._post(facts.Sized(server.generation, time.monotonic(), memory))

    # ------------------------------------------------------------------------- on worker threads

    def _submit(self, effect: Effect, work: Callable[[], Fact]) -> None:
        """Run `work` and post its fact, or the failure of the effect if it raises."""

        def run() -> None:
            try:
                fact = work()
            except BaseException as error:  # noqa: BLE001 (also at SystemExit: the load waits)
                if not isinstance(error, OrchestratorError):
                    _log("exception", "effect.failed", effect=type(effect).__name__)
                fact = failure_of(effect, problem_of(error), time.monotonic())
            self._progress.pop(effect.generation, None)
            self._post(fact)
            if isinstance(fact, facts.BecameReady):
                self._ready(fact)

        self._run(run)

    def _run(self, work: Callable[[], None]) -> None:
        done = self._workers.submit(work)
        self._in_flight.add(done)
        done.add_done_callback(self._in_flight.discard)

    def _fetch(
        self, command: Resolve | Download, token: CancelToken, progress: FetchProgress
    ) -> Fact:
        generation, target = command.generation, command.target
        if isinstance(command, Resolve):
            model = self._source.resolve(target.request, token, progress)
            return facts.Resolved(generation, time.monotonic(), model)
        model = self._source.fetch(target.request, token, progress, target.model)
        gpu_memory.settle(self._ended_at + gpu_memory.SETTLE_S, token.is_set)
        return facts.Fetched(generation, time.monotonic(), model)

    def _probe(self, command: Probe, token: CancelToken, progress: ReadProgress) -> Fact:
        server, generation = self._server, command.generation
        if server is None or server.pid != command.child.pid:
            problem = Problem("server_start_failed", "the server has exited", reason="exited")
            return facts.NotReady(generation, time.monotonic(), problem)
        if (changed := first_changed(command.unchanged)) is not None:
            problem = Problem("server_exited", f"{changed} has changed since the server started")
            return facts.NotReady(generation, time.monotonic(), problem)
        stall_timeout_s, hang_timeout_s = command.stall_timeout_s, self._settings.hang_timeout_s
        if command.unchanged and hang_timeout_s is not None:  # it was Healthy, or about to be
            stall_timeout_s = min(stall_timeout_s, hang_timeout_s)
        verdict = wait_ready(
            server,
            token,
            stall_timeout_s=stall_timeout_s,
            progress=progress,
            extra_args=command.extra_args,
        )
        if isinstance(verdict, Problem):
            return facts.NotReady(generation, time.monotonic(), verdict)
        if (target := self._target) is not None:
            if self.prompts is not None and not command.unchanged:
                self.prompts.restore(target, server, _port_of(verdict.base_url), token)
            self._size(server, target, verdict)
        return facts.BecameReady(generation, time.monotonic(), verdict)

    def _size(self, server: ServerProcess, target: Target, ready: facts.ServerFacts) -> None:
        """Report what a server has taken, if that is not what it has printed."""
        figures = server.output.figures if target.has_json_log else ()
        memory = self._sizes.taken(target, figures, ready)
        if memory != self._memory:
            self._post(facts.Sized(server.generation, time.monotonic(), memory))

    def _ready(self, fact: facts.BecameReady) -> None:
        """Do what need not be done before a load is answered."""
        server, base_url = self._server, fact.server.base_url
        if server is None or server.generation != fact.generation:
            return
        self._port = _port_of(base_url)
        self._warden.keepers.note(base_url)
        if (timeout_s := self._settings.hang_timeout_s) is not None:
            try:
                self._watch = Watch(server, base_url, timeout_s, self._is_used, self._post)
                self._watch.begin()
            except OSError as error:  # no descriptor is left
                _log("error", "watch.unavailable", pid=server.pid, error=str(error))

    def _emptied(self, fact: Emptied | KillFailed) -> None:
        if isinstance(fact, KillFailed):
            self._progress.pop(fact.generation, None)
        else:
            if self._server is not self._ended:
                self._ended, self._ended_at = self._server, time.monotonic()
            self._remove_template()
            if self.prompts is not None:
                self.prompts.tidy()
        self._post(fact)

    def _prompt_store(self) -> PromptStore | None:
        folder, limit_mib = self._slot.directory / "prompts", self._settings.keep_prompts_mib
        try:
            if limit_mib is not None:
                return PromptStore(folder, limit_mib << 20)
            shutil.rmtree(folder, ignore_errors=True)  # they are not to be kept any more
        except OSError as error:
            _log("warning", "prompts.unavailable", error=str(error))
        return None

    def _write_template(self, template: str | None) -> str | None:
        path = self._template_path
        if template is None:
            return None
        try:
            replace_file(path, template)
        except OSError as error:
            message = f"the chat template cannot be written to {path} ({error.strerror})"
            raise StateDirError.because(message, field="state_dir") from error
        return path

    def _remove_template(self) -> None:
        with contextlib.suppress(OSError):  # if it cannot be removed, it is at least private
            os.unlink(self._template_path)


def _port_of(base_url: str) -> int:
    return int(base_url.rpartition(":")[2])


def looked_up(command: LookUp, look_up: Callable[[LookUp], facts.ModelRequested]) -> facts.LookedUp:
    """Return the answer to a look-up, whatever it raises: its call waits for it."""
    try:
        return look_up(command)
    except BaseException as error:  # noqa: BLE001 (also at SystemExit)
        if not isinstance(error, OrchestratorError):
            _log("exception", "look_up.failed")
        return facts.LookUpFailed(command.ticket, problem_of(error), time.monotonic())
