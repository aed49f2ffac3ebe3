"""The source of each setting, and errors for everything in a file that is not one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import jsonschema_rs
import pytest

from orchestrator.cli import config
from orchestrator.cli.doctor import doctor
from orchestrator.cli.serving import run, serve
from tests.kit.command import COMMAND, Cli, Start, environment

ROOT = Path(__file__).parents[2]
KEYS = list(config.PARAMETERS)

# A value for every setting that differs from the default and from those of the other sources.
OF_FLAG = {
    "models": "/flag/models.toml",
    "watch": "True",
    "llama_server": "embedded",
    "host": "127.0.0.2",
    "port": "1001",
    "slot": "of-flag",
    "state_dir": "/flag",
    "drain_timeout": "1.5",
    "drain_policy": "cut",
    "kill_grace": "2.5",
    "restart": "on-crash",
    "hang_timeout": "7.5",
    "on_host_exit": "keep",
    "keep": "8.5",
    "warm": "False",
    "keep_prompts": "True",
    "keep_prompts_mib": "64",
    "api_key_file": "/flag/keys",
    "allowed_host": "flag.example",
    "models_dir": "/flag/models",
    "protect_server": "False",
    "idle_ttl": "3.5",
    "log_format": "json",
    "log_level": "error",
    "quiet": "True",
}
OF_ENVIRONMENT = OF_FLAG | {
    "llama_server": "/environment/llama-server",
    "port": "1002",
    "slot": "of-environment",
    "drain_timeout": "10",
    "idle_ttl": "30",
    "models_dir": "/environment/one:/environment/two",
}
OF_FILE: dict[str, Any] = {
    "models": "/file/models.toml",
    "watch": True,
    "llama_server": "/file/llama-server",
    "host": "127.0.0.3",
    "port": 1003,
    "slot": "of-file",
    "state_dir": "/file",
    "drain_timeout": 100,
    "drain_policy": "cut",
    "kill_grace": 0.5,
    "restart": "on-crash",
    "hang_timeout": 70.0,
    "on_host_exit": "keep",
    "keep": 80.0,
    "warm": False,
    "keep_prompts": True,
    "keep_prompts_mib": 128,
    "api_key_file": "/file/keys",
    "allowed_host": ["file.example", "other.example"],
    "models_dir": ["/file/models"],
    "protect_server": False,
    "idle_ttl": 300.0,
    "log_format": "json",
    "log_level": "error",
    "quiet": True,
}


def toml(members: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in members.items())


def explained(command: click.Command, *args: str) -> dict[str, dict[str, Any]]:
    """Return what a command would use, by key; it does not run."""
    with command.make_context(command.name, [*args]) as ctx:
        return {one["name"]: one for one in config.explain(ctx)["settings"]}


@pytest.fixture(autouse=True)
def _no_file_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(toml(OF_FILE))
    return path


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("command", [serve, run, doctor], ids=lambda one: str(one.name))
def test_flag_wins_over_environment_over_file_over_default(
    command: click.Command, key: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = f"--{'no-' * (OF_FLAG[key] == 'False')}{key.replace('_', '-')}"
    variable = f"LLAMA_ORCHESTRATOR_{key.upper()}"
    default = explained(command)[key]
    assert (default["source"], default["origin"]) == ("default", None)
    read = ("--config", str(file))
    of_file = explained(command, *read)[key]
    assert (of_file["source"], of_file["origin"]) == ("file", str(file))
    expected = OF_FILE[key]
    assert of_file["value"] == (tuple(expected) if isinstance(expected, list) else expected)
    monkeypatch.setenv(variable, OF_ENVIRONMENT[key])
    of_environment = explained(command, *read)[key]
    assert (of_environment["source"], of_environment["origin"]) == ("environment", variable)
    arguments = (flag,) if OF_FLAG[key] in {"True", "False"} else (flag, OF_FLAG[key])
    of_flag = explained(command, *read, *arguments)[key]
    assert (of_flag["source"], of_flag["origin"]) == ("flag", flag)
    for one, given in ((of_environment, OF_ENVIRONMENT), (of_flag, OF_FLAG)):
        value = ":".join(one["value"]) if isinstance(one["value"], tuple) else one["value"]
        assert str(value).removesuffix(".0") == given[key]
    assert default["value"] != of_file["value"]


def test_an_empty_variable_counts_as_unset(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a unit file that has `Environment=NAME=`."""
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_PORT", "")
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_CONFIG", "")
    assert explained(serve)["port"]["source"] == "default"
    assert explained(serve, "--config", str(file))["port"]["value"] == 1003


