"""A pool on a real uvicorn, and what its answers say."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import AsyncModelPool
from orchestrator.http import create_app
from tests.kit.http import serving
from tests.kit.process import echo_server, support

MODELS = "/api/models"
ServePool = Callable[..., AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def serving_pool(
    catalogue: Any, *, app: dict[str, Any] | None = None, **options: Any
) -> Iterator[httpx.Client]:
    """Serve a pool; `app` are options of `create_app`."""
    pool = AsyncModelPool(catalogue, **options)
    with serving(create_app(pool=pool, **(app or {}))) as client:
        yield client


def catalogue_of(
    files: dict[str, str], pool: dict[str, Any] | None = None, **changed: dict[str, Any]
) -> dict[str, Any]:
    """Return a catalogue of some files by name, with changes to single entries."""
    settings = {"memory": "1 GiB", "min_resident_s": 0, "max_wait_s": 0.5, **(pool or {})}
    models = {
        name: {"model_path": path, "memory": "100 MiB", **changed.get(name, {})}
        for name, path in files.items()
    }
    return {"pool": settings, "models": models}


def model(client: httpx.Client, name: str) -> dict[str, Any]:
    """Return what the pool says about a model."""
    answer = client.get(f"{MODELS}/{name}")
    assert answer.status_code == 200, answer.text
    members: dict[str, Any] = answer.json()
    return members


def until_model(
    client: httpx.Client, name: str, holds: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Poll a model until `holds` returns true for it, and return it."""
    found: dict[str, Any] = {}

    def look() -> bool:
        found.update(model(client, name))
        return bool(holds(found))

    try:
        support.until(look, f"{name} in the right state")
    except pytest.fail.Exception:
        pytest.fail(f"{name} does not come into the right state: {found}")
    return found


def write_echo_server(folder: Path) -> str:
    """Write the program of `echo_server.py`; return its path."""
    program = folder / "echo-llama-server"
    program.write_text(f"#!{sys.executable} -IS\n" + Path(echo_server.__file__).read_text())
    program.chmod(0o755)
    return str(program)
