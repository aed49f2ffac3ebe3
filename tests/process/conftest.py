"""Fixtures of the tests on real processes: a fake server, orchestrators, hosts, models."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator
from tests.kit.process.servers import servers_of
from tests.kit.process.support import Fake, Host, Make, kill


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    """A fake llama-server; fails the test if anything it ever started outlives it."""
    server = Fake(tmp_path / "fake")
    yield server
    left = server.living()
    for pid in left:
        kill(pid)
    assert not left, f"left behind: {[n for n in server.notes() if n.pid in left]}"


@pytest.fixture
def model_a(tiny_model: str, tmp_path: Path) -> str:
    """A model of this test's own, so that it may be damaged."""
    return str(shutil.copy(tiny_model, tmp_path / "a.gguf"))


@pytest.fixture
def model_b(other_model: str, tmp_path: Path) -> str:
    return str(shutil.copy(other_model, tmp_path / "b.gguf"))


@pytest.fixture
def make(fake: Fake, state_dir: Path) -> Iterator[Make]:
    """Make orchestrators over the fake server; they are closed before anything is checked."""
    made: list[Orchestrator] = []

    def build(**settings: Any) -> Orchestrator:
        given: dict[str, Any] = {
            "llama_server": fake.path,
            "state_dir": state_dir,
            "server_env": fake.env,
        }
        orch = Orchestrator(**(given | settings))
        made.append(orch)
        return orch

    yield build
    for orch in made:
        orch.close()


@pytest.fixture
def orch(make: Make) -> Orchestrator:
    """An orchestrator over the fake server, with everything else as it comes."""
    return make()


@pytest.fixture
def host(fake: Fake, state_dir: Path, model_a: str) -> Iterator[Callable[..., Host]]:
    """Start hosts; see `Host`. They are gone before anything is checked."""
    hosts: list[Host] = []

    def start(program: str, *, server: str | None = None) -> Host:
        hosts.append(
            Host(
                program,
                server=server or fake.path,
                state_dir=state_dir,
                env=fake.env,
                model=model_a,
            )
        )
        return hosts[-1]

    yield start
    for started in hosts:
        started.close()
    ends = time.monotonic() + 10  # what a guardian may need, and more; others complain after that
    while hosts and servers_of(state_dir) and time.monotonic() < ends:
        time.sleep(0.01)
