"""The client commands against a service of a pool: models by name."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.command import Cli, Start
from tests.kit.process.support import is_running
from tests.kit.sentences import assert_sentence


@pytest.fixture
def catalogue(tmp_path: Path, tiny_model: str, other_model: str) -> Path:
    """Two models with room for one; the first is the default."""
    path = tmp_path / "models.toml"
    path.write_text(f"""\
pool = {{ memory = "150 MiB", min_resident_s = 0, default = "chat" }}
[models.chat]
model_path = "{tiny_model}"
memory = "100 MiB"
aliases = ["org/chat:tag"]
presets.hot.temperature = 1.5
llama_extra_args = ["--predict", "8", "--seed", "1"]
[models.vectors]
model_path = "{other_model}"
memory = "100 MiB"
kind = "embedding"
""")
    return path


@pytest.fixture
def pool(start: Start, own: tuple[str, ...], catalogue: Path) -> Iterator[str]:
    """The URL of a running `serve --models`, which must end well."""
    running = start("serve", "--json", "--models", str(catalogue), *own)
    yield running.json_line()["url"]
    assert running.signal(signal.SIGTERM) == 0


def answer(cli: Cli, *args: str, url: str) -> Any:
    """Return what a command prints for programs."""
    done = cli(*args, "--url", url, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_command_takes_a_name(cli: Cli, pool: str) -> None:
    """Entry, alias, and either with a preset; without a name it is the default."""
    assert answer(cli, "plan", "vectors", url=pool)["action"] == "load"
    loaded = answer(cli, "load", "vectors", url=pool)
    assert (loaded["status"], loaded["evicted"]) == ("loaded", [])
    plan = answer(cli, "plan", "org/chat:tag:hot", url=pool)
    assert (plan["action"], plan["evict"], plan["fits"]) == ("load", ["vectors"], True)
    swapped = answer(cli, "load", "-m", "chat:hot", url=pool)
    assert swapped["evicted"] == ["vectors"]
    assert not is_running(loaded["pid"])
    for names in (("chat",), ("org/chat:tag",), ()):
        found = answer(cli, "status", *names, url=pool) if names else None
        assert found is None or found["loaded"]["pid"] == swapped["pid"]
        assert answer(cli, "load", *names, url=pool)["status"] == "already_loaded"
        assert answer(cli, "logs", *names, "-n", "2", url=pool)["lines"]
        assert answer(cli, "cancel", *names, url=pool) == {"cancelled": False}
    assert answer(cli, "unload", "chat", url=pool) == {"status": "unloaded"}
    assert not is_running(swapped["pid"])
    again = answer(cli, "load", "chat", "--no-wait", url=pool)
    assert again == {"generation": swapped["generation"] + 1}


def test_people_see_the_load_what_it_evicts_and_all_models(cli: Cli, pool: str) -> None:
    at = ("--url", pool)
    done = cli("load", "vectors", *at)
    shown = [line.split()[2] for line in done.stdout.splitlines() if " ms  " in line]
    assert shown[:5] == ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    plan = cli("plan", "chat", *at).stdout
    assert "evicts   vectors" in plan
    assert "evicted  vectors" in cli("load", "chat", *at).stdout
    for command in ("status", "models"):
        lines = cli(command, *at).stdout.splitlines()
        assert lines[0].split()[:6] == ["Host", "100.0", "MiB", "of", "150.0", "MiB"]
        assert lines[1].split()[:3] == ["chat", "Healthy", "100.0"]
        assert lines[2].split() == ["also", "org/chat:tag,", "chat:hot"]
        assert lines[3].split() == ["vectors", "Idle", "100.0", "MiB,", "embedding"]
    one = cli("status", "chat", *at).stdout
    assert one.startswith("Healthy")
    assert "clients" in one
    assert_sentence("cli.unload.done", cli("unload", "chat", *at).stdout.strip())


def test_models_lists_the_pool_where_one_answers(
    cli: Cli, pool: str, start: Start, own: tuple[str, ...], tmp_path: Path
) -> None:
    """A service of one slot has none; folders are listed whatever answers."""
    found = answer(cli, "models", url=pool)
    assert [one["name"] for one in found["models"]] == ["chat", "vectors"]
    assert found["budget"][0]["total_mib"] == 150
    single = start("serve", "--json", "--slot", "single", *own).json_line()["url"]
    slot = cli("models", "--url", single)
    assert slot.returncode == 1
    assert_sentence("cli.models.no_pool", slot.stderr.splitlines()[1].strip(), url=single)
    nobody = cli("models", "--url", "http://127.0.0.1:9", "--json")
    assert json.loads(nobody.stdout)["category"] == "unreachable"
    both = cli("models", "--url", pool, "--models-dir", str(tmp_path))
    assert both.returncode == 2
    assert_sentence("cli.models.both", both.stderr.splitlines()[-1])


@pytest.mark.parametrize("command", ["load", "unload", "plan", "status", "logs", "events", "chat"])
def test_a_misspelt_name_is_told_the_nearest(cli: Cli, pool: str, command: str) -> None:
    done = cli(command, "vecotrs", "--url", pool, "--json", stdin="Hello\n")
    problem = json.loads(done.stdout)
    assert (done.returncode, problem["category"]) == (1, "model_not_found")
    assert_sentence("cli.by_name.nearest", problem["detail"])
    far = json.loads(cli(command, "xyzzy", "--url", pool, "--json").stdout)
    assert "Did you mean" not in far["detail"]


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (("load", "chat", "--max-seq-length", "512", "--seed", "2"), "cli.by_name.settings"),
        (("load", "chat", "--pinned"), "cli.by_name.pinned"),
        (("load", "chat", "--clear-args"), "cli.by_name.args"),
        (("load", "chat", "-m", "chat"), "cli.by_name.twice"),
        (("cancel", "chat", "--generation", "1"), "cli.by_name.cancel"),
    ],
)
def test_what_the_catalogue_decides_is_a_usage_error(
    cli: Cli, pool: str, args: tuple[str, ...], key: str
) -> None:
    done = cli(*args, "--url", pool)
    assert done.returncode == 2
    assert_sentence(key, done.stderr.splitlines()[-1])


@pytest.mark.parametrize("command", ["status", "logs", "events", "cancel"])
def test_a_service_of_one_slot_has_no_names(cli: Cli, serving: str, command: str) -> None:
    done = cli(command, "chat", "--url", serving)
    assert done.returncode == 2
    assert_sentence("cli.by_name.one_slot", done.stderr.splitlines()[-1])


def test_a_load_takes_what_is_said_by_hand(cli: Cli, pool: str) -> None:
    first = answer(cli, "load", "chat", "--deadline", "20", "--on-busy", "queue", url=pool)
    forced = answer(cli, "load", "chat", "--force-reload", url=pool)
    assert (forced["status"], forced["pid"] != first["pid"]) == ("loaded", True)
    late = cli("load", "vectors", "--deadline", "0.001", "--url", pool, "--json")
    assert json.loads(late.stdout)["category"] == "deadline"


def test_events_and_status_can_be_followed(start: Start, cli: Cli, pool: str) -> None:
    """Those of all models have names; one model's are its own."""
    at = ("--url", pool)
    everything = start("events", *at, "--after", "0")
    of_one = start("events", "vectors", *at, "--after", "0", "--json")
    watching = start("status", "--watch", *at, "--json")
    assert [one["state"] for one in watching.json_line()["models"]] == ["Idle", "Idle"]
    for name in ("chat", "vectors"):
        assert cli("load", name, *at).returncode == 0
    assert everything.line_with("chat  WaitingHealth → Healthy")
    assert everything.line_with("vectors  WaitingHealth → Healthy")
    assert of_one.json_line()["model"] == "vectors"
    while [one["state"] for one in watching.json_line()["models"]] != ["Idle", "Healthy"]:
        pass
    for command in (everything, of_one, watching):
        assert command.signal(signal.SIGINT) == 130


