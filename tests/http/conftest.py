"""A real uvicorn on a port of its own, and a llama.cpp server that waits at a gate.

The gate makes "while it loads" last as long as a test needs: the server process is there, and goes
on to be a real server when the gate is opened.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.http import create_app
from tests.kit.http import (
    Serve,
    serving,
)


@pytest.fixture
def serve(state_dir: Path) -> Serve:
    """Serve an orchestrator of this test's own."""

    def start(
        llama_server: str = "embedded", **options: Any
    ) -> AbstractContextManager[httpx.Client]:
        return serving(create_app(llama_server=llama_server, state_dir=state_dir, **options))

    return start
