"""Models of the OpenAPI document, from the library's own classes.

The body of a load is made from the rows of its settings, and `LoadRequest` checks it; the models of
the small bodies check them. Answers are the library's dataclasses as pydantic reads them.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field, create_model

from orchestrator import errors
from orchestrator.machine.plan import Plan
from orchestrator.runtime.answers import LoadOutcome, LoadProgress, PastLoad
from orchestrator.settings.fields import SETTINGS, types


class Body(BaseModel, extra="forbid", strict=True, protected_namespaces=()):
    """A request body: known fields only, and no value is converted."""


def body_of_settings(title: str, *names: str) -> type[BaseModel]:
    """Return the body that has these fields of a load."""
    members: dict[str, Any] = {}
    for name in names:
        row = SETTINGS[name]
        least, greatest = row.bounds or (None, None)
        field = Field(
            ... if name == "model_path" else row.default,
            description=row.help,
            ge=least,
            le=greatest,
            json_schema_extra={"writeOnly": True} if row.is_secret else None,
        )
        members[name] = types()[name], field
    return create_model(title, __base__=Body, **members)


LoadBody: Final = body_of_settings("LoadBody", *SETTINGS)
VariantsBody: Final = body_of_settings("VariantsBody", "model_path", "revision", "hf_token")


class UnloadBody(Body):
    model_path: str | None = Field(None, description="unload only this model; null = any")
    cut: bool = Field(default=False, description="wait for no request that uses the server")


class CancelBody(Body):
    """Exactly one of the two."""

    load_request_id: str | None = None
    generation: int | None = None


Accepted: Final = create_model("Accepted", generation=(int, ...))
Logs: Final = create_model("Logs", lines=(list[str], ...))
Loads: Final = create_model("Loads", __doc__="Newest first.", loads=(list[PastLoad], ...))


class LoadState(BaseModel):
    """`state` is where the load is, or where it ended: Healthy or Idle."""

    generation: int
    state: str
    outcome: LoadOutcome | errors.Problem | None = None


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    """RFC 9457; members without a value are left out."""

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


class OpenAIErrorMembers(BaseModel):
    """`code` is the category of the problem, and `param` its field."""

    message: str
    type: str
    code: str
    param: str | None = None


class OpenAIError(BaseModel):
    """A failure below `/v1`."""

    error: OpenAIErrorMembers


class Restored(BaseModel):
    """What became of the model that ran before a failure."""

    status: str
    generation: int
    model_path: str
    gguf_variant: str | None
    problem: Problem | None = None


_MODEL: Final = {"model_path": "unsloth/Qwen3-0.6B-GGUF", "gguf_variant": "Q4_K_M"}
_SET: Final = {"cache_type_kv": "q8_0", "llama_extra_args": ["--top-k", "20"]}
_WHY: Final = {"field": "max_seq_length", "running": 4096, "requested": 8192}
EXAMPLES: Final[dict[type, dict[str, Any]]] = {
    LoadBody: {**_MODEL, "max_seq_length": 8192, **_SET},
    CancelBody: {"load_request_id": "apply-17"},
    LoadOutcome: {
        "status": "loaded",
        "generation": 7,
        "joined": False,
        **_MODEL,
        "revision": "50968a4468ef4233ed78cd7c3de230dd1d61a56b",
        "pid": 4242,
        "base_url": "http://127.0.0.1:36017",
        "context_length": 8192,
        "requested_context_length": 8192,
        "speculative_type": "off",
        **_SET,
        "is_vision": False,
        "reload_reasons": [_WHY],
        "timings_s": {"kill": 0.1, "download": 0.2, "spawn": 0.1, "health": 1.9, "total": 2.3},
    },
    Plan: {"action": "reload", "reload_reasons": [_WHY], "argv": ["llama-server", "-m", "a.gguf"]},
    LoadProgress: {"phase": "loading", "bytes_done": 6000, "bytes_total": 8000, "fraction": 0.75},
    Problem: errors.RefusedArgument.because(
        "--port is refused: the orchestrator owns the server's address", field="llama_extra_args"
    ).problem.as_dict(),
}
