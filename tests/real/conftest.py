"""Orchestrators over the real llama.cpp, for the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import Orchestrator


@pytest.fixture
def orch(talking_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    with Orchestrator(llama_server=talking_server, state_dir=state_dir) as orchestrator:
        yield orchestrator


@pytest.fixture(params=["external", "embedded"])
def either(
    request: pytest.FixtureRequest, talking_server: str, state_dir: Path
) -> Iterator[Orchestrator]:
    """Over each kind of server."""
    server = {"external": talking_server, "embedded": "embedded"}[request.param]
    with Orchestrator(llama_server=server, state_dir=state_dir) as orchestrator:
        yield orchestrator
