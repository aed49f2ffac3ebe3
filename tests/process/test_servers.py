"""The `--help` of a binary: run once, in a server's environment, and cached."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from orchestrator.base import launch
from orchestrator.errors import ServerUnavailable
from orchestrator.server import binaries, process_table
from orchestrator.server.binaries import ask_catalogue, find_server
from orchestrator.server.process_table import ProcessId
from orchestrator.settings.help_text import Catalogue
from orchestrator.settings.target import ServerBinary
from tests.kit.process.support import is_running, until
from tests.kit.sentences import assert_sentence

HELP = """
-m,    --model FNAME                    model path to load
--spec-type none,ngram-mod              type of speculative decoding
"""


class Script:
    """A binary that is a shell script, and counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "llama-server"
        self.cache = folder / "cache"
        self.asked = folder / "asked"

    def write(self, body: str) -> ServerBinary:
        text = f'#!/bin/sh\nenv > "{self.asked}.env"\necho >> "{self.asked}"\n{body}\n'
        self.path.write_text(text)
        self.path.chmod(0o755)
        return find_server(str(self.path))

    def answer(self, body: str = "") -> Catalogue | None:
        return ask_catalogue(self.write(f"cat <<END{HELP}END\n{body}"), self.cache)

    @property
    def times(self) -> int:
        return len(self.asked.read_text().splitlines()) if self.asked.exists() else 0


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setattr(binaries, "_answers", {})
    return Script(tmp_path)


def test_a_binary_is_asked_once_and_the_answer_outlives_the_process(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start need not run it again."""
    found = script.answer()
    assert found is not None
    server = find_server(str(script.path))
    assert ask_catalogue(server, script.cache) == found
    monkeypatch.setattr(binaries, "_answers", {})
    assert ask_catalogue(server, script.cache) == found
    assert script.times == 1
    os.utime(script.path, ns=(1, 1))
    assert ask_catalogue(find_server(str(script.path)), script.cache) == found
    assert script.times == 2


def test_no_secret_reaches_a_binary_asked_for_its_help(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the environment of a server."""
    for name in ("HF_TOKEN", "LLAMA_ARG_PORT", "AIP_MODE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    assert script.answer() is not None
    assert "secret" not in Path(f"{script.asked}.env").read_text()


@pytest.mark.parametrize(
    "body",
    ["exit 1", "kill -9 $$", "sleep 600", "trap '' TERM; while :; do sleep 600; done"],
    ids=["fails", "killed", "hangs", "deaf"],
)
def test_an_inconclusive_answer_is_not_cached(
    script: Script, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """A slow `--help` once switched drafting off for the whole session."""
    monkeypatch.setattr(binaries, "_ASK_S", 0.3)
    begun = time.monotonic()
    assert script.answer(body) is None
    assert time.monotonic() - begun < 10
    assert not script.cache.exists()
    assert script.answer() is not None


def test_an_inconclusive_binary_is_asked_again_after_a_while(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every load would wait for it otherwise."""
    server = script.write("echo usage")
    for _ in range(2):
        assert ask_catalogue(server, script.cache) is None
    assert script.times == 1
    monkeypatch.setattr(binaries, "_ASK_AGAIN_S", 0.0)
    binaries._ask_after.clear()
    for _ in range(2):
        assert ask_catalogue(server, script.cache) is None
    assert script.times == 3


def test_a_help_without_a_model_flag_is_inconclusive(script: Script) -> None:
    """`/bin/true` succeeds with any flag."""
    assert ask_catalogue(script.write("echo usage"), script.cache) is None
    assert ask_catalogue(script.write("head -c 3000000 /dev/zero"), script.cache) is None


def test_a_background_process_of_a_help_is_ended(script: Script, tmp_path: Path) -> None:
    """It holds the output open, which must not delay the answer."""
    pid_file = tmp_path / "pid"
    begun = time.monotonic()
    assert script.answer(f'sleep 600 & echo $! > "{pid_file}"') is not None
    assert time.monotonic() - begun < 10
    left = int(pid_file.read_text())
    until(lambda: not is_running(left), "the end of the rest")


def test_a_background_process_of_a_help_that_has_ended_already_is_ended(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is identified too late is a zombie, with a group of its own all the same."""
    identify = process_table.identify

    def late(pid: int) -> ProcessId | None:
        until(lambda: not is_running(pid), "the end of the help")
        return identify(pid)

    monkeypatch.setattr(process_table, "identify", late)
    pid_file = tmp_path / "pid"
    assert script.answer(f'sleep 600 & echo $! > "{pid_file}"') is not None
    left = int(pid_file.read_text())
    until(lambda: not is_running(left), "the end of the rest")


def test_a_help_is_read_in_a_host_that_ignores_sigchld(script: Script) -> None:
    """The exit status is lost there: the answer is right or inconclusive, and nothing is raised."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert isinstance(script.answer(), Catalogue | None)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    "key", ["binary.no_python_frozen", "binary.no_python_executable", "binary.no_python_archive"]
)
def test_the_embedded_server_needs_an_interpreter(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """In a frozen application, as PyInstaller makes, `sys.executable` is the application."""
    assert find_server("embedded").command[0] == launch.interpreter()
    if key.endswith("frozen"):
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif key.endswith("executable"):
        monkeypatch.setattr(sys, "executable", None)
        monkeypatch.setattr(sys, "exec_prefix", "/no/prefix")
    else:
        monkeypatch.setattr(binaries, "__file__", "/app.pyz/orchestrator/server/binaries.py")
    with pytest.raises(ServerUnavailable) as refused:
        find_server("embedded")
    assert_sentence(key, refused.value.message)
    assert refused.value.field == "llama_server"
