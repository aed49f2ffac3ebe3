"""An app of each test's own, on a real uvicorn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.http import create_app
from tests.kit.http import Serve, serving


@pytest.fixture
def serve(state_dir: Path) -> Serve:
    """Serve an app with these options; the state directory is the test's own."""

    def start(
        llama_server: str = "embedded", **options: Any
    ) -> AbstractContextManager[httpx.Client]:
        return serving(create_app(llama_server=llama_server, state_dir=state_dir, **options))

    return start
