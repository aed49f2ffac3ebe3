"""`run` and `serve`: signals at every point, failures, keys, log lines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.kit.command import Cli, Start
from tests.kit.process.servers import servers_of
from tests.kit.process.support import until
from tests.kit.sentences import assert_sentence

KEY = {"LLAMA_ORCHESTRATOR_API_KEY": "s3cret key"}

STATUS = "/api/inference/status"


def ask(url: str, path: str = STATUS, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(url + path, headers=headers, trust_env=False, timeout=20)


def test_run_loads_serves_and_ends_with_ctrl_c(
    start: Start, own: tuple[str, ...], tiny_model: str, state_dir: Path
) -> None:
    running = start("run", "-m", tiny_model, *own, "--top-k", "20", "--seed", "42")
    url = running.api_url()  # before the load: /v1 holds requests until the model is there
    running.line_with("settings")
    states = ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    printed = [line.split()[2] for line in running.out if " ms  " in line]
    assert printed == states
    status = ask(url).json()
    assert status["loaded"]["llama_extra_args"] == ["--top-k", "20", "--seed", "42"]
    server = status["loaded"]["base_url"]
    assert any(server in line for line in running.out)
    assert ask(server, "/health").status_code == 200
    assert len(servers_of(state_dir)) == 1
    assert running.signal(signal.SIGINT) == 130
    assert servers_of(state_dir) == set()
    assert "Traceback" not in "".join(running.err)


@pytest.mark.parametrize("state", ["Killing", "Spawning", "WaitingHealth"])
def test_ctrl_c_in_any_state_of_a_load_leaves_no_server(
    start: Start, own: tuple[str, ...], tiny_model: str, state_dir: Path, state: str
) -> None:
    running = start("run", tiny_model, *own)
    running.line_with(state)
    assert running.signal(signal.SIGINT) == 130
    assert servers_of(state_dir) == set()
    assert running.err == []


def test_sigterm_ends_run_cleanly(
    start: Start, own: tuple[str, ...], tiny_model: str, state_dir: Path
) -> None:
    """Even with an event stream open."""
    running = start("run", tiny_model, *own, "--json")
    url = running.json_line()["url"]
    with httpx.stream("GET", url + "/api/inference/events", trust_env=False, timeout=20) as events:
        assert running.signal(signal.SIGTERM) == 0
        assert any("Idle" in line for line in events.iter_lines())
    assert servers_of(state_dir) == set()


def test_run_with_json_prints_one_line_when_ready(
    start: Start, own: tuple[str, ...], tiny_model: str
) -> None:
    running = start("run", tiny_model, *own, "--json", "--max-seq-length", "512")
    ready = running.json_line()
    assert ready["outcome"]["context_length"] == 512
    assert ask(ready["url"]).json()["loaded"] == ready["outcome"]
    assert running.signal(signal.SIGINT) == 130
    assert len(running.out) == 1


def test_run_fails_with_the_last_lines_of_the_server(
    cli: Cli, own: tuple[str, ...], tiny_model: str, state_dir: Path
) -> None:
    done = cli("run", tiny_model, *own, "--seed", "bogus")
    assert done.returncode == 1
    assert 'handling argument "--seed"' in done.stderr
    assert "Idle" in done.stdout
    assert servers_of(state_dir) == set()
    as_json = cli("run", tiny_model, *own, "--seed", "bogus", "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["category"] == "server_start_failed"
    missing = cli("run", "gone.gguf", *own)
    assert missing.returncode == 1
    assert "gone.gguf" in missing.stderr


def test_run_reports_the_exit_of_its_server_and_serves_on(
    start: Start, own: tuple[str, ...], tiny_model: str, state_dir: Path
) -> None:
    """So that the model can be loaded again."""
    running = start("run", tiny_model, *own)
    url = running.api_url()
    running.line_with("settings")
    (pid,) = servers_of(state_dir)
    os.kill(pid, signal.SIGKILL)
    running.line_with("Idle")
    assert ask(url).json()["last_exit"]["returncode"] == -9
    assert running.signal(signal.SIGTERM) == 0
    assert_sentence("cli.run.exited", running.err[-1].strip())


def test_run_serves_on_when_a_client_loads_another_model(
    start: Start, state_dir: Path, never_ready: str, tiny_model: str, other_model: str
) -> None:
    """Its own load is superseded; ending would end the newer one too."""
    place = ("--port", "0", "--state-dir", str(state_dir), "--llama-server", never_ready)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = start("run", tiny_model, *place, "--port", str(port))
    running.line_with("WaitingHealth")
    url = f"http://127.0.0.1:{port}"
    where = url + "/api/inference/load?wait=false"
    answer = httpx.post(where, json={"model_path": other_model}, trust_env=False, timeout=20)
    assert answer.status_code == 202
    running.line_with("WaitingHealth")
    assert ask(url).json()["loading"]["model_path"] == other_model
    assert any("superseded" in line for line in running.err)
    assert running.signal(signal.SIGTERM) == 0


def test_serve_refuses_a_port_and_a_slot_in_use(
    cli: Cli, start: Start, own: tuple[str, ...], state_dir: Path
) -> None:
    running = start("serve", *own)
    url = running.api_url()
    port = url.rpartition(":")[2]
    taken = cli("serve", "--port", port, "--state-dir", str(state_dir))
    assert taken.returncode == 1
    assert_sentence("cli.address.in_use", taken.stderr.splitlines()[1].strip(), port=port)
    owned = cli("serve", *own, "--json")
    assert owned.returncode == 1
    problem = json.loads(owned.stdout)
    assert problem["category"] == "slot_owned"
    assert str(running.process.pid) in problem["detail"]
    assert running.signal(signal.SIGINT) == 130


def test_serve_limits_the_heads_of_requests(start: Start, own: tuple[str, ...]) -> None:
    url = start("serve", *own).api_url()
    answer = httpx.get(url + STATUS, headers={"X-A": "a" * 100_000}, trust_env=False, timeout=20)
    assert (answer.status_code, answer.json()["category"]) == (431, "head_too_large")
    assert ask(url).status_code == 200


def test_activity_survives_sigkill(start: Start, own: tuple[str, ...]) -> None:
    """Also what was asked last: it is on its way to the disk when the client has its answer."""
    running = start("serve", *own)
    url = running.api_url()
    for path in ("/v1/one", "/v1/two"):
        assert httpx.get(url + path, trust_env=False, timeout=20).status_code == 503
    until(lambda: len(ask(url, "/api/activity").json()) == 2, "both in the activity")
    running.process.kill()
    running.process.wait()
    url = start("serve", *own).api_url()
    told = ask(url, "/api/activity").json()
    assert [(one["path"], one["status"]) for one in told] == [("/v1/two", 503), ("/v1/one", 503)]


def test_a_key_file_guards_the_api(
    cli: Cli, start: Start, own: tuple[str, ...], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n  second  \n")
    running = start("serve", *own, "--json", "--api-key-file", str(keys))
    url = running.json_line()["url"]
    assert ask(url).status_code == 401
    assert ask(url, key="third").status_code == 401
    assert ask(url, key="second").status_code == 200
    assert cli("status", "--url", url).returncode == 1
    asked = cli("status", "--url", url, "--api-key-file", str(keys), "--json")
    assert json.loads(asked.stdout)["state"] == "Idle"


def test_a_key_may_come_from_the_environment(
    cli: Cli, start: Start, own: tuple[str, ...], tmp_path: Path
) -> None:
    """On both sides, and a file wins over it. Never in an argument, which every user can read."""
    running = start("serve", *own, "--json", "--host", "0.0.0.0", **KEY)
    port = running.json_line()["url"].rpartition(":")[2]
    url = f"http://127.0.0.1:{port}"
    assert ask(url).status_code == 401
    assert ask(url, key=KEY["LLAMA_ORCHESTRATOR_API_KEY"]).status_code == 200
    assert json.loads(cli("status", "--url", url, "--json", **KEY).stdout)["state"] == "Idle"
    assert cli("status", "--url", url).returncode == 1
    other = tmp_path / "other"
    other.write_text("wrong")
    asked = cli("status", "--url", url, "--api-key-file", str(other), "--json", **KEY)
    assert json.loads(asked.stdout)["category"] == "unauthorized"
    assert running.signal(signal.SIGTERM) == 0


def test_beyond_loopback_only_allowed_host_names_are_served(
    start: Start, own: tuple[str, ...], tmp_path: Path
) -> None:
    """Addresses of this machine need no option: they cannot be rebound."""
    keys = tmp_path / "keys"
    keys.write_text("first")
    place = ("--host", "0.0.0.0", "--allowed-host", "Box.Example", "--allowed-host", "box")
    running = start("serve", *own, "--json", "--api-key-file", str(keys), *place)
    url = running.json_line()["url"]
    port = int(url.rpartition(":")[2])
    answers = {}
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "box.example:1", "BOX", "evil.example"):
        headers = {"Host": host, "Authorization": "Bearer first"}
        answer = httpx.get(f"http://127.0.0.1:{port}{STATUS}", headers=headers, trust_env=False)
        answers[host] = answer.status_code
        assert "Server" not in answer.headers
    assert answers.pop("evil.example") == 403
    assert set(answers.values()) == {200}


def test_models_are_confined_to_the_models_dir(
    cli: Cli, start: Start, own: tuple[str, ...], tiny_model: str, tmp_path: Path
) -> None:
    """Relative names start there, not where the command was started."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        shutil.copy(tiny_model, folder / f"{folder.name}.gguf")
    running = start("run", "inside.gguf", *own, "--json", "--models-dir", str(inside))
    url = running.json_line()["url"]
    outcome = ask(url).json()["loaded"]
    assert outcome["model_path"] == "inside.gguf"
    for refused in (outside / "outside.gguf", outside / "gone.gguf", "../outside/outside.gguf"):
        done = cli("load", str(refused), "--url", url, "--json")
        problem = json.loads(done.stdout)
        assert (problem["category"], problem["field"]) == ("invalid_request", "model_path")
    again = cli("load", str(inside / "inside.gguf"), "--url", url, "--json")
    assert json.loads(again.stdout)["status"] == "already_loaded"
    assert ask(url).json()["loaded"]["pid"] == outcome["pid"]