def test_the_file_of_the_flag_wins_over_the_variable_over_the_usual_path(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explained(serve)["port"]["source"] == "default"
    usual = tmp_path / "config" / "llama-orchestrator" / "config.toml"
    usual.parent.mkdir(parents=True)
    usual.write_text("port = 1\n")
    assert explained(serve)["port"]["origin"] == str(usual)
    other = tmp_path / "other.toml"
    other.write_text("port = 2\n")
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_CONFIG", str(other))
    assert explained(serve)["port"]["origin"] == str(other)
    assert explained(doctor, "--config")["port"]["origin"] == str(other)
    assert explained(serve, "--config", str(file))["port"]["origin"] == str(file)
    assert explained(run, "m.gguf", f"--config={file}", "--top-k", "3")["port"]["value"] == 1003


def test_relative_paths_start_at_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service is started from any folder."""
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "settings.toml"
    members = {
        "llama_server": "bin/llama-server",
        "state_dir": "~/state",
        "models_dir": ["a", "/b"],
    }
    path.write_text(toml(members))
    monkeypatch.chdir(tmp_path)
    found = explained(serve, "--config", path.name)
    assert found["llama_server"]["value"] == str(tmp_path / "bin/llama-server")
    assert found["state_dir"]["value"] == "/home/somebody/state"
    assert found["models_dir"]["value"] == (str(tmp_path / "a"), "/b")
    path.write_text('llama_server = "auto"\n')
    assert explained(serve, "--config", str(path))["llama_server"]["value"] == "auto"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("port = '8642'", "port"),
        ("port = 65536", "port"),
        ("port = 1.0", "port"),
        ("port = true", "port"),
        ("kill_grace = -1", "kill_grace"),
        ("kill_grace = inf", "kill_grace"),
        ("kill_grace = nan", "kill_grace"),
        ("idle_ttl = 0", "idle_ttl"),
        (f"idle_ttl = {'9' * 400}", "idle_ttl"),
        ("restart = 'sometimes'", "restart"),
        ("restart = []", "restart"),
        ("models_dir = '/models'", "models_dir"),
        ("allowed_host = ['a', 1]", "allowed_host"),
        ("slot = ''", "slot"),
        ("slot = 2026-01-01", "slot"),
        ("api_key_file = ['s3cret']", "api_key_file"),
    ],
)
@pytest.mark.parametrize("command", [serve, run], ids=lambda one: str(one.name))
def test_a_wrong_value_in_a_file_is_refused_by_what_its_key_allows(
    command: click.Command, text: str, key: str, tmp_path: Path
) -> None:
    """The value itself is not shown: it may be an API key."""
    allowed = config.allowed(config.schema()["properties"][key])
    assert refusal(command, text, tmp_path) == f"{key} must be {allowed}."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prot = 1", f"prot is not a setting. The settings are {', '.join(KEYS)}."),
        ("llama-server = 'auto'", "llama-server is not a setting."),
        ("api_key = 's3cret'", "api_key is not a setting."),
        ("[serve]\nport = 1", "serve is not a setting."),
        ("port\n", "at line 1, column"),
        ("port = 1\nport = 2", "Cannot overwrite a value"),
        ("port = " + "[" * 100_000, "maximum recursion depth"),
        ("slot = '\udcff'", "can't decode byte"),
    ],
)
@pytest.mark.parametrize("command", [serve, run], ids=lambda one: str(one.name))
def test_a_file_with_another_mistake_is_refused(
    command: click.Command, text: str, reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(command, text, tmp_path)


def refusal(command: click.Command, text: str, folder: Path) -> str:
    """Return the error for a file with this text, after the path that it starts with."""
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(click.UsageError) as caught:
        explained(command, "--config", str(path))
    assert caught.value.message.startswith(f"{path}: ")
    assert "s3cret" not in caught.value.message
    return caught.value.message.removeprefix(f"{path}: ")


def test_a_file_given_by_flag_or_variable_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone.toml"
    with pytest.raises(click.UsageError, match=r"gone\.toml: No such file"):
        explained(serve, "--config", str(gone))
    with pytest.raises(click.UsageError, match="Is a directory"):
        explained(serve, "--config", str(tmp_path))
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_CONFIG", str(gone))
    with pytest.raises(click.UsageError, match=r"gone\.toml: No such file"):
        explained(serve)


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, one in config.schema()["properties"].items()
        if "enum" in one or one["type"] in ("integer", "number", "boolean")
    ],
)
def test_the_error_for_a_wrong_variable_names_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets LLAMA_ORCHESTRATOR_PORT=tcp://... for a service of this name."""
    monkeypatch.setenv(f"LLAMA_ORCHESTRATOR_{key.upper()}", "tcp://10.0.0.1:8642")
    with pytest.raises(click.UsageError) as caught:
        explained(serve)
    assert f"LLAMA_ORCHESTRATOR_{key.upper()}" in caught.value.format_message()


@pytest.mark.parametrize("key", KEYS)
def test_the_schema_accepts_exactly_what_the_program_accepts(key: str, tmp_path: Path) -> None:
    schema = config.schema()
    candidates: list[Any] = [
        *(0, -1, 1, 0.5, 65535, 65536, 2592000, 2592001, True, "", "a", "never", "wait", "json"),
        *([], ["a"], [""], [1], {"a": 1}, OF_FILE[key]),
    ]
    fitting = 0
    for value in candidates:
        try:
            config.checked(tmp_path / "c.toml", {key: value})
            is_read = True
        except click.UsageError:
            is_read = False
        assert jsonschema_rs.is_valid(schema, {key: value}) is is_read, value
        fitting += is_read
    assert 0 < fitting < len(candidates)
    assert not jsonschema_rs.is_valid(schema, {f"{key}_": OF_FILE[key]})


def test_the_committed_schema_is_current(cli: Cli) -> None:
    """`make schema` writes it, even with a config file that cannot be read."""
    committed = (ROOT / "docs" / "config.schema.json").read_text()
    done = cli("doctor", "--schema", LLAMA_ORCHESTRATOR_CONFIG="/nowhere")
    assert (done.returncode, done.stdout) == (0, committed)
    assert json.loads(committed) == config.schema()


def test_the_page_has_a_row_for_every_setting_and_a_valid_example(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    schemas = config.schema()["properties"]
    assert rows == [
        (
            key,
            one["description"],
            config.allowed(one),
            f"`{one['default']}`" if "default" in one else "none",
        )
        for key, one in schemas.items()
    ]
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    members = tomllib.loads(example)
    assert config.checked(tmp_path / "c.toml", members).keys()


def test_serve_and_run_use_the_settings_of_the_file(
    start: Start, state_dir: Path, tiny_model: str, tmp_path: Path
) -> None:
    """Including the model folder and the key, and with llama-server's flags between our own."""
    keys = tmp_path / "keys"
    keys.write_text("of-file\n")
    path = tmp_path / "settings.toml"
    members = {
        "llama_server": "embedded",
        "port": 0,
        "state_dir": str(state_dir),
        "api_key_file": "keys",
        "models_dir": [str(Path(tiny_model).parent)],
        "log_format": "json",
    }
    path.write_text(toml(members))
    name = Path(tiny_model).name
    running = start("run", "--config", str(path), name, "--top-k", "20", "--json")
    ready = running.json_line()
    assert ready["outcome"]["model_path"] == name
    assert ready["outcome"]["llama_extra_args"] == ["--top-k", "20"]
    assert running.signal(signal.SIGTERM) == 0
    serving = start("serve", f"--config={path}", "--json")
    url = serving.json_line()["url"]
    asked = subprocess.run(
        [*COMMAND, "status", "--url", url, "--json"],
        env=environment() | {"LLAMA_ORCHESTRATOR_API_KEY_FILE": str(keys)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(asked.stdout)["state"] == "Idle"
    assert serving.signal(signal.SIGTERM) == 0


def test_a_key_in_the_environment_wins_over_a_key_file_in_the_config_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key itself is never part of the explanation."""
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_API_KEY", "s3cret")
    found = explained(serve, "--config", str(file))["api_key_file"]
    assert found == {
        "name": "api_key_file",
        "value": None,
        "source": "environment",
        "origin": "LLAMA_ORCHESTRATOR_API_KEY",
    }
    named = explained(serve, "--config", str(file), "--api-key-file", "k")["api_key_file"]
    assert (named["value"], named["source"]) == ("k", "flag")
    monkeypatch.setenv("LLAMA_ORCHESTRATOR_API_KEY_FILE", "of-environment")
    assert explained(serve, "--config", str(file))["api_key_file"]["value"] == "of-environment"


def test_doctor_shows_the_source_of_every_setting(
    cli: Cli, tmp_path: Path, state_dir: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('llama_server = "embedded"\nport = 0\nmodels_dir = ["a", "b"]\n')
    args = ("doctor", "--config", str(path), "--state-dir", str(state_dir))
    env = {
        "LLAMA_ORCHESTRATOR_SLOT": "mine",
        "LLAMA_ORCHESTRATOR_API_KEY": "s3cret",
        "LLAMA_ORCHESTRATOR_PROT": "1",
    }
    done = cli(*args, "--json", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["config"]["file"] == str(path)
    assert report["config"]["unknown_variables"] == ["LLAMA_ORCHESTRATOR_PROT"]
    found = {one["name"]: one["source"] for one in report["config"]["settings"]}
    assert list(found) == KEYS
    by_source = {
        source: sorted(key for key in found if found[key] == source) for source in found.values()
    }
    by_source.pop("default")
    assert by_source == {
        "flag": ["state_dir"],
        "environment": ["api_key_file", "slot"],
        "file": ["llama_server", "models_dir", "port"],
    }
    checks = {check["name"]: check["detail"] for check in report["checks"]}
    assert "'mine'" in checks["slot"]
    human = cli(*args, **env)
    assert human.returncode == 0
    for line in (
        r"slot +mine +environment LLAMA_ORCHESTRATOR_SLOT$",
        rf"models_dir +{tmp_path}/a, {tmp_path}/b +file {path}$",
        rf"state_dir +{state_dir} +flag --state-dir$",
        r"host +127\.0\.0\.1 +default$",
        r"LLAMA_ORCHESTRATOR_PROT is not a setting",
    ):
        assert re.search(line, human.stdout, re.MULTILINE), line
    assert "s3cret" not in done.stdout + human.stdout
    assert "config" not in json.loads(cli("doctor", "--json", *args[3:]).stdout)


READING = "status plan logs events"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("", f"run serve load unload cancel {READING} chat pull models demo doctor diagram"),
        ("run --drain-", "--drain-timeout --drain-policy"),
        ("run m.gguf --top-k 3 --restart ", "never on-crash"),
        ("doctor --sc", "--schema"),
        ("load m.gguf --on-busy ", "supersede queue reject"),
    ],
)
def test_the_shell_completes_commands_and_options(cli: Cli, words: str, offered: str) -> None:
    """Although a command is imported only when it is named, and among llama-server's flags."""
    line = f"llama-orchestrator {words}"
    env = {
        "_LLAMA_ORCHESTRATOR_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "LLAMA_ORCHESTRATOR_CONFIG": "/nowhere",
    }
    done = cli(**env)
    assert done.stderr == ""
    assert [one.removeprefix("plain,") for one in done.stdout.split()] == offered.split()


def test_every_shell_has_a_completion_script(cli: Cli) -> None:
    for shell in ("bash", "zsh", "fish"):
        done = cli(_LLAMA_ORCHESTRATOR_COMPLETE=f"{shell}_source")
        assert "_LLAMA_ORCHESTRATOR_COMPLETE" in done.stdout, done.stderr
