"""The HTTP API, for FastAPI (extra `http`): `create_app` and `router`.

Everything here translates between HTTP and `AsyncOrchestrator`; nothing is decided here. Names are
imported on first use, so that this package can be imported without FastAPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.http.app import add_error_handlers, create_app, router
    from orchestrator.http.passthrough import PassThrough

__all__ = ["PassThrough", "add_error_handlers", "create_app", "router"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from orchestrator.http import app
    except ModuleNotFoundError as error:
        if (missing := error.name or "").startswith("orchestrator"):
            raise
        install = 'pip install "llama-orchestrator[http]"'
        message = f"orchestrator.http needs {missing}: {install}"
        raise ModuleNotFoundError(message, name=error.name) from error

    return getattr(app, name)


def __dir__() -> list[str]:
    return __all__