def test_an_idle_model_is_unloaded_unless_pinned(
    start: Start, own: tuple[str, ...], tiny_model: str, state_dir: Path
) -> None:
    running = start("run", tiny_model, *own, "--idle-ttl", "0.05", "--restore-previous")
    running.line_with("Healthy")
    running.line_with("Idle")
    assert servers_of(state_dir) == set()
    assert running.signal(signal.SIGTERM) == 0
    pinned = start("run", tiny_model, *own, "--idle-ttl", "0.05", "--pinned", "--json")
    ready = pinned.json_line()
    assert ask(ready["url"]).json()["loaded"]["pid"] == ready["outcome"]["pid"]
    assert pinned.signal(signal.SIGTERM) == 0


def test_log_lines_are_json_on_stderr_when_requested(
    start: Start, own: tuple[str, ...], tiny_model: str
) -> None:
    running = start("serve", *own, "--json", "--log-format", "json")
    url = running.json_line()["url"]
    answer = httpx.post(
        url + "/api/inference/load", json={"model_path": tiny_model}, trust_env=False, timeout=20
    )
    assert answer.status_code == 200
    assert running.signal(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in running.err]
    moves = [line["dest"] for line in lines if line["event"] == "lifecycle.transitioned"]
    assert moves[:5] == ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    assert len(running.out) == 1
