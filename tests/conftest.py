"""Shared by every layer: a tiny model, the real llama-server, and a check that nothing is left.

The real llama-server comes from LLAMA_SERVER_PATH (`make llama-server` builds one). Tests that need
it are marked `external` and fail without it; they are never skipped.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.server import process_table
from orchestrator.server.slot import TOKEN_NAME


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights that the real server is ready with in about 20 ms."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_model(path)
    return str(path)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one, told from the first by its weights."""
    path = tmp_path_factory.mktemp("models") / "other.gguf"
    write_tiny_model(path, seed=1)
    return str(path)


@pytest.fixture(scope="session")
def llama_server() -> str:
    """The real llama-server."""
    path = os.environ.get("LLAMA_SERVER_PATH", "")
    assert os.access(path, os.X_OK), "set LLAMA_SERVER_PATH, or run `make llama-server`"
    return path


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A state directory of this test's own; fails the test if a server of it outlives it."""
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    yield directory
    left = servers_of(directory)
    for pid in left:
        psutil.Process(pid).kill()
    assert not left, f"servers left behind: {left}"


def servers_of(directory: Path) -> set[int]:
    """Every living process that carries a token of a slot in this state directory."""
    found = set()
    for pid, row in process_table.everyone().items():
        if row.is_zombie:
            continue
        try:
            token = psutil.Process(pid).environ().get(TOKEN_NAME, "")
        except (psutil.Error, OSError):
            continue
        if token.startswith(str(directory.resolve()) + os.sep):
            found.add(pid)
    return found


def pytest_configure() -> None:
    """What a shell starts in the background ignores SIGINT, what `nohup` starts ignores SIGHUP, and
    that is inherited: no test would reach anybody with these.
    """
    for signum, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that finds its machine unfit is left out on a desk, and is a failure in CI."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
    return report
