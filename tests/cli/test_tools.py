"""`demo`, `doctor` and `diagram`, end to end."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from orchestrator import diagram
from tests.cli.conftest import Cli, Start
from tests.conftest import servers_of


def demo_json(cli: Cli, server: str) -> dict[str, object]:
    done = cli("demo", "--llama-server", server, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found: dict[str, object] = json.loads(done.stdout)
    return found


def check(shown: dict[str, object]) -> None:
    """The main promise, witnessed: never two servers, none left, and everything was shown."""
    summary = shown["summary"]
    assert isinstance(summary, dict)
    assert shown["ok"] is True
    assert summary["servers_alive_at_once_max"] == 1
    assert summary["servers_left"] == 0
    assert summary["unexpected"] == []
    assert summary["looks_at_process_table"] > 10
    assert summary["answered_tokens"] == 24
    counts = [summary[name] for name in ("superseded", "cancelled", "already_loaded")]
    assert counts == [1, 1, 1]
    assert summary["loads"] == 3
    timeline = shown["timeline"]
    assert isinstance(timeline, list)
    moments = [moment["ms"] for moment in timeline]
    assert moments == sorted(moments)
    assert timeline[-1]["state"] == "Idle"
    for before, after in itertools.pairwise(timeline):
        assert before["state"] == after["source"]
    pids = {moment["pid"] for moment in timeline if moment["state"] == "Healthy"}
    assert len(pids) == 3
    assert summary["servers_started"] >= len(pids)


def test_the_demo_shows_everything_on_the_embedded_server(cli: Cli) -> None:
    check(demo_json(cli, "embedded"))


@pytest.mark.external
def test_the_demo_shows_everything_on_the_real_server(cli: Cli, llama_server: str) -> None:
    check(demo_json(cli, llama_server))


def test_the_demo_is_readable_and_cleans_up(cli: Cli, tmp_path: Path) -> None:
    done = cli("demo", "--llama-server", "embedded", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Servers alive at once: 1 at most" in done.stdout
    assert "0 left" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_interrupted_leaves_nothing(start: Start, signum: int, code: int) -> None:
    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("llama-orchestrator-demo-*"))

    before = folders()
    running = start("demo", "--llama-server", "embedded")
    running.line_with("WaitingHealth")
    (folder,) = folders() - before
    assert running.signal(signum) == code
    assert not folder.exists()
    assert servers_of(folder) == set()


def test_the_demo_says_what_is_missing(cli: Cli) -> None:
    done = cli("demo", "--llama-server", "/nowhere/llama-server", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["category"] == "server_unavailable"


def test_the_doctor_finds_a_healthy_machine(cli: Cli, state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    args = ("doctor", "--llama-server", "embedded", "--state-dir", str(state_dir), "--port", port)
    done = cli(*args, "--json")
    assert done.returncode == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    names = "python platform llama-server embedded slot pidfd flock proc memory disk gpu port"
    assert {*names.split(), "state dir"} == checks.keys()
    assert all(check["verdict"] != "problem" for check in checks.values())
    told = cli(*args)
    assert told.returncode == 0
    assert "ready" in told.stdout


def test_the_doctor_says_what_to_fix(cli: Cli, tmp_path: Path) -> None:
    """Every problem has its remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = cli(
            *("doctor", "--llama-server", str(tmp_path), "--json"),
            *("--state-dir", str(tmp_path / "no" / "parent")),
            *("--port", str(taken.getsockname()[1])),
        )
    assert done.returncode == 1
    report = json.loads(done.stdout)
    problems = {c["name"]: c for c in report["checks"] if c["verdict"] == "problem"}
    assert problems.keys() == {"llama-server", "state dir", "port"}
    assert all(check["remedy"] for check in problems.values())
    assert report["ok"] is False


def test_the_doctor_runs_the_server_it_finds(cli: Cli, tmp_path: Path) -> None:
    broken = tmp_path / "llama-server"
    broken.write_text("#!/bin/sh\nexit 127\n")  # as when a library is missing
    broken.chmod(0o755)
    done = cli("doctor", "--llama-server", str(broken), "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 1
    assert "does not run" in done.stdout


def test_the_doctor_knows_a_running_orchestrator(
    cli: Cli, start: Start, here: tuple[str, ...], state_dir: Path
) -> None:
    """It names who has the slot, and an address in our own use is no problem."""
    running = start("serve", *here, "--json")
    port = running.json_line()["url"].rpartition(":")[2]
    state = ("--state-dir", str(state_dir), "--llama-server", "embedded")
    done = cli("doctor", *state, "--port", port, "--json")
    assert done.returncode == 0
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert str(running.process.pid) in checks["slot"]["detail"]
    assert (checks["slot"]["verdict"], checks["port"]["verdict"]) == ("note", "note")
    assert running.signal(signal.SIGTERM) == 0


def test_the_diagram_comes_in_every_format(cli: Cli) -> None:
    drawn = {
        "mermaid": diagram.mermaid(),
        "dot": diagram.dot(),
        "svg": diagram.svg(),
        "md": diagram.markdown(),
    }
    for form, text in drawn.items():
        done = cli("diagram", "--format", form)
        assert (done.returncode, done.stdout.rstrip()) == (0, text.rstrip())
    as_json = json.loads(cli("diagram", "--json").stdout)
    assert as_json == {"format": "mermaid", "text": drawn["mermaid"]}
