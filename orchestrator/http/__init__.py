"""The HTTP API, for FastAPI (extra `http`): `create_app` and `router`.

Everything here translates between HTTP and `AsyncOrchestrator`; nothing is decided here. Names are
imported on first use, so that this package can be imported without FastAPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.http.app import create_app, router
    from orchestrator.http.passthrough import PassThrough

__all__ = ["PassThrough", "create_app", "router"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.http import app

    return getattr(app, name)


def __dir__() -> list[str]:
    return __all__
