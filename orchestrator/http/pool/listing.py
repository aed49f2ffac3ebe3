"""The models of a pool as OpenAI's API and llama-server's router list them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from orchestrator.http.pool.visible import Visible
from orchestrator.machine.states import State
from orchestrator.pool.pool import AsyncModelPool
from orchestrator.pool.status import ModelStatus

_OWNER: Final = "llama-orchestrator"
_CREATED: Final = int(time.time())  # the field is required, and means nothing here


def listing(pool: AsyncModelPool, seen: Visible) -> dict[str, Any]:
    """Return all names that requests may use, with what each model does now."""
    models = seen.status().models
    return {"object": "list", "data": [one for model in models for one in _names(pool, model)]}


def listed(pool: AsyncModelPool, seen: Visible, name: str) -> dict[str, Any]:
    """Return one of them. Raises ModelNotFound."""
    match = seen.match(name)
    return _one(name, value_of(pool, pool.model_status(match.entry.name)))


def _names(pool: AsyncModelPool, model: ModelStatus) -> Iterator[dict[str, Any]]:
    value = value_of(pool, model)
    for name in (model.name, *model.aliases, *(f"{model.name}:{one}" for one in model.presets)):
        yield _one(name, value)


def _one(name: str, value: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": _OWNER,
        "status": {"value": value},
    }


def value_of(pool: AsyncModelPool, model: ModelStatus) -> str:
    if model.state is State.HEALTHY:
        return "loaded"
    if model.waiting or pool.slot_status(model.name).loading is not None:
        return "loading"
    return "failed" if model.last_error is not None else "unloaded"
