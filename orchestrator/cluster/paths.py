"""Which replicas a path is for: a table, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

LISTING: Final = "/api/models"
REPLICAS: Final = "/api/replicas"
_LISTS: Final = frozenset({"/v1/models", "/models", LISTING})
_ROUTER: Final = "/models/load"


@dataclass(frozen=True, slots=True)
class ByBody:
    """The replica for the model that the body names."""


@dataclass(frozen=True, slots=True)
class ByName:
    """The replica for this model; None is the default."""

    name: str | None


@dataclass(frozen=True, slots=True)
class Everywhere:
    """All replicas: what changes a catalogue, or unloads a model wherever it is."""


@dataclass(frozen=True, slots=True)
class Merged:
    """All replicas, and their lists of models become one."""


@dataclass(frozen=True, slots=True)
class Named:
    """The replica that the query names; the only one needs no name."""


@dataclass(frozen=True, slots=True)
class Own:
    """The front itself."""


Where = ByBody | ByName | Everywhere | Merged | Named | Own


def where(method: str, path: str) -> Where | None:
    """Return whom a request is for; None if no route has this path."""
    reads = method in ("GET", "HEAD")
    if path in ("/healthz", "/readyz", REPLICAS):
        return Own()
    if path.rstrip("/") in _LISTS and reads:
        return Merged()
    if path.startswith("/v1/models/") and reads:
        return ByName(unquote(path.removeprefix("/v1/models/")))
    if path.startswith("/v1/") or path == _ROUTER:
        return ByBody()
    if path.startswith(f"{LISTING}/"):
        name, _, rest = path.removeprefix(f"{LISTING}/").partition("/")
        return Everywhere() if method == "DELETE" or rest == "unload" else ByName(unquote(name))
    if path in (LISTING, "/models/unload", "/api/catalogue", "/api/inference/unload"):
        return Everywhere()
    if path.startswith("/api/inference/"):
        return ByName(None)
    return Named() if path.startswith("/api/") or path == "/metrics" else None
