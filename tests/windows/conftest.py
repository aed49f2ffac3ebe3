"""Tests on the real Windows Python, under Wine: `make check-wine`. Its tests ask for Windows."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import Orchestrator
from orchestrator.tiny_model import write_tiny_model

collect_ignore_glob = [] if sys.platform == "win32" else ["test_*.py"]
HERE = Path(__file__).parent
Make = Callable[..., Orchestrator]


def command_lines() -> Iterator[tuple[int, list[str]]]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            yield process.pid, process.cmdline()


def processes() -> set[int]:
    """Return what this machine runs of ours: every Python but this one, and what it has started."""
    lines = {pid: " ".join(line).lower() for pid, line in command_lines()}
    return {pid for pid, line in lines.items() if "python" in line or "llama-server" in line}


def servers() -> set[int]:
    """Return the llama.cpp servers that are running."""
    return {
        pid
        for pid, line in command_lines()
        if any(word.endswith(("embedded.py", "llama-server.exe")) for word in line)
        and "--help" not in line  # which a look-up asks
    }


def until(is_true: Callable[[], Any], what: str, within_s: float = 30.0) -> None:
    ends = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < ends, f"{what} did not come"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = processes()
    yield
    until(lambda: processes() <= before, "the end of every process")


@pytest.fixture
def most_servers() -> Iterator[Callable[[], int]]:
    """Give the largest number of servers that were seen at one time."""
    most, is_over = [0], threading.Event()

    def look() -> None:
        while not is_over.is_set():
            most.append(len(servers()))

    thread = threading.Thread(target=look)
    thread.start()
    yield lambda: max(most)
    is_over.set()
    thread.join()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models of größe")
    paths = [folder / f"{name}.gguf" for name in ("a", "b", "ç d")]
    for number, path in enumerate(paths):
        write_tiny_model(path, seed=number)
    return [str(path) for path in paths]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Orchestrator] = []

    def make_one(**settings: Any) -> Orchestrator:
        settings = {"llama_server": "embedded", "state_dir": tmp_path / "state", **settings}
        made.append(Orchestrator(**settings))
        return made[-1]

    yield make_one
    for orch in made:
        orch.close()


@pytest.fixture
def fake(tmp_path: Path) -> str:
    """Give a llama-server.exe, a wrapper of a Python program, at a path that is hard to quote."""
    folder = tmp_path / "Programme & Dateien" / "für llama"
    folder.mkdir(parents=True)
    launcher = Path(sys.executable).parents[1] / "launcher.exe"
    shutil.copy(launcher, folder / "llama-server.exe")
    (folder / "llama-server.txt").write_text(sys.executable + "\n", encoding="utf-8")
    shutil.copy(HERE / "fake_server.py", folder / "llama-server.py")
    return str(folder / "llama-server.exe")


@pytest.fixture
def host() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start programs that own a slot."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
