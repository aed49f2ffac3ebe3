"""What the bodies look like, for OpenAPI only: field names and types of the contract.

Nothing is validated or converted by these models. Requests go through `LoadRequest`, which refuses
instead of coercing; answers are the views' own `as_dict`. A test compares the names.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field


def _example(**members: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [members]})


_LOADED: Final = {
    "status": "loaded",
    "generation": 7,
    "joined": False,
    "model_path": "unsloth/Qwen3-0.6B-GGUF",
    "gguf_variant": "Q4_K_M",
    "revision": "50968a4468ef4233ed78cd7c3de230dd1d61a56b",
    "pid": 4242,
    "base_url": "http://127.0.0.1:36017",
    "context_length": 8192,
    "requested_context_length": 8192,
    "cache_type_kv": "q8_0",
    "speculative_type": "off",
    "llama_extra_args": ["--top-k", "20"],
    "is_vision": False,
    "reload_reasons": [{"field": "max_seq_length", "running": 4096, "requested": 8192}],
    "timings_s": {"kill": 0.004, "download": 0.011, "spawn": 0.002, "health": 1.9, "total": 1.917},
}


class _Body(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", protected_namespaces=())


class LoadBody(_Body):
    """What to load, and how. Unknown fields are refused."""

    model_config: ClassVar[ConfigDict] = _example(
        model_path="unsloth/Qwen3-0.6B-GGUF",
        gguf_variant="Q4_K_M",
        max_seq_length=8192,
        cache_type_kv="q8_0",
        llama_extra_args=["--top-k", "20"],
    )

    model_path: str = Field(description="a .gguf file, a folder with one, or owner/name[:VARIANT]")
    gguf_variant: str | None = Field(None, description="quant label, or a path inside the repo")
    revision: str | None = None
    hf_token: str | None = Field(None, json_schema_extra={"writeOnly": True})
    max_seq_length: int = Field(0, ge=0, description="context in tokens; 0 = Auto")
    cache_type_kv: str | None = None
    speculative_type: str | None = None
    chat_template_override: str | None = None
    llama_extra_args: list[str] | None = Field(
        None, description="llama-server flags; null = inherit, [] = clear"
    )
    mmproj_path: str | None = None
    n_parallel: int | None = Field(None, ge=1, le=64)
    force_reload: bool = False
    on_busy: Literal["supersede", "queue", "reject"] = "supersede"
    load_request_id: str | None = None
    prefetch: bool = False
    restore_previous: bool = False
    idle_ttl_s: float | None = None
    pinned: bool = False
    stall_timeout_s: float = 600.0
    deadline_s: float | None = None


class VariantsBody(_Body):
    model_path: str = Field(description="as of a load: file, folder, or owner/name")
    revision: str | None = None
    hf_token: str | None = Field(None, json_schema_extra={"writeOnly": True})


class UnloadBody(_Body):
    model_path: str | None = Field(None, description="unload only this model; null = whatever runs")


class CancelBody(_Body):
    """Exactly one of the two."""

    model_config: ClassVar[ConfigDict] = _example(load_request_id="apply-17")

    load_request_id: str | None = None
    generation: int | None = None


class _Answer(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(protected_namespaces=())


class ReloadReason(_Answer):
    field: str
    running: Any
    requested: Any


class Timings(_Answer):
    """Seconds; null for a phase the load did not enter."""

    kill: float | None
    download: float | None
    spawn: float | None
    health: float | None
    total: float


class LoadAnswer(_Answer):
    model_config: ClassVar[ConfigDict] = _example(**_LOADED)

    status: Literal["loaded", "already_loaded"]
    generation: int
    joined: bool
    model_path: str
    gguf_variant: str | None
    revision: str | None = None
    note: str | None = None
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
    chat_template_override: str | None = None
    mmproj_path: str | None = None
    n_parallel: int | None = None
    idle_ttl_s: float | None = None
    pinned: bool = False


class AcceptedAnswer(_Answer):
    generation: int


class ProblemAnswer(_Answer):
    """RFC 9457; members without a value are left out."""

    model_config: ClassVar[ConfigDict] = _example(
        type="about:blank",
        title="A llama-server flag is refused",
        status=400,
        detail="--port is refused: the orchestrator owns the server's address",
        category="refused_argument",
        field="llama_extra_args",
    )

    type: str
    title: str
    status: int
    detail: str
    category: str
    field: str | None = None
    generation: int | None = None
    reason: str | None = None
    retry_after_s: float | None = None
    log_tail: list[str] | None = None
    story: list[str] | None = None
    restored: Restored | None = None


class Restored(_Answer):
    """What became of the model that ran before a failure."""

    status: Literal["loaded", "failed"]
    generation: int
    model_path: str
    gguf_variant: str | None
    problem: ProblemAnswer | None = None


class LoadState(_Answer):
    """`state` is where this load is, or where it ended: Healthy or Idle."""

    generation: int
    state: str
    outcome: LoadAnswer | ProblemAnswer | None = None


class PastLoad(LoadState):
    """Times in seconds, `accepted_at` since 1970; `took_s` is null while it is in flight."""

    model_path: str
    gguf_variant: str | None
    accepted_at: float
    took_s: float | None
    timings_s: Timings


class LoadsAnswer(_Answer):
    """Newest first."""

    loads: list[PastLoad]


class Variant(_Answer):
    """`size_bytes` counts all its parts; `is_default` is what a load without a variant takes."""

    gguf_variant: str | None
    size_bytes: int
    is_default: bool
    is_cached: bool


class VariantsAnswer(_Answer):
    """The preferred one first."""

    model_path: str
    variants: list[Variant]


class OptionsAnswer(_Answer):
    """What this server binary accepts."""

    cache_type_kv: list[str]
    speculative_type: list[str]


class UnloadAnswer(_Answer):
    status: Literal["unloaded", "not_loaded"]


class CancelAnswer(_Answer):
    cancelled: bool


class PlanAnswer(_Answer):
    model_config: ClassVar[ConfigDict] = _example(
        action="reload",
        reload_reasons=_LOADED["reload_reasons"],
        argv=["llama-server", "-m", "model.gguf", "--host", "127.0.0.1", "--port", "0"],
    )

    action: Literal["none", "load", "reload"]
    reload_reasons: list[ReloadReason]
    argv: list[str]


class Loading(_Answer):
    generation: int
    model_path: str
    gguf_variant: str | None
    phase: str | None
    callers: int
    queued: int


class Exit(_Answer):
    pid: int
    returncode: int | None
    log_tail: list[str]


class Prefetching(_Answer):
    """A download while something else may run."""

    model_path: str
    gguf_variant: str | None
    bytes_done: int
    bytes_total: int | None


class Recovery(_Answer):
    """A server that ended by itself: it is started again, or not for a while."""

    model_path: str
    phase: Literal["waiting", "trying", "cooling_down"]
    failures: int
    left_s: float


class StatusAnswer(_Answer):
    state: Literal["Idle", "Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    generation: int
    loaded: LoadAnswer | None
    loading: Loading | None
    last_error: ProblemAnswer | None
    last_exit: Exit | None
    since: float
    uptime_s: float
    occupied_by: int | None
    recovery: Recovery | None
    story: list[str]
    prefetching: list[Prefetching]
    idle_unload_in_s: float | None


class ProgressAnswer(_Answer):
    model_config: ClassVar[ConfigDict] = _example(
        phase="downloading", bytes_done=268435456, bytes_total=396705472, fraction=0.68
    )

    phase: Literal["killing", "downloading", "spawning", "loading", "ready"] | None
    bytes_done: int | None
    bytes_total: int | None
    fraction: float | None


class LogsAnswer(_Answer):
    lines: list[str]


class HealthAnswer(_Answer):
    status: str
