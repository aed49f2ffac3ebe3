"""What OpenAPI says of bodies and answers, from the library's own classes.

The body of a load is made from the rows of its settings and checked by `LoadRequest`; the small
bodies are checked by these models. Answers are the library's dataclasses as pydantic reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, create_model

from orchestrator import errors
from orchestrator.machine.plan import Plan
from orchestrator.runtime.answers import LoadOutcome, LoadProgress, PastLoad
from orchestrator.settings.fields import SETTINGS, types


class Body(BaseModel):
    """A body that is checked: known fields only, and nothing converted."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=()
    )


def _of_settings(title: str, *names: str) -> type[BaseModel]:
    """Return a body of these settings; what they may be in full is said by their checks."""
    members: dict[str, Any] = {}
    for name in names:
        row = SETTINGS[name]
        extra: dict[str, Any] | None = {"writeOnly": True} if row.is_secret else None
        members[name] = (
            types()[name],
            Field(
                ... if name == "model_path" else row.default,
                description=row.help,
                ge=row.least,
                le=row.most,
                json_schema_extra=extra,
            ),
        )
    return create_model(title, __base__=Body, **members)


LoadBody: Final = _of_settings("LoadBody", *SETTINGS)
VariantsBody: Final = _of_settings("VariantsBody", "model_path", "revision", "hf_token")


class UnloadBody(Body):
    model_path: str | None = Field(None, description="unload only this model; null = whatever runs")


class CancelBody(Body):
    """Exactly one of the two."""

    load_request_id: str | None = None
    generation: int | None = None


@dataclass
class Accepted:
    generation: int


class LoadState(BaseModel):
    """`state` is where this load is, or where it ended: Healthy or Idle."""

    generation: int
    state: str
    outcome: LoadOutcome | errors.Problem | None = None


@dataclass
class Loads:
    """Newest first."""

    loads: list[PastLoad]


@dataclass
class Logs:
    lines: list[str]


@dataclass
class Health:
    status: str


class Problem(BaseModel):
    """RFC 9457, made of an `errors.Problem`; members without a value are left out."""

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


class Restored(BaseModel):
    """What became of the model that ran before a failure."""

    status: str
    generation: int
    model_path: str
    gguf_variant: str | None
    problem: Problem | None = None


_REASON: Final = {"field": "max_seq_length", "running": 4096, "requested": 8192}
EXAMPLES: Final[dict[type, dict[str, Any]]] = {
    LoadBody: {
        "model_path": "unsloth/Qwen3-0.6B-GGUF",
        "gguf_variant": "Q4_K_M",
        "max_seq_length": 8192,
        "cache_type_kv": "q8_0",
        "llama_extra_args": ["--top-k", "20"],
    },
    CancelBody: {"load_request_id": "apply-17"},
    LoadOutcome: {
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
        "reload_reasons": [_REASON],
        "timings_s": {
            "kill": 0.004,
            "download": 0.011,
            "spawn": 0.002,
            "health": 1.9,
            "total": 1.917,
        },
    },
    Plan: {
        "action": "reload",
        "reload_reasons": [_REASON],
        "argv": ["llama-server", "-m", "model.gguf", "--host", "127.0.0.1", "--port", "0"],
    },
    LoadProgress: {
        "phase": "downloading",
        "bytes_done": 268435456,
        "bytes_total": 396705472,
        "fraction": 0.68,
    },
    Problem: {
        "type": "about:blank",
        "title": "A llama-server flag is refused",
        "status": 400,
        "detail": "--port is refused: the orchestrator owns the server's address",
        "category": "refused_argument",
        "field": "llama_extra_args",
    },
}
"""People copy examples before they read anything else."""
