"""The commands of the README work as printed, except that the test uses a port of its own.

The Hub is a fake one. CI itself calls `make demo` and `make test`, and `make tutorial`, which runs
the lines with `pip install`.
"""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from orchestrator.cli.app import PROGRAM
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.command import Cli, Start, environment
from tests.kit.fake_hub import Hub, Repo

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def ours() -> dict[str, list[str]]:
    """Return the README's command lines of our own program, by command."""
    return {line[1]: line[1:] for line in COMMANDS if line[0] == PROGRAM}


def test_every_command_of_the_readme_is_tested_here() -> None:
    """A new one needs a test here, or a reason above."""
    assert {line[0] for line in COMMANDS} == {"make", "pip", PROGRAM}
    assert ours().keys() == {"doctor", "serve", "load", "chat", "models", "pull", "run"}


def test_ci_calls_the_same_make_targets() -> None:
    called = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in COMMANDS if line[0] == "make"] == [["make", "demo"], ["make", "test"]]
    assert {"make demo", "make test", "make tutorial"} <= {*called}


def test_pip_installs_this_folder_with_extras_that_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in COMMANDS:
        if line[0] == "pip":
            found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", line[2])
            assert line[1] == "install"
            assert found
            assert {*filter(None, (found[1] or "").split(","))} <= {*known["optional-dependencies"]}


def test_commands_with_a_model_of_the_hub_work(
    cli: Cli, start: Start, hub: Hub, state_dir: Path, tiny_model: str
) -> None:
    """The second one uses what the first one has downloaded."""
    pull, run = ours()["pull"], ours()["run"]
    repo, _, label = pull[1].partition(":")
    assert pull[1] == run[1]
    hub.add(Repo(repo, {f"Model-{label}.gguf": Path(tiny_model)}))
    pulled = cli(*pull)
    assert pulled.returncode == 0, pulled.stderr
    hub.clear()
    running = start(*run, "--port", "0", "--state-dir", str(state_dir))
    assert cli("status", "--url", running.api_url()).returncode == 0
    assert not hub.seen("/cdn/", "GET")
    assert running.signal(signal.SIGINT) in (0, 130)


def test_the_commands_work_one_after_the_other(
    cli: Cli, start: Start, state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file called model.gguf in the folder."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model("model.gguf")
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_STATE_DIR", str(state_dir))
    where = {"LLAMA_ORCHESTRATOR_STATE_DIR": str(state_dir), "HF_HUB_OFFLINE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = cli(*ours()["doctor"], "--port", port, **where)
    assert done.returncode == 0, done.stdout
    assert "ready" in done.stdout

    running = start(*ours()["serve"], "--port", "0", "--state-dir", str(state_dir), "--json")
    url = running.json_line()["url"]
    loaded = cli(*ours()["load"], "--url", url)
    assert loaded.returncode == 0, loaded.stderr
    assert "Healthy" in loaded.stdout
    assert "already loaded" in cli("plan", "model.gguf", "--url", url).stdout
    assert "Healthy" in cli("status", "--url", url).stdout
    talked = cli(*ours()["chat"], "--url", url, stdin="Hello\n")
    assert "tokens per second" in talked.stdout, talked.stderr
    assert cli(*ours()["models"], HF_HUB_CACHE=str(tmp_path)).returncode == 0
    assert "the slot is empty" in cli("unload", "--url", url).stdout


def test_the_python_example_runs_as_a_script(state_dir: Path, tmp_path: Path) -> None:
    """In a folder with a model.gguf."""
    text, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(text.splitlines()) <= 10
    (tmp_path / "embed.py").write_text(text)
    write_tiny_model(tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "embed.py"],
        cwd=tmp_path,
        env=environment() | {"LLAMA_ORCHESTRATOR_STATE_DIR": str(state_dir)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "http://127.0.0.1:" in done.stdout
    assert "max_seq_length" in done.stdout
    assert "llama_extra_args" in done.stdout
