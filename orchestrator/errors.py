"""The exception tree. Every error names its category, and the field to change where there is one.

OrchestratorError
├── InvalidRequest            400  a setting that cannot be honoured
│   ├── RefusedArgument       400  a llama-server flag the orchestrator owns
│   ├── InvalidModel          400  empty, truncated or not a GGUF
│   ├── WrongKind             400  a route that a server of this `kind` does not answer
│   └── MalformedRequest      422  unknown field, wrong type
├── ModelNotFound             404
├── Interrupted               409  ended before its commit
│   ├── Superseded            409  by a newer load
│   └── Cancelled             409  by the user, an unload, or a caller that left
├── Busy                      409  another load is in flight and `on_busy` is "reject"
├── ServerStartFailed         424  the server did not become healthy
│   └── ServerUnavailable     424  no usable llama-server binary
├── HubError                  502  the Hub would not serve it
│   ├── HubUnreachable        502  no answer, or none that makes sense
│   ├── HubRateLimited        503  asked too often; says when to ask again
│   ├── HubGated              403  its terms have to be accepted first
│   ├── HubUnauthorized       403  the token is missing, wrong or not enough
│   └── HubCorrupt            502  what arrives is not what the Hub announced
├── DiskFull                  507  the model does not fit on the cache's volume
├── TimedOut                  504
│   ├── Stalled               504  no sign of progress for `stall_timeout_s`
│   └── DeadlineExceeded      504  `deadline_s` is over
├── Unavailable               503
│   ├── NotLoaded             503  no model is Healthy
│   ├── ShuttingDown          503
│   ├── ServerExited          503  the healthy server ended by itself
│   ├── WrongProcess          503  the orchestrator belongs to the parent of this fork
│   └── SlotOccupied          503  a server of this slot would not die
├── SlotOwned                 409  another orchestrator owns this slot
├── StateDirError             500  the slot's directory cannot be used
├── CacheDirError             500  the cache of models cannot be used
└── UnsupportedPlatform       500

`Problem` is the same as plain data: what the pure core passes around, what a status shows and
what HTTP sends as `application/problem+json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record


@dataclass(frozen=True, slots=True)
class Restored(Record):
    """What became of the model that ran before a failure.

    Attributes:
        generation: The load that brings it back.
        model_path: As it was asked for.
        gguf_variant: As it was resolved.
        problem: Why it could not be brought back; None when it runs again.
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
            return f"{self.model_path} runs again (generation {self.generation})"
        return f"{self.model_path} could not be brought back: {self.problem.message}"


@dataclass(frozen=True, slots=True)
class Problem(Record):
    """One failure as data.

    Attributes:
        category: Stable word from the tree above, e.g. `server_start_failed`.
        message: One sentence that says what happened and what to do.
        field: The request field or setting to change, if one is to blame.
        generation: The load it belongs to.
        log_tail: The last lines of the server's output, oldest first.
        reason: The classified cause within the category, e.g. `exited`.
        story: The last transitions before it happened, oldest first.
        retry_after_s: When asking again may help, seconds from when it was said.
        restored: What became of the model that ran before, if it was to come back.
        names: What paths in its texts are called where strangers see them.
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

    def error(self) -> OrchestratorError:
        """Return the exception of this problem's category, ready to be raised."""
        return _CLASSES.get(self.category, OrchestratorError)(self)

    def told(self, story: tuple[str, ...]) -> Problem:
        return replace(self, story=story)

    @property
    def status(self) -> int:
        """The HTTP status code of this category."""
        return _CLASSES.get(self.category, OrchestratorError).status

    def as_dict(self) -> dict[str, Any]:
        """RFC 9457 members; members without a value are left out."""
        cls = _CLASSES.get(self.category, OrchestratorError)
        members: dict[str, Any] = {
            "type": "about:blank",
            "title": cls.title,
            "status": cls.status,
            "detail": self.message,
            "category": self.category,
        }
        for name in ("field", "generation", "reason", "retry_after_s"):
            if (value := getattr(self, name)) is not None:
                members[name] = value
        for name in ("log_tail", "story"):
            if value := getattr(self, name):
                members[name] = list(value)
        if self.restored is not None:
            members["restored"] = self.restored.as_dict()
        return members


