"""The real effects of one owner: the slot's processes, the files, the probes.

Composition only. Spawns happen on the owner's thread, signals and exits on the warden's; questions
to the Hub, downloads and probes on the process's workers, as many at once as the machine begins.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from orchestrator.base.log import event_log
from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.base.workers import Workers
from orchestrator.errors import OrchestratorError, Problem, StateDirError
from orchestrator.machine.commands import Download, Effect, Kill, Probe, Resolve, Spawn, failure_of
from orchestrator.machine.facts import (
    BecameReady,
    Child,
    Emptied,
    Fact,
    Fetched,
    FetchFailed,
    KillFailed,
    NotReady,
    Resolved,
    SlotEvidence,
    Spawned,
    SpawnFailed,
)
from orchestrator.models.hub.fetch_process import FetchProgress
from orchestrator.models.source import ModelSource
from orchestrator.runtime.ports import LogPosition, SlotLock
from orchestrator.server import guardian
from orchestrator.server.child import ServerProcess
from orchestrator.server.environment import check_server_env, child_environment
from orchestrator.server.readiness import LoadProgress, wait_ready
from orchestrator.server.slot import Slot
from orchestrator.server.warden import Warden
from orchestrator.settings.argv import build_argv
from orchestrator.settings.files import ModelFiles

_log = event_log("orchestrator.effects")

Post = Callable[[Fact], None]

_ENDS_WITHIN_S: Final = 5.0
"""How long a close waits for cancelled work; a child process is killed in a hundredth of that."""


@dataclass(slots=True)
class _HeldLock:
    """A locked descriptor, closed once."""

    fd: int | None

    def release(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class ProcessEffects:
    """Effects on a claimed slot.

    Args:
        slot: Claimed; whatever a dead owner left in it is ended before anything else.
        post: Where completions go; callable from any thread.
        source: Where models come from.
        workers: Who does what may block.
        kill_grace_s, server_env, server_keys: See `parts.ServerSettings`.

    Raises:
        InvalidRequest: a variable cannot be given (field `server_env`).
    """

    def __init__(
        self,
        slot: Slot,
        post: Post,
        *,
        source: ModelSource,
        workers: Workers,
        kill_grace_s: float,
        server_env: Mapping[str, str],
        server_keys: tuple[str, ...] | None = None,
    ) -> None:
        check_server_env(server_env)
        self._server_keys = server_keys
        self._source = source
        self._slot = slot
        self._post = post
        self._env = server_env
        self._server: ServerProcess | None = None
        self._progress: dict[Generation, LoadProgress | FetchProgress] = {}
        self._guardian: subprocess.Popen[bytes] | None = None
        self._workers = workers
        self._under_way: set[Future[None]] = set()
        self._warden = Warden(slot, post, kill_grace_s=kill_grace_s)
        ended, evidence = slot.reap()
        if ended:
            _log("warning", "slot.reaped", pids=sorted(ended), is_empty=evidence.is_empty)
        self._watch_over()
        self._warden.start()

    # ------------------------------------------------------------------------ the owner's thread

    def take_slot(self) -> tuple[SlotEvidence, SlotLock | None]:
        evidence, fd = self._slot.take_lock()
        return evidence, None if fd is None else _HeldLock(fd)

    def child_is_alive(self, child: Child) -> bool:
        server = self._server
        return server is not None and server.pid == child.pid and server.is_alive

    def start(self, effect: Effect, token: CancelToken, lock: SlotLock | None) -> None:
        match effect:
            case Kill():
                self._warden.empty(effect, self._server, self._emptied)
            case Resolve():
                asked = self._progress[effect.generation] = FetchProgress()
                self._begin(effect, partial(self._resolve, effect, token, asked))
            case Download():
                fetched = self._progress[effect.generation] = FetchProgress()
                self._begin(effect, partial(self._download, effect, token, fetched))
            case Spawn():
                self._spawn(effect, lock)
            case Probe():
                loaded = self._progress[effect.generation] = LoadProgress(effect.size_bytes)
                self._begin(effect, partial(self._probe, effect, token, loaded))

    def progress(self, generation: Generation) -> LoadProgress | FetchProgress | None:
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

    def close(self) -> None:
        wait(tuple(self._under_way), _ENDS_WITHIN_S)
        self._warden.close()
        if self._guardian is not None:
            guardian.stop(self._guardian)
        self._slot.release()

    def _spawn(self, command: Spawn, lock: SlotLock | None) -> None:
        if not isinstance(lock, _HeldLock) or lock.fd is None:
            raise TypeError("a spawn needs the lock of the slot it spawns into")
        self._watch_over()
        try:
            argv = build_argv(command.target, template_file=self._write_template(command))
            shared = self._server_keys
            keys = None if shared is None else (secrets.token_urlsafe(32), *shared)
            environment = child_environment(self._env, self._slot, keys)
            self._warden.spawn(command.generation, argv, environment, lock.fd, self._spawned)
        except OrchestratorError as error:
            self._remove_template()
            failed = SpawnFailed(command.generation, time.monotonic(), error.problem)
            self._post(failed)
        finally:
            lock.release()

    def _spawned(self, server: ServerProcess) -> None:
        self._server = server
        child = Child(server.generation, server.pid)
        self._post(Spawned(server.generation, time.monotonic(), child))

    def _watch_over(self) -> None:
        """See to it that somebody ends the server if this process dies."""
        if self._guardian is not None:
            if self._guardian.poll() is None:
                return
            _log("warning", "guardian.ended", returncode=self._guardian.returncode)
        try:
            self._guardian = guardian.start(self._slot)
        except OSError as error:
            _log("error", "guardian.unavailable", error=str(error))

    # ------------------------------------------------------------------------- the workers' threads

    def _begin(self, effect: Effect, carry_out: Callable[[], None]) -> None:
        def report() -> None:
            try:
                carry_out()
            except BaseException as error:  # noqa: BLE001 (it always reports, also if told to exit)
                _log("exception", "effect.failed", effect=type(effect).__name__)
                problem = Problem("internal", f"{type(error).__name__}: {error}")
                self._post(failure_of(effect, problem, time.monotonic()))

        done = self._workers.submit(report)
        self._under_way.add(done)
        done.add_done_callback(self._under_way.discard)

    def _resolve(self, command: Resolve, token: CancelToken, progress: FetchProgress) -> None:
        target = command.target
        self._report_model(
            command, Resolved, partial(self._source.resolve, target.request, token, progress)
        )

    def _download(self, command: Download, token: CancelToken, progress: FetchProgress) -> None:
        target = command.target
        fetch = partial(self._source.fetch, target.request, token, progress, target.model)
        self._report_model(command, Fetched, fetch)

    def _report_model(
        self,
        command: Resolve | Download,
        found: type[Resolved | Fetched],
        find: Callable[[], ModelFiles],
    ) -> None:
        generation = command.generation
        try:
            model = find()
        except OrchestratorError as error:
            fact: Fact = FetchFailed(generation, time.monotonic(), error.problem)
        else:
            fact = found(generation, time.monotonic(), model)
        self._progress.pop(generation, None)
        self._post(fact)

    def _probe(self, command: Probe, token: CancelToken, progress: LoadProgress) -> None:
        server = self._server
        if server is None or server.pid != command.child.pid:
            problem = Problem("server_start_failed", "the server is gone", reason="exited")
            self._post(NotReady(command.generation, time.monotonic(), problem))
            return
        verdict = wait_ready(
            server,
            token,
            stall_timeout_s=command.stall_timeout_s,
            progress=progress,
            extra_args=command.extra_args,
        )
        self._progress.pop(command.generation, None)
        now = time.monotonic()
        if isinstance(verdict, Problem):
            self._post(NotReady(command.generation, now, verdict))
        else:
            self._post(BecameReady(command.generation, now, verdict))

    # ------------------------------------------------------------------------- the warden's thread

    def _emptied(self, fact: Emptied | KillFailed) -> None:
        if isinstance(fact, Emptied):
            self._remove_template()
        self._post(fact)

    # ------------------------------------------------------------------------- the private template

    @property
    def _template_path(self) -> Path:
        return self._slot.directory / "chat-template.jinja"

    def _write_template(self, command: Spawn) -> str | None:
        template = command.target.request.chat_template_override
        if template is None:
            return None
        path = self._template_path
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(template)
        except OSError as error:
            message = f"the chat template cannot be written to {path} ({error.strerror})"
            raise StateDirError.because(message, field="state_dir") from error
        return str(path)

    def _remove_template(self) -> None:
        with contextlib.suppress(OSError):  # a disk gone read-only: nobody reads it again
            self._template_path.unlink()