@pytest.mark.parametrize("command", ["load", "unload", "plan", "status", "logs", "events", "chat"])
def test_the_shell_completes_the_names_of_the_pool(cli: Cli, pool: str, command: str) -> None:
    env = {
        "_LLAMA_ORCHESTRATOR_COMPLETE": "bash_complete",
        "COMP_WORDS": f"llama-orchestrator {command} --url {pool} ",
        "COMP_CWORD": "4",
    }
    offered = cli(**env).stdout.split()
    assert offered == [f"plain,{name}" for name in ("chat", "org/chat:tag", "chat:hot", "vectors")]
    env["COMP_WORDS"] += "v"
    assert cli(**env).stdout.split() == ["plain,vectors"]


def test_chat_speaks_with_the_model_that_is_named(cli: Cli, pool: str) -> None:
    """It is loaded first; without a name the default answers, and a preset is a name too."""
    for names in (("chat",), (), ("org/chat:tag:hot",)):
        said = json.loads(cli("chat", *names, "--url", pool, "--json", stdin="Hello\n").stdout)
        assert (said["message"], said["tokens"]) == ("Hello", 8)
    assert [one["state"] for one in answer(cli, "models", url=pool)["models"]] == [
        "Healthy",
        "Idle",
    ]
    wrong = cli("chat", "vectors", "--url", pool, "--json", stdin="Hello\n")
    assert json.loads(wrong.stdout)["category"] == "wrong_kind"
