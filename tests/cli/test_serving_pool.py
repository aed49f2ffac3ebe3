"""`serve --models`: a pool behind HTTP, and how its catalogue is read again."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.command import DEADLINE_S, Cli, Running, Start, environment
from tests.kit.process.servers import servers_of
from tests.kit.process.support import is_running, until
from tests.kit.sentences import assert_sentence

Own = tuple[str, ...]


@pytest.fixture
def file(tmp_path: Path, tiny_model: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(catalogue(tiny_model, "one"))
    return path


def catalogue(model: str, *names: str, **more: str) -> str:
    """Return a catalogue of one file under several names."""
    tables = (
        f'[models.{name}]\nmodel_path = "{model}"\nmemory = "100 MiB"\n{more.get(name, "")}'
        for name in names
    )
    return f'[pool]\nmemory = "1 GiB"\n{more.get("pool", "")}' + "".join(tables)


def ask(url: str, path: str = "/api/models", method: str = "GET", **options: Any) -> httpx.Response:
    return httpx.request(method, url + path, trust_env=False, timeout=DEADLINE_S, **options)


def names(url: str) -> list[str]:
    return [one["name"] for one in ask(url).json()["models"]]


def logged(running: Running, event: str) -> list[str]:
    return [line for line in running.err if event in line]


def test_serve_loads_models_by_name_and_leaves_no_server(
    start: Start, own: Own, file: Path, state_dir: Path, tiny_model: str
) -> None:
    file.write_text(catalogue(tiny_model, "one", "two", pool='preload = ["two"]\n'))
    running = start("serve", "--models", str(file), *own)
    url = running.api_url()
    assert running.line_with("models").split() == ["models", "one,", "two"]
    until(lambda: ask(url, "/readyz").status_code == 200, "two is loaded")
    states = {one["name"]: one["state"] for one in ask(url).json()["models"]}
    assert states == {"one": "Idle", "two": "Healthy"}
    assert ask(url, "/api/models/one/load", "POST").json()["status"] == "loaded"
    assert len(servers_of(state_dir)) == 2
    assert running.signal(signal.SIGTERM) == 0
    assert servers_of(state_dir) == set()
    assert "Traceback" not in "".join(running.err)


def test_a_catalogue_with_keys_may_be_served_to_other_machines(
    start: Start, own: Own, file: Path, tmp_path: Path, cli: Cli
) -> None:
    """One without keys is served to this machine only."""
    given = ("serve", "--json", "--models", str(file), *own, "--host", "0.0.0.0")
    assert "give --api-key-file too" in cli(*given).stderr
    (tmp_path / "ann.key").write_text("a-key")
    file.write_text(file.read_text() + "[keys.ann]\nkey_file = 'ann.key'")
    port = start(*given).json_line()["url"].rpartition(":")[2]
    url = f"http://127.0.0.1:{port}"
    assert ask(url).status_code == 401
    assert ask(url, headers={"X-Api-Key": "a-key"}).status_code == 200


def test_the_catalogue_may_be_named_in_the_environment_and_in_the_config_file(
    start: Start, own: Own, file: Path, tmp_path: Path
) -> None:
    """In a config file its path starts there."""
    config = tmp_path / "config.toml"
    config.write_text('models = "models.toml"\n')
    for given in (
        start("serve", "--json", *own, "--slot", "a", LLAMA_ORCHESTRATOR_MODELS=str(file)),
        start("serve", "--json", *own, "--slot", "b", "--config", str(config)),
    ):
        assert names(given.json_line()["url"]) == ["one"]
        assert given.signal(signal.SIGINT) == 130


def test_sighup_reads_the_catalogue_again_where_no_terminal_hangs_up(
    start: Start, own: Own, file: Path, tiny_model: str, state_dir: Path
) -> None:
    """A mistake is logged and changes nothing."""
    running = start("serve", "--json", "--models", str(file), *own)
    url = running.json_line()["url"]
    pid = ask(url, "/api/models/one/load", "POST").json()["pid"]
    file.write_text(catalogue(tiny_model, "one", "two", one='aliases = ["uno"]\n'))
    running.process.send_signal(signal.SIGHUP)
    until(lambda: names(url) == ["one", "two"], "the catalogue is read")
    assert ask(url, "/api/models/uno").json()["pid"] == pid
    file.write_text(catalogue(tiny_model, "one", one="wieght = 2\n"))
    running.process.send_signal(signal.SIGHUP)
    until(lambda: logged(running, "catalogue.refused"), "the mistake is logged")
    assert "did you mean weight?" in logged(running, "catalogue.refused")[0]
    assert names(url) == ["one", "two"]
    assert len(servers_of(state_dir)) == 1
    (read,) = logged(running, "catalogue.reloaded")
    assert "added=two" in read
    assert "changed=one" in read
    assert running.signal(signal.SIGTERM) == 0


def test_an_ignored_sighup_stays_ignored(start: Start, own: Own, file: Path) -> None:
    """As under `nohup`: it neither reads nor ends."""
    with ignoring(signal.SIGHUP):  # a child inherits that
        running = start("serve", "--json", "--models", str(file), *own)
    url = running.json_line()["url"]
    running.process.send_signal(signal.SIGHUP)
    assert names(url) == ["one"]
    assert running.signal(signal.SIGTERM) == 0
    assert logged(running, "catalogue.reloaded") == []


@contextlib.contextmanager
def ignoring(signum: signal.Signals) -> Iterator[None]:
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signum, before)


def test_a_hang_up_of_the_terminal_ends_the_service(
    start: Start, own: Own, file: Path, state_dir: Path, tmp_path: Path
) -> None:
    """The terminal of a session goes away with the program that has its other end."""
    script = (
        "import os, pty, sys\n"
        "pid, _ = pty.fork()\n"
        "if pid == 0: os.execv(sys.argv[1], sys.argv[1:])\n"
        "print(pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    output = tmp_path / "out"
    command = (sys.executable, "-m", "orchestrator.cli", "serve", "--json", "--models", str(file))
    shell = f"exec {' '.join(command)} {' '.join(own)} > {output}"
    args = [sys.executable, "-c", script, "/bin/sh", "-c", shell]
    pipe = subprocess.PIPE
    with subprocess.Popen(args, stdin=pipe, stdout=pipe, text=True, env=environment()) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        until(lambda: output.exists() and output.read_text().endswith("\n"), "it serves")
        url = json.loads(output.read_text())["url"]
        assert ask(url, "/api/models/one/load", "POST").status_code == 200
        assert len(servers_of(state_dir)) == 1
        holder.kill()
    until(lambda: not is_running(pid), "the service has ended")
    assert servers_of(state_dir) == set()


def test_watch_reads_a_changed_file_and_stands_by_a_mistake(
    start: Start, own: Own, file: Path, tiny_model: str
) -> None:
    running = start("serve", "--json", "--models", str(file), "--watch", *own)
    url = running.json_line()["url"]
    file.write_text(catalogue(tiny_model, "one", "two"))
    until(lambda: names(url) == ["one", "two"], "the catalogue is read")
    file.write_text("[models.")
    until(lambda: logged(running, "catalogue.refused"), "the mistake is logged")
    assert names(url) == ["one", "two"]
    file.unlink()
    until(lambda: len(logged(running, "catalogue.refused")) == 2, "the file is missed")
    new = file.with_name("new")
    new.write_text(catalogue(tiny_model, "three"))
    new.rename(file)  # as editors and configuration tools do
    until(lambda: names(url) == ["three"], "the catalogue is read")
    assert running.signal(signal.SIGTERM) == 0


def test_without_watch_a_changed_file_changes_nothing(
    start: Start, own: Own, file: Path, tiny_model: str
) -> None:
    running = start("serve", "--json", "--models", str(file), *own)
    url = running.json_line()["url"]
    file.write_text(catalogue(tiny_model, "two"))
    assert ask(url, "/api/models/one/load", "POST").status_code == 200
    assert names(url) == ["one"]
    assert ask(url, "/api/catalogue", "POST").json()["added"] == ["two"]
    assert running.signal(signal.SIGTERM) == 0


def test_a_mistake_in_the_catalogue_starts_nothing(cli: Cli, own: Own, file: Path) -> None:
    file.write_text('[models.one]\nmodel_path = "a.gguf"\nwieght = 2\n')
    done = cli("serve", "--models", str(file), *own, "--json")
    problem = json.loads(done.stdout)
    assert (done.returncode, problem["category"]) == (1, "invalid_catalogue")
    assert problem["field"] == "models.one.wieght"
    gone = cli("serve", "--models", str(file.with_name("gone")), *own)
    assert (gone.returncode, "cannot be read" in gone.stderr) == (1, True)


def test_options_that_do_not_go_together_are_usage_errors(
    cli: Cli, own: Own, file: Path, tiny_model: str
) -> None:
    for args, key in (
        (("serve", "--watch"), "cli.serve.watch"),
        (("run", "one", "--watch"), "cli.serve.watch"),
        (("run", "--models", str(file)), "cli.run.name"),
        (("run", "one", "--models", str(file), "--seed", "1"), "cli.run.settings"),
        (("serve", "--models", str(file), "--idle-ttl", "5"), "cli.serve.idle_ttl"),
    ):
        done = cli(*args, *own)
        assert done.returncode == 2
        assert_sentence(key, done.stderr.splitlines()[-1])


def test_run_loads_a_model_of_the_catalogue_and_serves_all_of_them(
    start: Start, own: Own, file: Path, tiny_model: str, state_dir: Path
) -> None:
    """It shows the load as that of a single model."""
    file.write_text(catalogue(tiny_model, "one", "two"))
    running = start("run", "two", "--models", str(file), *own)
    url = running.api_url()
    running.line_with("settings")
    printed = [line.split()[2] for line in running.out if " ms  " in line]
    assert printed == ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    states = {one["name"]: one["state"] for one in ask(url).json()["models"]}
    assert states == {"one": "Idle", "two": "Healthy"}
    assert running.signal(signal.SIGINT) == 130
    assert servers_of(state_dir) == set()
    as_json = start("run", "one", "--json", *own, LLAMA_ORCHESTRATOR_MODELS=str(file))
    assert as_json.json_line()["outcome"]["status"] == "loaded"
    assert as_json.signal(signal.SIGTERM) == 0


def test_run_ends_with_1_when_its_model_does_not_load(
    cli: Cli, own: Own, file: Path, state_dir: Path
) -> None:
    file.write_text('[models.one]\nmodel_path = "gone.gguf"\nmemory = "1 MiB"\n')
    for name, category in (("one", "model_not_found"), ("two", "model_not_found")):
        done = cli("run", name, "--models", str(file), *own, "--json")
        assert (done.returncode, json.loads(done.stdout)["category"]) == (1, category)
    assert servers_of(state_dir) == set()
