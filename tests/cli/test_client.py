"""`load`, `unload`, `cancel`, `status` and `plan` against a running `serve`."""

from __future__ import annotations

import http.server
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kit.command import Cli, Start
from tests.kit.process.servers import servers_of


def test_the_commands_talk_to_a_running_one(cli: Cli, serving: str, tiny_model: str) -> None:
    """The same words for people, and the API's own JSON for programs."""
    at = ("--url", serving)
    planned = json.loads(cli("plan", tiny_model, *at, "--json", "--seed", "7").stdout)
    assert planned["action"] == "load"
    assert planned["argv"][-2:] == ["--seed", "7"]

    loaded = json.loads(cli("load", tiny_model, *at, "--json", "--seed", "7").stdout)
    assert loaded["status"] == "loaded"
    assert loaded["llama_extra_args"] == ["--seed", "7"]
    again = cli("load", "-m", tiny_model, *at)  # inherits the flags
    assert (again.returncode, "already loaded" in again.stdout) == (0, True)
    cleared = json.loads(cli("load", tiny_model, *at, "--clear-args", "--json").stdout)
    assert cleared["reload_reasons"] == [
        {"field": "llama_extra_args", "running": ["--seed", "7"], "requested": []}
    ]

    told = cli("status", *at)
    assert told.stdout.startswith("Healthy")
    assert tiny_model in told.stdout
    assert json.loads(cli("status", *at, "--json").stdout)["loaded"]["pid"] == cleared["pid"]

    wanted = cli("plan", tiny_model, *at, "--max-seq-length", "256")
    assert "max_seq_length: 0 → 256" in wanted.stdout
    assert "no such load" in cli("cancel", *at, "--generation", "99").stdout
    nothing = cli("cancel", *at, "--load-request-id", "x", "--json")
    assert json.loads(nothing.stdout) == {"cancelled": False}

    assert "nothing was changed" in cli("unload", "another.gguf", *at).stdout
    assert json.loads(cli("unload", *at, "--json").stdout) == {"status": "unloaded"}
    assert cli("status", *at).stdout.startswith("Idle")


def test_a_file_is_found_from_another_folder(
    cli: Cli, serving: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator runs elsewhere; what the user names is relative to where the user is."""
    monkeypatch.chdir(Path(tiny_model).parent)
    done = cli("load", Path(tiny_model).name, "--url", serving, "--json")
    assert json.loads(done.stdout)["model_path"] == tiny_model
    named = cli("unload", Path(tiny_model).name, "--url", serving, "--json")
    assert json.loads(named.stdout) == {"status": "unloaded"}


def test_a_load_need_not_be_waited_for(cli: Cli, serving: str, tiny_model: str) -> None:
    done = cli("load", tiny_model, "--url", serving, "--no-wait", "--json")
    assert json.loads(done.stdout) == {"generation": 1}
    assert cli("load", tiny_model, "--url", serving).returncode == 0


def test_a_refusal_ends_with_1_and_says_why(cli: Cli, serving: str, tiny_model: str) -> None:
    missing = cli("load", "gone.gguf", "--url", serving)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "gone.gguf does not exist" in missing.stderr
    bogus = cli("load", tiny_model, "--bogus", "--url", serving, "--json")
    assert bogus.returncode == 1
    problem = json.loads(bogus.stdout)
    assert problem["category"] == "server_start_failed"
    assert any("--bogus" in line for line in problem["log_tail"])
    last = cli("status", "--url", serving)
    assert "--bogus" in last.stderr


def test_nobody_there_is_said_so(cli: Cli) -> None:
    nobody = ("--url", "http://127.0.0.1:9")
    done = cli("status", *nobody)
    assert (done.returncode, done.stdout) == (1, "")
    assert "llama-orchestrator serve" in done.stderr
    as_json = cli("unload", *nobody, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["category"] == "unreachable"


def test_what_is_not_an_orchestrator_is_said_so(
    cli: Cli, start: Start, here: tuple[str, ...], tiny_model: str
) -> None:
    """A llama-server answers too, but not this."""
    running = start("run", tiny_model, *here, "--json")
    server = running.json_line()["outcome"]["base_url"]
    done = cli("status", "--url", server)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_ctrl_c_during_a_load_withdraws_it(
    cli: Cli, start: Start, state_dir: Path, hangs: str, tiny_model: str
) -> None:
    serve = start("serve", "--port", "0", "--state-dir", str(state_dir), "--llama-server", hangs)
    url = serve.line_with("API").split()[1]
    load = start("load", tiny_model, "--url", url, "--json")
    while json.loads(cli("status", "--url", url, "--json").stdout)["state"] != "WaitingHealth":
        pass
    assert load.signal(signal.SIGINT) == 130
    while json.loads(cli("status", "--url", url, "--json").stdout)["state"] != "Idle":
        pass
    assert servers_of(state_dir) == set()
    assert serve.signal(signal.SIGTERM) == 0


def test_logs_and_events_are_followed_until_ctrl_c(
    cli: Cli, start: Start, serving: str, tiny_model: str
) -> None:
    """What an operator leaves open in another window."""
    at = ("--url", serving)
    events = start("events", *at, "--after", "0", "--json")
    logs = start("logs", *at, "--follow", "--json")
    assert cli("load", tiny_model, *at).returncode == 0
    told: list[dict[str, Any]] = []
    while len(told) < 5:  # progress is told between them when the machine is slow
        told += [event] if (event := events.json_line())["kind"] == "transition" else []
    assert [event["id"] for event in told] == [1, 2, 3, 4, 5]
    assert told[-1]["dest"] == "Healthy"
    assert "line" in logs.json_line()
    for running in (events, logs):
        assert running.signal(signal.SIGINT) == 130
    shown = cli("logs", *at, "-n", "3").stdout.splitlines()
    assert 0 < len(shown) <= 3
    assert json.loads(cli("logs", *at, "--json").stdout)["lines"][-len(shown) :] == shown


def test_a_key_goes_to_the_address_it_was_given_for(cli: Cli, tmp_path: Path) -> None:
    """Not where a redirect leads, nor through a proxy (CVE-2025-51471 in a peer)."""
    seen: list[tuple[str, str | None]] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(307)
            self.send_header("Location", here.replace("127.0.0.1", "localhost") + "/taken")
            self.send_header("WWW-Authenticate", 'Bearer realm="http://evil.example"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        here = f"http://127.0.0.1:{server.server_port}"
        proxies = {"HTTP_PROXY": here + "/proxy", "http_proxy": here + "/proxy"}
        key = {"LLAMA_ORCHESTRATOR_API_KEY": "s3cret"}
        done = cli("status", "--url", here, **key, **proxies)
        server.shutdown()
        thread.join()
    assert done.returncode == 1
    assert seen == [("/api/inference/status", "Bearer s3cret")]
    assert "s3cret" not in done.stdout + done.stderr


def test_a_load_says_how_long_it_may_idle(cli: Cli, serving: str, tiny_model: str) -> None:
    """The request's own words; a pinned model stays."""
    at = ("--url", serving, "--json")
    loaded = json.loads(cli("load", tiny_model, *at, "--pinned", "--idle-ttl", "0.2").stdout)
    assert json.loads(cli("status", *at).stdout)["loaded"]["pid"] == loaded["pid"]
    cli("load", tiny_model, *at, "--idle-ttl", "0.05", "--force-reload", "--prefetch")
    ends = time.monotonic() + 20
    while json.loads(cli("status", *at).stdout)["state"] != "Idle":
        assert time.monotonic() < ends
