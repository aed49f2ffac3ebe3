"""What calls return and `status` reports: frozen data, made from the answers of the machine.

Field names are the public vocabulary; `as_dict` is the body that HTTP and `--json` send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

from orchestrator.base.paths import PathNames
from orchestrator.base.record import Record, parsed
from orchestrator.base.tokens import Generation
from orchestrator.errors import Problem
from orchestrator.machine.commands import LeaseGranted, Loaded, Timings, Unloaded
from orchestrator.machine.facts import Exit
from orchestrator.machine.states import State
from orchestrator.models.on_disk import ModelOnDisk
from orchestrator.models.variants import Variant
from orchestrator.server.prompts import Counts
from orchestrator.settings.fields import ECHOED, SETTINGS, EchoedFields, Kind
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.memory import Memory
from orchestrator.settings.request import LoadRequest
from orchestrator.settings.target import ReloadReason


@dataclass(frozen=True, slots=True)
class LoadOutcome(Record, EchoedFields):
    """The result of a load, and `loaded` in the status.

    `as_dict` leaves out `adopted`, `memory`, `evicted` and the settings of `EchoedFields` that
    have their default.

    Attributes:
        status: `loaded`, or `already_loaded` if the running server already matched.
        joined: This call shared the load of an earlier call for the same target.
        base_url: URL of the server, e.g. `http://127.0.0.1:36017`.
        context_length: Tokens per slot as the server reports them; None if it does not.
        requested_context_length: `max_seq_length` of the request; 0 = Auto.
        revision: Commit of a Hub model.
        note: A remark, e.g. that the Hub could not be asked for a newer revision.
        llama_extra_args: The effective ones; a request with this list means the same.
        timings_s: Seconds in `kill`, `download`, `spawn`, `health`, and `total`.
        adopted: The server was started by an earlier owner of the slot.
        memory: What the server takes, MiB; None if nothing is known of it.
        evicted: In a pool: the models that were stopped for this one.
    """

    status: Literal["loaded", "already_loaded"]
    generation: Generation
    joined: bool
    model_path: str
    gguf_variant: str | None
    revision: str | None = field(default=None, kw_only=True)
    note: str | None = field(default=None, kw_only=True)
    adopted: bool = field(default=False, kw_only=True)
    memory: Memory | None = field(default=None, kw_only=True)
    evicted: list[str] | None = field(default=None, kw_only=True)
    pid: int
    base_url: str
    context_length: int | None
    requested_context_length: int
    cache_type_kv: str | None
    speculative_type: str
    llama_extra_args: list[str]
    is_vision: bool
    reload_reasons: list[ReloadReason]
    timings_s: Timings

    def as_dict(self) -> dict[str, Any]:
        members = Record.as_dict(self)
        members |= {name: members.pop(name) for name in ECHOED}  # to the end
        return {n: value for n, value in members.items() if value != _OMITTED.get(n, _SENT)}

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        return parsed(cls, {**_OMITTED, **members})


_SENT: Final = object()
_OMITTED: Final = {
    "revision": None,
    "note": None,
    "adopted": False,
    "memory": None,
    "evicted": None,
    **{n: SETTINGS[n].default for n in ECHOED},
}


@dataclass(frozen=True, slots=True)
class Loading(Record):
    """The load in flight: its target, its phase, its callers, and how many loads are queued."""

    generation: Generation
    model_path: str
    gguf_variant: str | None
    phase: str | None
    callers: int
    queued: int


@dataclass(frozen=True, slots=True)
class RecoveryStatus(Record):
    """The restart of a server that exited by itself.

    Attributes:
        phase: `waiting` before a restart, `trying` during one, or `cooling_down`: no restart.
        failures: Failures in a row.
        left_s: Seconds until the wait or the cool-down ends; 0 while trying.
    """

    model_path: str
    phase: Literal["waiting", "trying", "cooling_down"]
    failures: int
    left_s: float


@dataclass(frozen=True, slots=True)
class Prefetching(Record):
    """A download of `prefetch`."""

    model_path: str
    gguf_variant: str | None
    bytes_done: int
    bytes_total: int | None


@dataclass(frozen=True, slots=True)
class PromptsStatus(Record):
    """What `keep_prompts` has gained since the start, in tokens of prompts.

    Attributes:
        tokens_saved: Before a server was stopped.
        tokens_restored: When its target came back.
        tokens_reused: Of these, what the first answer through `/v1` did not compute anew.
    """

    tokens_saved: int
    tokens_restored: int
    tokens_reused: int


@dataclass(frozen=True, slots=True)
class Status(Record):
    """The state of an orchestrator at one moment.

    Attributes:
        generation: The load in flight, else the loaded one, else the last one.
        since: When the present state was entered, Unix seconds.
        uptime_s: Seconds in the present state.
        occupied_by: Pid of a process that could not be killed and keeps the slot occupied.
        recovery: The restart of a server that exited by itself, if one is due or suspended.
        story: The last transitions, oldest first.
        prefetching: The downloads of `prefetch`.
        idle_unload_in_s: Seconds until the idle model is unloaded; None while it is in use or if
            it is never unloaded.
        leases: Requests that use the server now.
        draining_left_s: Seconds for which the swap or unload that has begun still waits for them;
            None while it does not.
        prompts: The gain of `keep_prompts`; None without it.
    """

    state: State
    generation: Generation
    loaded: LoadOutcome | None
    loading: Loading | None
    last_error: Problem | None
    last_exit: Exit | None
    since: float
    uptime_s: float
    occupied_by: int | None
    recovery: RecoveryStatus | None
    story: tuple[str, ...]
    prefetching: tuple[Prefetching, ...] = ()
    idle_unload_in_s: float | None = None
    leases: int = 0
    draining_left_s: float | None = None
    prompts: PromptsStatus | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress(Record):
    """Progress of the load in flight.

    Attributes:
        bytes_done: Downloaded; while loading, read or paged in by the server; while another one
            ends, read ahead for it. Never decreases within a phase.
        fraction: None if it is unknown, also while a server that has read all is not yet ready.
    """

    phase: str | None
    bytes_done: int | None
    bytes_total: int | None
    fraction: float | None


@dataclass(frozen=True, slots=True)
class PrefetchOutcome(Record):
    """A model whose files are all on disk.

    Attributes:
        revision: Commit of a Hub model.
        files: Paths of the weights, every shard, and of the projector, which is last.
    """

    model_path: str
    gguf_variant: str | None
    revision: str | None
    size_bytes: int
    files: list[str]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class PastLoad(Record):
    """A recent load, ended or in flight.

    Attributes:
        state: Its state now, or the one it ended in: Healthy or Idle.
        accepted_at: Unix seconds.
        took_s: Seconds until it ended; None while it is in flight.
        timings_s: Seconds in each phase that has ended.
        outcome: Its result or its problem; None, and not in `as_dict`, while it is in flight.
        request: What was asked for, without the token and what has its default: a load of this
            means the same again.
        names: Public names of local paths in its texts.
    """

    generation: Generation
    state: State
    model_path: str
    gguf_variant: str | None
    accepted_at: float
    took_s: float | None
    timings_s: Timings
    outcome: LoadOutcome | Problem | None = None
    request: dict[str, Any] = field(default_factory=dict, compare=False)
    names: PathNames = field(default=(), compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        members = Record.as_dict(self)
        if self.outcome is None:
            del members["outcome"]
        return members


@dataclass(frozen=True, slots=True)
class Variants(Record):
    """The variants of a model; the one that a load without `gguf_variant` picks is first."""

    model_path: str
    variants: list[Variant]


@dataclass(frozen=True, slots=True)
class OnDisk(Record):
    """The models that need no download, and the room for others.

    Attributes:
        free_bytes: Of the disk of the Hub's cache; None if it has no place.
        free_mib: Memory by device; empty if the server binary cannot say.
    """

    models: list[ModelOnDisk]
    free_bytes: int | None
    free_mib: dict[str, int]


@dataclass(frozen=True, slots=True)
class Options(Record):
    """The values that this server binary accepts for two settings."""

    cache_type_kv: list[str]
    speculative_type: list[str]


@dataclass(frozen=True, slots=True)
class LeasedServer(Record):
    """A server that is not stopped for another model while the lease is held.

    Attributes:
        api_key: Bearer token of a protected server; None if it takes every request.
        kind: What the server is for.
        model: The name of the model in answers, and for requests; None where it is not known.
    """

    base_url: str
    pid: int
    generation: Generation
    api_key: str | None = field(default=None, repr=False)
    kind: Kind = "chat"
    model: str | None = None


@dataclass(frozen=True, slots=True)
class UnloadOutcome(Record):
    """`unloaded`: it is gone, and the slot verified empty unless it was only queued. `not_loaded`:
    the named model was neither loaded nor loading.
    """

    status: Literal["unloaded", "not_loaded"]


def load_outcome(answer: Loaded) -> LoadOutcome:
    target, hub = answer.target, answer.target.model.hub
    return LoadOutcome(
        status="already_loaded" if answer.already else "loaded",
        generation=answer.generation,
        joined=answer.joined,
        model_path=target.request.model_path,
        gguf_variant=target.model.variant,
        revision=hub.commit if hub else None,
        note=hub.note if hub else None,
        adopted=answer.adopted,
        memory=answer.memory,
        pid=answer.child.pid,
        base_url=answer.server.base_url,
        context_length=answer.server.context_length,
        requested_context_length=target.request.max_seq_length,
        cache_type_kv=target.request.cache_type_kv,
        speculative_type=target.effective_speculative_type,
        llama_extra_args=list(target.extra_args),
        is_vision=answer.server.is_vision or target.is_vision,
        reload_reasons=list(answer.reload_reasons),
        timings_s=answer.timings,
        **{name: target.request.effective(name) for name in ECHOED},
    )


def prefetch_outcome(request: LoadRequest, files: ModelFiles) -> PrefetchOutcome:
    return PrefetchOutcome(
        request.model_path,
        files.variant,
        files.hub.commit if files.hub else None,
        files.size_bytes,
        [file.path for file in files.files],
        files.hub.note if files.hub else None,
    )


def unload_outcome(answer: Unloaded) -> UnloadOutcome:
    return UnloadOutcome("unloaded" if answer.changed else "not_loaded")


def prompts_status(counts: Counts) -> PromptsStatus:
    return PromptsStatus(counts.saved, counts.restored, counts.reused)


def leased_server(answer: LeaseGranted) -> LeasedServer:
    server, child, kind = answer.server, answer.child, answer.target.request.kind
    return LeasedServer(
        server.base_url,
        child.pid,
        child.generation,
        server.api_key,
        kind,
        answer.target.alias,
    )