class OrchestratorError(Exception):
    """Base of every error this library raises on purpose."""

    category: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem: Problem = problem

    @classmethod
    def because(
        cls,
        message: str,
        *,
        field: str | None = None,
        generation: int | None = None,
        log_tail: tuple[str, ...] = (),
        reason: str | None = None,
    ) -> Self:
        """Build the error of this class from its parts."""
        return cls(
            Problem(
                cls.category,
                message,
                field=field,
                generation=generation,
                log_tail=log_tail,
                reason=reason,
            )
        )

    def naming(self, names: PathNames) -> Self:
        """Say what paths in its texts are called where strangers see them."""
        self.problem = replace(self.problem, names=(*self.problem.names, *names))
        return self

    @property
    def message(self) -> str:
        return self.problem.message

    @property
    def field(self) -> str | None:
        return self.problem.field

    @property
    def generation(self) -> int | None:
        return self.problem.generation

    @property
    def reason(self) -> str | None:
        return self.problem.reason

    @property
    def log_tail(self) -> tuple[str, ...]:
        return self.problem.log_tail

    @property
    def story(self) -> tuple[str, ...]:
        return self.problem.story

    @property
    def retry_after_s(self) -> float | None:
        return self.problem.retry_after_s

    @property
    def restored(self) -> Restored | None:
        return self.problem.restored

    def __str__(self) -> str:
        lines = [self.problem.message]
        if self.problem.restored is not None:
            lines += [f"  {self.problem.restored}"]
        if self.problem.log_tail:
            lines += ["  last output of the server:"]
            lines += [f"    {line}" for line in self.problem.log_tail[-8:]]
        if self.problem.story:
            lines += ["  story:"] + [f"    {line}" for line in self.problem.story[-8:]]
        return "\n".join(lines)


@contextlib.contextmanager
def naming(names: PathNames) -> Iterator[None]:
    """Have what goes wrong inside say what paths in its texts are called."""
    try:
        yield
    except OrchestratorError as error:
        error.naming(names)
        raise


class InvalidRequest(OrchestratorError, ValueError):
    category = "invalid_request"
    status = 400
    title = "A setting cannot be honoured"


class RefusedArgument(InvalidRequest):
    category = "refused_argument"
    title = "A llama-server flag is refused"


class InvalidModel(InvalidRequest):
    category = "invalid_model"
    title = "The model file cannot be used"


class WrongKind(InvalidRequest):
    category = "wrong_kind"
    title = "The server that runs is of another kind"


class MalformedRequest(InvalidRequest):
    category = "malformed"
    status = 422
    title = "The request is malformed"


class ModelNotFound(OrchestratorError):
    category = "model_not_found"
    status = 404
    title = "Model not found"


class Interrupted(OrchestratorError):
    category = "interrupted"
    status = 409
    title = "The load was ended before it was done"


class Superseded(Interrupted):
    category = "superseded"
    title = "Superseded by a newer load"


class Cancelled(Interrupted):
    category = "cancelled"
    title = "Cancelled"


class Busy(OrchestratorError):
    category = "busy"
    status = 409
    title = "Another load is in flight"


class ServerStartFailed(OrchestratorError):
    category = "server_start_failed"
    status = 424
    title = "The server did not start"


class ServerUnavailable(ServerStartFailed):
    category = "server_unavailable"
    title = "No usable llama-server"


class HubError(OrchestratorError):
    category = "hub_error"
    status = 502
    title = "The Hub did not serve the model"


class HubUnreachable(HubError):
    category = "hub_unreachable"
    title = "The Hub cannot be reached"


class HubRateLimited(HubError):
    category = "hub_rate_limited"
    status = 503
    title = "The Hub was asked too often"


class HubGated(HubError):
    category = "hub_gated"
    status = 403
    title = "The model is gated"


class HubUnauthorized(HubError):
    category = "hub_unauthorized"
    status = 403
    title = "The Hub does not accept the token"


class HubCorrupt(HubError):
    category = "hub_corrupt"
    title = "What the Hub sent is damaged"


class DiskFull(OrchestratorError):
    category = "disk_full"
    status = 507
    title = "Not enough disk"


class TimedOut(OrchestratorError):
    category = "timed_out"
    status = 504
    title = "Out of time"


class Stalled(TimedOut):
    category = "stalled"
    title = "No progress"


class DeadlineExceeded(TimedOut):
    category = "deadline"
    title = "Deadline exceeded"


class Unavailable(OrchestratorError):
    category = "unavailable"
    status = 503
    title = "Unavailable"


class NotLoaded(Unavailable):
    category = "not_loaded"
    title = "No model is loaded"


class ShuttingDown(Unavailable):
    category = "shutting_down"
    title = "Shutting down"


class ServerExited(Unavailable):
    category = "server_exited"
    title = "The server ended by itself"


class WrongProcess(Unavailable):
    category = "wrong_process"
    title = "The orchestrator belongs to another process"


class SlotOccupied(Unavailable):
    category = "slot_occupied"
    title = "A server of this slot would not die"


class SlotOwned(OrchestratorError):
    category = "slot_owned"
    status = 409
    title = "Another orchestrator owns this slot"


class StateDirError(OrchestratorError):
    category = "state_dir"
    title = "The slot's directory cannot be used"


class CacheDirError(OrchestratorError):
    category = "cache_dir"
    title = "The cache of models cannot be used"


class UnsupportedPlatform(OrchestratorError):
    category = "unsupported_platform"
    title = "Unsupported platform"


def _tree(cls: type[OrchestratorError]) -> dict[str, type[OrchestratorError]]:
    found = {cls.category: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


_CLASSES = _tree(OrchestratorError)
