"""The commands of the README work as printed, except that the test uses a port of its own.

Not run here, because they need a network: `pip install` (`make` installs the same folder with the
same extras), `pull`, and `run` of a model on the Hub; only their arguments are parsed. CI itself
calls `make demo` and `make test`.
"""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import socket
import tomllib
import types
from collections.abc import Coroutine
from pathlib import Path
from typing import cast

import click
import pytest

from orchestrator.cli.app import PROGRAM, commands
from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.command import Cli, Start

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
NEED_A_NETWORK = {"pull", "run"}


def ours() -> dict[str, list[str]]:
    """Return the README's command lines of our own program, by command."""
    return {line[1]: line[1:] for line in COMMANDS if line[0] == PROGRAM}


def test_every_command_of_the_readme_is_tested_here() -> None:
    """A new one needs a test here, or a reason above."""
    assert {line[0] for line in COMMANDS} == {"make", "pip", PROGRAM}
    assert ours().keys() == {"doctor", "serve", "load", *NEED_A_NETWORK}


def test_ci_calls_the_same_make_targets() -> None:
    called = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in COMMANDS if line[0] == "make"] == [["make", "demo"], ["make", "test"]]
    assert {"make demo", "make test"} <= {*called}


def test_pip_installs_this_folder_with_extras_that_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in COMMANDS:
        if line[0] == "pip":
            found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", line[2])
            assert line[1] == "install"
            assert found
            assert {*filter(None, (found[1] or "").split(","))} <= {*known["optional-dependencies"]}


@pytest.mark.parametrize("name", sorted(NEED_A_NETWORK))
def test_commands_that_need_a_network_are_parsed(name: str) -> None:
    group = cast("click.Group", commands)
    with click.Context(group, info_name=PROGRAM) as ctx:
        command = group.get_command(ctx, name)
        assert command is not None
        assert command.make_context(name, ours()[name][1:], parent=ctx).params["model"]


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
    assert "the slot is empty" in cli("unload", "--url", url).stdout


def test_the_python_example_prints_an_address_and_the_reload_reasons(
    state_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_tiny_model("model.gguf")
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_STATE_DIR", str(state_dir))
    monkeypatch.delenv("LLAMA_SERVER_PATH", raising=False)
    code = compile(text, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    run = types.FunctionType(code, {"__name__": "__main__"})
    asyncio.run(cast("Coroutine[None, None, None]", run()))
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:" in printed
    assert "max_seq_length" in printed
    assert "llama_extra_args" in printed
