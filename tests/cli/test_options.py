"""The split between our options and llama-server's flags, usage errors, and a missing extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import options
from tests.kit.command import Cli, environment

OURS = {"-m": True, "--model": True, "--port": True, "--json": False, "-np": True}


@pytest.mark.parametrize(
    ("line", "ours", "theirs"),
    [
        ("m.gguf", "m.gguf", ""),
        ("-m m.gguf --top-k 20 --seed 42", "-m m.gguf", "--top-k 20 --seed 42"),
        ("--top-k 20 -m m.gguf --seed=42", "-m m.gguf", "--top-k 20 --seed=42"),
        ("m.gguf --json --temp -1 --port=0", "m.gguf --json --port=0", "--temp -1"),
        ("m.gguf -mg 0 -ngl 99 -np 4", "m.gguf -np 4", "-mg 0 -ngl 99"),
        ("m.gguf -np4 --mlock --json", "m.gguf --json", "-np4 --mlock"),
        ("--port 1 m.gguf --samplers a;b", "--port 1 m.gguf", "--samplers a;b"),
        ("--top-k 20 m.gguf", "", "--top-k 20 m.gguf"),
        ("m.gguf -- --json --port 3", "m.gguf", "--json --port 3"),
        ("-m -odd.gguf", "-m -odd.gguf", ""),
        ("m.gguf --port", "m.gguf --port", ""),
    ],
)
def test_unknown_flags_go_to_the_server_in_order(line: str, ours: str, theirs: str) -> None:
    """With their values, in every spelling: click's own rules would read `-mg` as `-m g`."""
    assert options.split(line.split(), OURS) == (ours.split(), theirs.split())


@pytest.mark.parametrize(
    "args",
    [
        ["run"],
        ["run", "--top-k", "20", "m.gguf"],
        ["run", "a.gguf", "-m", "b.gguf"],
        ["run", "a.gguf", "b.gguf"],
        ["run", "m.gguf", "--idle-ttl", "0"],
        ["run", "m.gguf", "--allowed-host", "*"],
        ["run", "m.gguf", "--restart=sometimes"],
        ["run", "m.gguf", "--host", "0.0.0.0"],
        ["run", "m.gguf", "--cache-type-kv", "q9"],
        ["run", "m.gguf", "--max-seq-length", "many"],
        ["run", "m.gguf", "--api-key", "s3cret"],
        ["run", "m.gguf", "--n-gpu-layers", "1", "--webui"],
        ["run", "m.gguf", "--chat-template-file", "/nowhere"],
        ["run", "m.gguf", "--kill-grace", "-1"],
        ["serve", "--models-dir", "/nowhere/at/all"],
        ["serve", "--idle-ttl", "soon"],
        ["serve", "--allowed-host", "http://box"],
        ["serve", "--slot", "../up", "--port", "0"],
        ["serve", "--port", "65536"],
        ["serve", "--api-key-file", "/dev/null"],
        ["serve", "--host", "192.0.2.1"],
        ["cancel"],
        ["status", "--url", "ftp://x"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2(cli: Cli, args: list[str], tmp_path: Path) -> None:
    done = cli(*args, LLAMA_ORCHESTRATOR_STATE_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_variable_without_a_usable_key_is_refused(cli: Cli) -> None:
    """It must not leave the API open in silence."""
    for bad in (" ", "k\xe9y", "a\tb"):
        done = cli("serve", "--port", "0", LLAMA_ORCHESTRATOR_API_KEY=bad)
        assert done.returncode == 2
        assert "LLAMA_ORCHESTRATOR_API_KEY" in done.stderr


def test_the_help_lists_every_option_of_the_contract(cli: Cli) -> None:
    common = (
        *("--llama-server", "--host", "--port", "--slot", "--api-key-file", "--drain-timeout"),
        *("--kill-grace", "--idle-ttl", "--restart", "--models-dir", "--allowed-host"),
        *("--log-format", "--log-level", "--quiet"),
    )
    model = ("--gguf-variant", "--max-seq-length", "--cache-type-kv", "--speculative-type")
    start = ("--prefetch", "--restore-previous", "--pinned")
    helps = {name: cli(name, "--help").stdout for name in ("serve", "run", "load")}
    for option in common:
        assert option in helps["serve"]
        assert option in helps["run"]
    for option in (*model, *start, "--chat-template-file"):
        assert option in helps["run"]
        assert option in helps["load"]
    assert "LLAMA_ORCHESTRATOR_API_KEY" in " ".join(helps["load"].split())


@pytest.mark.parametrize("package", ["click", "rich", "uvicorn"])
def test_without_the_extra_one_line_says_what_to_install(package: str, tmp_path: Path) -> None:
    hide = f"import sys; sys.modules[{package!r}] = None\n"
    code = f"{hide}from orchestrator.cli import main; main(['serve', '--port', '0'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment() | {"LLAMA_ORCHESTRATOR_STATE_DIR": str(tmp_path)},
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install "llama-orchestrator[cli]"' in done.stderr
    assert package in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_and_version_end_with_0_and_no_command_with_2(cli: Cli) -> None:
    help_ = cli("run", "--help")
    assert help_.returncode == 0
    assert "ANY LLAMA-SERVER FLAG" in help_.stdout
    assert cli("--version").stdout.startswith("llama-orchestrator, version ")
    assert cli().returncode == 2


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_logged_traceback_shows_no_local_variables(form: str) -> None:
    """They may be tokens and keys. stdout is for results only."""
    code = (
        "import logging, sys\n"
        "from orchestrator.base.log import event_log\n"
        "from orchestrator.cli import logs\n"
        "logs.configure('warning', sys.argv[1])\n"
        "log = event_log('orchestrator.test')\n"
        "def crash(hf_token):\n"
        "    raise ValueError('no')\n"
        "try:\n"
        "    crash('hf' + '_' + 'secret')\n"
        "except ValueError:\n"
        "    log('exception', 'owner.failed')\n"
        "    logging.getLogger('other').exception('other failed')\n"
        "log('info', 'not.shown')\n"
        "logging.getLogger('other').info('not.shown')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, form],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
        check=True,
    )
    assert done.stdout == ""
    assert "owner.failed" in done.stderr
    assert done.stderr.count("ValueError: no") == 2
    assert "other failed" in done.stderr
    assert "hf_secret" not in done.stderr
    assert "not.shown" not in done.stderr
