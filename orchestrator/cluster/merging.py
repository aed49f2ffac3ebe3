"""The answers of several replicas as one: pure, but for reading a response to its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import aiohttp
from starlette.responses import Response

from orchestrator.http.problems import AsciiJSON
from orchestrator.http.upstream import headers_back

_NOT_FOUND: Final = 404
_BEST: Final = ("loaded", "loading", "failed", "unloaded")
_STATES: Final = ("Healthy", "WaitingHealth", "Spawning", "Downloading", "Killing", "Idle")


async def whole(response: aiohttp.ClientResponse) -> Response:
    """Read a response to its end."""
    try:
        data = await response.read()
    finally:
        response.close()
    made = Response(data, response.status)
    own = [(name, value) for name, value in made.raw_headers if name == b"content-length"]
    made.raw_headers = [*headers_back(response, frozenset({b"content-length"})), *own]
    return made


def worst(answers: Sequence[Response]) -> Response:
    """Return the answer that says most: of a failure; least that there is no such model."""
    return max(answers, key=lambda one: (one.status_code != _NOT_FOUND, one.status_code))


def merged(path: str, answers: Sequence[Response]) -> Response:
    """Return lists of models as one list, in which a model is as it is where it does best."""
    failure = worst(answers)
    if failure.status_code >= 400:
        return failure
    bodies = [json.loads(bytes(one.body)) for one in answers]
    if len(bodies) == 1:
        return answers[0]
    return AsciiJSON(_status(bodies) if path.startswith("/api/") else _listing(bodies))


def _listing(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in (one for body in bodies for one in body["data"]):
        known = found.setdefault(one["id"], one)
        if _BEST.index(one["status"]["value"]) < _BEST.index(known["status"]["value"]):
            found[one["id"]] = one
    return {**bodies[0], "data": list(found.values())}


def _status(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `/api/models` of all: budgets and waiting requests are sums."""
    budget: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    waiting: dict[str, dict[str, Any]] = {}
    for body in bodies:
        for one in body["budget"]:
            _add(budget.setdefault(one["device"], {"device": one["device"]}), one, "_mib")
        for one in body["models"]:
            known = models.setdefault(one["name"], dict(one))
            if known == one:
                continue
            better = min(known, one, key=lambda model: _STATES.index(model["state"]))
            sums = {name: known[name] + one[name] for name in ("leases", "waiting")}
            models[one["name"]] = {**better, **sums}
        for one in body["waiting"]:
            known = waiting.setdefault(one["model"], {"model": one["model"], "count": 0})
            known["count"] += one["count"]
            known["oldest_s"] = max(one["oldest_s"], known.get("oldest_s", 0.0))
    return {
        **bodies[0],
        "budget": list(budget.values()),
        "models": list(models.values()),
        "waiting": list(waiting.values()),
    }


def _add(total: dict[str, Any], one: Mapping[str, Any], ending: str) -> None:
    for name, value in one.items():
        if name.endswith(ending):
            total[name] = total.get(name, 0) + value
