"""Fixtures of the tests on real processes: a fake server, orchestrators, hosts, models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Orchestrator
from tests.kit.process.support import Fake, Host, Make, StartHost, kill, nothing_left, until


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    """A fake llama-server; fails the test if a process of it outlives the test."""
    server = Fake(tmp_path / "fake")
    yield server
    left = server.running()
    for pid in left:
        kill(pid)
    assert not left, f"left behind: {[n for n in server.entries() if n.pid in left]}"


@pytest.fixture
def model_a(tiny_model: str, tmp_path: Path) -> str:
    """A copy of the tiny model, which a test may damage."""
    return str(shutil.copy(tiny_model, tmp_path / "a.gguf"))


@pytest.fixture
def model_b(other_model: str, tmp_path: Path) -> str:
    return str(shutil.copy(other_model, tmp_path / "b.gguf"))


@pytest.fixture
def make(fake: Fake, state_dir: Path) -> Iterator[Make]:
    """Make orchestrators over the fake server; they are closed after the test."""
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
        orch.close(keep=False)


@pytest.fixture
def orch(make: Make) -> Orchestrator:
    """An orchestrator over the fake server with default settings."""
    return make()


@pytest.fixture
def real(llama_server: str, state_dir: Path) -> Iterator[Orchestrator]:
    """An orchestrator over the real llama-server."""
    with Orchestrator(llama_server=llama_server, state_dir=state_dir) as orch:
        yield orch


@pytest.fixture
def host(fake: Fake, state_dir: Path, model_a: str) -> Iterator[StartHost]:
    """Start hosts, see `Host`; they are killed after the test."""
    hosts: list[Host] = []

    def start(
        program: str, *, inside: tuple[str, ...] = (), server: str = fake.path, of: Fake = fake
    ) -> Host:
        hosts.append(
            Host(
                program,
                server=server,
                state_dir=state_dir,
                env=of.env,
                model=model_a,
                inside=inside,
            )
        )
        return hosts[-1]

    yield start
    for started in hosts:
        started.close()
    if hosts:  # one that is about to exit has no environment any more, by which it is found
        until(lambda: nothing_left(state_dir, fake), "the keepers empty the slot", 10)
