"""`demo` and `diagram`, end to end."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
from pathlib import Path

import pytest

from orchestrator.demo.observers import Witness
from orchestrator.machine import diagram
from tests.kit.command import Cli, Start
from tests.kit.process.servers import servers_of


def demo_json(cli: Cli, server: str) -> dict[str, object]:
    done = cli("demo", "--llama-server", server, "--tiny", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found: dict[str, object] = json.loads(done.stdout)
    return found


def check(run: dict[str, object]) -> None:
    """Never two servers, none left, and every step was shown."""
    summary = run["summary"]
    assert isinstance(summary, dict)
    assert run["ok"] is True
    assert summary["servers_alive_at_once_max"] == 1
    assert summary["servers_left"] == 0
    assert summary["unexpected"] == []
    assert summary["looks_at_process_table"] > 10
    assert summary["answered_tokens"] == 24
    counts = [summary[name] for name in ("superseded", "cancelled", "already_loaded")]
    assert counts == [1, 1, 1]
    assert summary["loads"] == 3
    timeline = run["timeline"]
    assert isinstance(timeline, list)
    moments = [moment["ms"] for moment in timeline]
    assert moments == sorted(moments)
    assert timeline[-1]["state"] == "Idle"
    for before, after in itertools.pairwise(timeline):
        assert before["state"] == after["source"]
    pids = {moment["pid"] for moment in timeline if moment["state"] == "Healthy"}
    assert len(pids) == 3
    assert summary["servers_started"] >= len(pids)


def test_the_demo_passes_on_the_embedded_server(cli: Cli) -> None:
    check(demo_json(cli, "embedded"))


@pytest.mark.external
def test_the_demo_passes_on_the_real_server(cli: Cli, llama_server: str) -> None:
    check(demo_json(cli, llama_server))


def test_the_text_of_the_demo_fits_a_terminal_and_nothing_is_left(cli: Cli, tmp_path: Path) -> None:
    done = cli("demo", "--llama-server", "embedded", "--tiny", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Servers alive at once: 1 at most" in done.stdout
    assert "0 left" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


def test_the_witness_counts_a_server_it_saw_before_its_exec(tmp_path: Path) -> None:
    """A fork of the keeper has the keeper's environment for a moment."""
    folder = tmp_path.stat()
    value = f"{tmp_path}:{folder.st_dev:x}:{folder.st_ino:x}"
    server = f"echo forked; read -r _; TOKEN={value} exec cat"
    with (
        Witness(f"TOKEN={value}") as witness,
        subprocess.Popen(
            ["sh", "-c", f"sh -c '{server}'; exit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        ) as keeper,
    ):
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "forked\n"
        assert witness.look() == 0
        keeper.stdin.write("go\nexecuted\n")
        assert keeper.stdout.readline() == "executed\n"
        assert witness.look() == 1
    assert witness.most == 1
    assert witness.look() == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing(
    start: Start, tmp_path: Path, signum: int, code: int
) -> None:
    running = start("demo", "--llama-server", "embedded", "--tiny", TMPDIR=str(tmp_path))
    running.line_with("WaitingHealth")
    (folder,) = tmp_path.glob("llama-orchestrator-demo-*")
    assert running.signal(signum) == code
    assert not folder.exists()
    assert servers_of(folder) == set()


def test_the_demo_fails_without_its_server(cli: Cli) -> None:
    done = cli("demo", "--llama-server", "/nowhere/llama-server", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["category"] == "server_unavailable"


def test_every_format_of_the_diagram_is_printed(cli: Cli) -> None:
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
