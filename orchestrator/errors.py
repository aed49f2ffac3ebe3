"""The exception tree. Every error has a category, and names the field to change if there is one.

OrchestratorError
├── InvalidRequest            400  a setting that cannot be used
│   ├── RefusedArgument       400  a llama-server flag that extra args may not contain
│   ├── InvalidModel          400  empty, truncated or not a GGUF file
│   ├── WrongKind             400  a route that a server of this `kind` does not answer
│   ├── InvalidCatalogue      400  a mistake in the catalogue of a pool; says where it is
│   └── MalformedRequest      422  unknown field or wrong type
├── ModelNotFound             404
├── NameTaken                 409  a model of a pool has this name
├── TooLarge                  507  a model does not fit into the budget of its pool
├── TooManyWaiting            429  `max_waiting` requests of a pool wait already
├── UnknownGeneration         404  no load has it, or it is not remembered any more
├── Interrupted               409  a load that ended before it became Healthy
│   ├── Superseded            409  by a newer load
│   └── Cancelled             409  by a cancel, an unload, or a caller that left
├── Busy                      409  another load is in flight and `on_busy` is "reject"
├── ServerStartFailed         424  the server did not become Healthy
│   └── ServerUnavailable     424  no usable llama-server binary
├── HubError                  502  the Hub did not serve the model
│   ├── HubUnreachable        502  no answer, or an unusable one
│   ├── HubRateLimited        503  too many requests; says when to try again
│   ├── HubGated              403  its terms must be accepted first
│   ├── HubUnauthorized       403  the token is missing, wrong or insufficient
│   └── HubCorrupt            502  the file differs from what the Hub announced
├── DiskFull                  507  no room for the model on the cache's volume
├── TimedOut                  504
│   ├── Stalled               504  no progress for `stall_timeout_s`
│   └── DeadlineExceeded      504  `deadline_s` has passed
├── Unavailable               503
│   ├── NotLoaded             503  no model is Healthy
│   ├── ShuttingDown          503
│   ├── ServerExited          503  a Healthy server exited
│   ├── Unreachable           503  no orchestrator answers at a URL
│   ├── WrongProcess          503  the orchestrator was made before this process was forked
│   └── SlotOccupied          503  a server of this slot could not be stopped
├── SlotOwned                 409  another orchestrator owns this slot
├── StateDirError             500  the state directory cannot be used
├── CacheDirError             500  the model cache cannot be used

A `Problem` is an error as plain data: the pure core passes it on, the status reports it and HTTP
sends it as `application/problem+json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record, parsed
from orchestrator.base.threads import NoThread

CLASSES: Final[dict[str, type[OrchestratorError]]] = {}
"""The class of each category, in the order of the tree."""


@dataclass(frozen=True, slots=True)
class Restored(Record):
    """How restoring the previous model ended, after a failed load.

    Attributes:
        generation: The load that restores it.
        model_path: As requested.
        gguf_variant: As resolved.
        problem: Why that load failed; None if the model is loaded again.
    """

    generation: int
    model_path: str
    gguf_variant: str | None = None
    problem: Problem | None = None

    def as_dict(self) -> dict[str, Any]:
        members: dict[str, Any] = {
            "status": "failed" if self.problem else "loaded",
            "generation": self.generation,
            "model_path": self.model_path,
            "gguf_variant": self.gguf_variant,
        }
        return {**members, "problem": self.problem.as_dict()} if self.problem else members

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.model_path} is loaded again (generation {self.generation})"
        return f"{self.model_path} could not be restored: {self.problem.message}"


@dataclass(frozen=True, slots=True)
class Problem(Record):
    """One failure as data.

    Attributes:
        category: Stable word from the tree, e.g. `server_start_failed`.
        message: One sentence: what happened and what to do.
        field: The request field or setting to change, if there is one.
        generation: The load it belongs to.
        log_tail: The last lines of the server's output, oldest first.
        reason: The cause within the category, e.g. `exited`.
        story: The last transitions before it happened, oldest first.
        retry_after_s: Seconds to wait before trying again, where that may help.
        restored: How restoring the previous model ended, if it was tried.
        names: Public names of local paths in its texts.
        other: Status and title of a category that only a service has, and no class.
    """

    category: str
    message: str
    field: str | None = None
    generation: int | None = None
    log_tail: tuple[str, ...] = ()
    reason: str | None = None
    story: tuple[str, ...] = ()
    retry_after_s: float | None = None
    restored: Restored | None = None
    names: PathNames = dataclasses.field(default=(), compare=False, repr=False)
    other: tuple[int, str] | None = dataclasses.field(default=None, repr=False)

    @property
    def _class(self) -> type[OrchestratorError]:
        return CLASSES.get(self.category, OrchestratorError)

    @property
    def status(self) -> int:
        """The HTTP status code of this category."""
        return self.other[0] if self.other else self._class.status

    def error(self) -> OrchestratorError:
        """Return the exception of this problem's category."""
        return self._class(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the members of RFC 9457 and ours; those without a value are left out."""
        members: dict[str, Any] = {
            "type": "about:blank",
            "title": self.other[1] if self.other else self._class.title,
            "status": self.status,
            "detail": self.message,
            "category": self.category,
        }
        for name in ("field", "generation", "reason", "retry_after_s", "log_tail", "story"):
            if (value := getattr(self, name)) not in (None, ()):
                members[name] = list(value) if isinstance(value, tuple) else value
        if self.restored is not None:
            members["restored"] = self.restored.as_dict()
        return members

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        """Return the problem of a document."""
        problem = parsed(cls, {**members, "message": members["detail"]})
        if problem.category in CLASSES:
            return problem
        return replace(problem, other=(int(members["status"]), str(members["title"])))


class OrchestratorError(Exception):
    """Base of every error that this library raises on purpose.

    As text it is one sentence. A traceback also shows the server's last output and the story.
    """

    category: str = "internal"
    status: int = 500
    title: str = "Internal error"
    _row: ClassVar[tuple[str, int, str]] = category, status, title

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_row" in vars(cls):  # a class of the tree, not a subclass of the host
            cls.category, cls.status, cls.title = cls._row  # a type checker sees their types above
            CLASSES[cls.category] = cls

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem: Problem = problem
        if problem.other is not None:
            self.category, (self.status, self.title) = problem.category, problem.other
        self.message: str = problem.message
        self.field: str | None = problem.field
        self.generation: int | None = problem.generation
        self.log_tail: tuple[str, ...] = problem.log_tail
        self.reason: str | None = problem.reason
        self.story: tuple[str, ...] = problem.story
        self.retry_after_s: float | None = problem.retry_after_s
        self.restored: Restored | None = problem.restored
        if self.restored is not None:
            self.add_note(f"previous model: {self.restored}")
        for title, texts in (("last output of the server", self.log_tail), ("story", self.story)):
            if texts:
                self.add_note("\n".join([f"{title}:", *(f"  {text}" for text in texts[-8:])]))

    @classmethod
    def because(
        cls,
        message: str,
        *,
        field: str | None = None,
        reason: str | None = None,
        log_tail: tuple[str, ...] = (),
    ) -> Self:
        """Build an error of this class."""
        return cls(Problem(cls.category, message, field, log_tail=log_tail, reason=reason))

    def __str__(self) -> str:
        return self.message


CLASSES[OrchestratorError.category] = OrchestratorError


@contextlib.contextmanager
def naming(names: PathNames) -> Iterator[None]:
    """Add public names of local paths to every error raised inside."""
    try:
        yield
    except OrchestratorError as error:
        error.problem = replace(error.problem, names=(*error.problem.names, *names))
        raise


class InvalidRequest(OrchestratorError, ValueError):
    _row = "invalid_request", 400, "A setting cannot be used"


class RefusedArgument(InvalidRequest):
    _row = "refused_argument", 400, "A llama-server flag is refused"


class InvalidModel(InvalidRequest):
    _row = "invalid_model", 400, "The model file cannot be used"


class WrongKind(InvalidRequest):
    _row = "wrong_kind", 400, "The running server is of another kind"


class InvalidCatalogue(InvalidRequest):
    _row = "invalid_catalogue", 400, "The catalogue has a mistake"


class MalformedRequest(InvalidRequest):
    _row = "malformed", 422, "The request is malformed"


class ModelNotFound(OrchestratorError):
    _row = "model_not_found", 404, "Model not found"


class TooLarge(OrchestratorError):
    _row = "too_large", 507, "The model does not fit"


class TooManyWaiting(OrchestratorError):
    _row = "too_many_waiting", 429, "Too many requests wait"


class NameTaken(OrchestratorError):
    _row = "name_taken", 409, "That name is taken"


class UnknownGeneration(OrchestratorError):
    _row = "unknown_generation", 404, "No such load"


class Interrupted(OrchestratorError):
    _row = "interrupted", 409, "The load ended before the model was loaded"


class Superseded(Interrupted):
    _row = "superseded", 409, "Superseded by a newer load"


class Cancelled(Interrupted):
    _row = "cancelled", 409, "Cancelled"


class Busy(OrchestratorError):
    _row = "busy", 409, "Another load is in flight"


class ServerStartFailed(OrchestratorError):
    _row = "server_start_failed", 424, "The server did not start"


class ServerUnavailable(ServerStartFailed):
    _row = "server_unavailable", 424, "No usable llama-server"


class HubError(OrchestratorError):
    _row = "hub_error", 502, "The Hub did not serve the model"


class HubUnreachable(HubError):
    _row = "hub_unreachable", 502, "The Hub cannot be reached"


class HubRateLimited(HubError):
    _row = "hub_rate_limited", 503, "Too many requests to the Hub"


class HubGated(HubError):
    _row = "hub_gated", 403, "The model is gated"


class HubUnauthorized(HubError):
    _row = "hub_unauthorized", 403, "The Hub does not accept the token"


class HubCorrupt(HubError):
    _row = "hub_corrupt", 502, "The Hub sent damaged data"


class DiskFull(OrchestratorError):
    _row = "disk_full", 507, "Not enough disk space"


class TimedOut(OrchestratorError):
    _row = "timed_out", 504, "Timed out"


class Stalled(TimedOut):
    _row = "stalled", 504, "No progress"


class DeadlineExceeded(TimedOut):
    _row = "deadline", 504, "Deadline exceeded"


class Unavailable(OrchestratorError):
    _row = "unavailable", 503, "Unavailable"


class NotLoaded(Unavailable):
    _row = "not_loaded", 503, "No model is loaded"


class ShuttingDown(Unavailable):
    _row = "shutting_down", 503, "Shutting down"


class ServerExited(Unavailable):
    _row = "server_exited", 503, "The server exited"


class Unreachable(Unavailable):
    _row = "unreachable", 503, "No orchestrator there"


class WrongProcess(Unavailable):
    _row = "wrong_process", 503, "The orchestrator belongs to another process"


class SlotOccupied(Unavailable):
    _row = "slot_occupied", 503, "A server of this slot could not be stopped"


class SlotOwned(OrchestratorError):
    _row = "slot_owned", 409, "Another orchestrator owns this slot"


class StateDirError(OrchestratorError):
    _row = "state_dir", 500, "The state directory cannot be used"


class CacheDirError(OrchestratorError):
    _row = "cache_dir", 500, "The model cache cannot be used"


@contextlib.contextmanager
def no_thread_as_error() -> Iterator[None]:
    """Raise Unavailable for a thread that could not be started."""
    try:
        yield
    except NoThread as error:
        raise problem_of(error).error() from error


def problem_of(error: BaseException) -> Problem:
    """Return what an exception says to callers."""
    if isinstance(error, OrchestratorError):
        return error.problem
    if isinstance(error, NoThread):
        return Problem(Unavailable.category, str(error))
    return Problem("internal", f"{type(error).__name__}: {error}")
