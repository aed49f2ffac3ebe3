"""Shared by every layer: models, the real llama-server, and a check that nothing is left.

The real llama-server comes from LLAMA_SERVER_PATH (`make llama-server` builds one), the real model
from the cache (`make real-model` fetches it). Tests that need them are marked `external` and `real`
and fail without them; they are never skipped.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
from huggingface_hub import close_session, constants

from orchestrator.demo import real_model
from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.server import embedded
from tests.kit.fake_hub import Hub
from tests.kit.http import Gate
from tests.kit.process.read_back import write_server
from tests.kit.process.servers import servers_of


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


@pytest.fixture(scope="session")
def talking_server(llama_server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real server, with one thread, and verbose enough to log its KV cache and drafting."""
    path = tmp_path_factory.mktemp("server") / "llama-server"
    write_server(path, llama_server)
    return str(path)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The real model: small, and its answers make sense."""
    path = real_model.cached()
    assert path, "run `make real-model`"
    return str(path)


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


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of `huggingface_hub` for this test alone: empty, without token, Xet and telemetry.

    Both the environment, for child processes, and the constants that were read from it are set.
    """
    home = tmp_path / "hf"
    flags = {"HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"}
    paths = {
        "HF_HOME": home,
        "HF_HUB_CACHE": home / "hub",
        "HF_ASSETS_CACHE": home / "assets",
        "HF_XET_CACHE": home / "xet",
        "HF_TOKEN_PATH": home / "token",
        "HF_STORED_TOKENS_PATH": home / "stored_tokens",
    }
    for name, path in paths.items():
        monkeypatch.setenv(name, str(path))
        monkeypatch.setattr(constants, name, str(path))
    for name in flags:
        monkeypatch.setenv(name, "1")
        monkeypatch.setattr(constants, name, True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield home
    close_session()  # its idle connections would be reported as resources that were never closed


@pytest.fixture
def hub(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, running; child processes use it as the Hub."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


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


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    key, binary = tmp_path / "open", tmp_path / "gated-server"
    server = f"{sys.executable} -P {embedded.__file__}"
    waits = f'while [ "$1" != --help ] && [ ! -e "{key}" ]; do sleep 0.01; done'
    binary.write_text(f'#!/bin/sh\n{waits}\nexec {server} "$@"\n')
    binary.chmod(0o755)
    return Gate(str(binary), key)
