"""The client commands against a running `serve`."""

from __future__ import annotations

import http.client
import http.server
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.command import Cli, Start
from tests.kit.http import using_the_server
from tests.kit.process.servers import servers_of
from tests.kit.sentences import assert_sentence


def wait_until_state(cli: Cli, url: str, state: str) -> None:
    deadline = time.monotonic() + 30
    while json.loads(cli("status", "--url", url, "--json").stdout)["state"] != state:
        assert time.monotonic() < deadline, state


def test_every_command_prints_text_for_people_and_json_for_programs(
    cli: Cli, serving: str, tiny_model: str
) -> None:
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

    status = cli("status", *at)
    assert status.stdout.startswith("Healthy")
    assert tiny_model in status.stdout
    assert json.loads(cli("status", *at, "--json").stdout)["loaded"]["pid"] == cleared["pid"]

    plan = cli("plan", tiny_model, *at, "--max-seq-length", "256")
    assert "max_seq_length: 0 → 256" in plan.stdout
    unknown = cli("cancel", *at, "--generation", "99")
    assert_sentence("cli.cancel.unknown", unknown.stdout.strip())
    unknown_as_json = cli("cancel", *at, "--load-request-id", "x", "--json")
    assert json.loads(unknown_as_json.stdout) == {"cancelled": False}

    other = cli("unload", "another.gguf", *at)
    assert_sentence("cli.unload.other", other.stdout.strip(), model="another.gguf")
    assert json.loads(cli("unload", *at, "--json").stdout) == {"status": "unloaded"}
    assert cli("status", *at).stdout.startswith("Idle")


def test_load_shows_its_transitions_and_where_clients_go(
    cli: Cli, serving: str, tiny_model: str
) -> None:
    """As `run` does; the last line comes before the result."""
    done = cli("load", tiny_model, "--url", serving)
    lines = done.stdout.splitlines()
    shown = [line.split()[2] for line in lines if " ms  " in line and "✓" not in line]
    assert shown == ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    assert lines[len(shown)].startswith("✓ Healthy")
    assert any(line.split()[:2] == ["clients", f"{serving}/v1"] for line in lines)
    assert "clients" in cli("status", "--url", serving).stdout
    assert max(map(len, lines)) <= max(80, len(tiny_model) + 11)


def test_events_have_times(start: Start, cli: Cli, serving: str, tiny_model: str) -> None:
    events = start("events", "--url", serving, "--after", "0")
    assert cli("load", tiny_model, "--url", serving).returncode == 0
    assert re.search(r"^ +1  \d\d:\d\d:\d\d  Idle → Killing", events.line_with("Killing"))
    assert events.signal(signal.SIGINT) == 130


def test_status_can_be_watched(start: Start, cli: Cli, serving: str, tiny_model: str) -> None:
    """One document for each change, however often it is asked for."""
    watching = start("status", "--watch", "--url", serving, "--json")
    assert watching.json_line()["state"] == "Idle"
    generation = json.loads(cli("load", tiny_model, "--url", serving, "--json").stdout)[
        "generation"
    ]
    while (seen := watching.json_line())["state"] != "Healthy":
        pass
    assert seen["loaded"]["generation"] == generation
    assert watching.signal(signal.SIGINT) == 130


def test_chat_speaks_with_the_loaded_model(cli: Cli, serving: str, tiny_model: str) -> None:
    """One message a line; the model knows the conversation so far."""
    at = ("--url", serving)
    nothing = cli("chat", *at, stdin="Hello\n")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no model is loaded" in nothing.stderr
    flags = ("--predict", "8", "--seed", "1")
    done = cli("chat", tiny_model, *at, *flags, "--json", stdin="Hello\n\nAgain\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["message"], second["message"]) == ("Hello", "Again")
    assert (first["tokens"], second["tokens"]) == (8, 8)
    assert first["tokens_per_s"] > 0
    human = cli("chat", *at, stdin="Hello\n")
    assert re.search(r"8 tokens, [\d,]+ tokens per second, the first after", human.stdout)


def test_ctrl_c_says_what_it_did(
    start: Start, state_dir: Path, never_ready: str, tiny_model: str
) -> None:
    own = ("--port", "0", "--state-dir", str(state_dir), "--llama-server", never_ready)
    url = start("serve", *own).api_url()
    load = start("load", tiny_model, "--url", url)
    load.line_with("WaitingHealth")
    assert load.signal(signal.SIGINT) == 130
    assert_sentence("cli.load.withdrawn", load.err[-1].strip())


def test_unload_can_cut(cli: Cli, serving: str, tiny_model: str) -> None:
    at = ("--url", serving)
    assert cli("load", tiny_model, *at).returncode == 0
    with using_the_server(serving):
        assert "requests 1" in cli("status", *at).stdout
        assert cli("unload", "--cut", *at).returncode == 0


def test_a_relative_path_starts_at_the_folder_of_the_client(
    cli: Cli, serving: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator runs in another one."""
    monkeypatch.chdir(Path(tiny_model).parent)
    loaded = cli("load", Path(tiny_model).name, "--url", serving, "--json")
    assert json.loads(loaded.stdout)["model_path"] == tiny_model
    unloaded = cli("unload", Path(tiny_model).name, "--url", serving, "--json")
    assert json.loads(unloaded.stdout) == {"status": "unloaded"}


def test_no_wait_prints_the_generation_and_returns(cli: Cli, serving: str, tiny_model: str) -> None:
    done = cli("load", tiny_model, "--url", serving, "--no-wait", "--json")
    assert json.loads(done.stdout) == {"generation": 1}
    assert cli("load", tiny_model, "--url", serving).returncode == 0


def test_a_refused_load_ends_with_1_and_the_reason(cli: Cli, serving: str, tiny_model: str) -> None:
    missing = cli("load", "gone.gguf", "--url", serving)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "gone.gguf" in missing.stderr
    failed = cli("load", tiny_model, "--seed", "bogus", "--url", serving, "--json")
    assert failed.returncode == 1
    problem = json.loads(failed.stdout)
    assert problem["category"] == "server_start_failed"
    assert any("--seed" in line for line in problem["log_tail"])
    assert "--seed" in cli("status", "--url", serving).stderr


def test_without_an_orchestrator_the_error_says_how_to_start_one(cli: Cli) -> None:
    url = "http://127.0.0.1:9"
    done = cli("status", "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert_sentence("cli.unreachable", done.stderr.splitlines()[1].strip(), url=url)
    as_json = cli("unload", "--url", url, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["category"] == "unreachable"


def test_another_http_server_is_not_taken_for_an_orchestrator(
    cli: Cli, start: Start, own: tuple[str, ...], tiny_model: str
) -> None:
    running = start("run", tiny_model, *own, "--json")
    llama_server = running.json_line()["outcome"]["base_url"]
    done = cli("status", "--url", llama_server)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_ctrl_c_during_a_load_withdraws_it(
    cli: Cli, start: Start, state_dir: Path, never_ready: str, tiny_model: str
) -> None:
    serve = start(
        *("serve", "--port", "0", "--state-dir", str(state_dir), "--llama-server", never_ready)
    )
    url = serve.api_url()
    load = start("load", tiny_model, "--url", url, "--json")
    wait_until_state(cli, url, "WaitingHealth")
    assert load.signal(signal.SIGINT) == 130
    wait_until_state(cli, url, "Idle")
    assert servers_of(state_dir) == set()
    assert serve.signal(signal.SIGTERM) == 0


def test_logs_and_events_follow_until_ctrl_c(
    cli: Cli, start: Start, serving: str, tiny_model: str
) -> None:
    at = ("--url", serving)
    events = start("events", *at, "--after", "0", "--json")
    logs = start("logs", *at, "--follow", "--json")
    assert cli("load", tiny_model, *at).returncode == 0
    transitions: list[dict[str, Any]] = []
    while len(transitions) < 5:  # with progress between them when the machine is slow
        transitions += [event] if (event := events.json_line())["kind"] == "transition" else []
    assert [event["id"] for event in transitions] == [1, 2, 3, 4, 5]
    assert transitions[-1]["dest"] == "Healthy"
    assert "line" in logs.json_line()
    for running in (events, logs):
        assert running.signal(signal.SIGINT) == 130
    last = cli("logs", *at, "-n", "3").stdout.splitlines()
    assert 0 < len(last) <= 3
    assert json.loads(cli("logs", *at, "--json").stdout)["lines"][-len(last) :] == last


def test_a_key_follows_neither_redirect_nor_proxy(cli: Cli) -> None:
    """It goes to the given address only (CVE-2025-51471 in a peer)."""
    received: list[tuple[str, str | None]] = []

    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            received.append((self.path, self.headers["Authorization"]))
            self.send_response(307)
            self.send_header("Location", url.replace("127.0.0.1", "localhost") + "/taken")
            self.send_header("WWW-Authenticate", 'Bearer realm="http://evil.example"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        proxies = {"HTTP_PROXY": url + "/proxy", "http_proxy": url + "/proxy"}
        key = {"LLAMA_ORCHESTRATOR_API_KEY": "s3cret"}
        done = cli("status", "--url", url, **key, **proxies)
        server.shutdown()
        thread.join()
    assert done.returncode == 1
    asked = ["/api/models", "/api/inference/status"]  # is it a pool?
    assert received == [(path, "Bearer s3cret") for path in asked]
    assert "s3cret" not in done.stdout + done.stderr


HOSTILE = "a\x1b]0;title\x07b\x1b[31mc\x9b2Jd\u202ee"
COMMANDS = [
    ("status",),
    ("plan", "org/x"),
    ("load", "org/x"),
    ("unload",),
    ("cancel", "--generation", "1"),
    ("logs",),
    ("logs", "--follow"),
    ("events",),
]


@pytest.fixture
def foreign() -> Iterator[Callable[[int, bytes], str]]:
    """Serve one answer to everything; return its URL."""
    answer = 200, b""

    class Foreign(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def serve(status: int, body: bytes) -> str:
            nonlocal answer
            answer = status, body
            return f"http://127.0.0.1:{server.server_port}"

        yield serve
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_a_foreign_service_says_is_shown_and_not_obeyed(
    cli: Cli, foreign: Callable[[int, bytes], str], command: tuple[str, ...]
) -> None:
    """A terminal is told nothing by the service at the given address."""
    names = ("title", "detail", "field", "category")
    refusal = {**dict.fromkeys(names, HOSTILE), "log_tail": [HOSTILE], "status": 400}
    refused = cli(*command, "--url", foreign(400, json.dumps(refusal).encode()))
    assert refused.returncode == 1
    assert "\\x1b]0;title" in refused.stderr
    lines = cli("logs", "--follow", "--url", foreign(200, HOSTILE.encode() + b"\n"))
    assert "\\x1b]0;title" in lines.stdout
    for text in (refused.stdout, refused.stderr, lines.stdout, lines.stderr):
        assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("body", "commands"),
    [
        (b"{}", ["status", "plan org/x", "load org/x", "cancel --generation 1", "logs"]),
        (b"[" * 100_000, ["status", "load org/x"]),
        (b'{"state": "\\u001b[31m", "lines": 1, "action": []}', ["status", "plan org/x", "logs"]),
        (b"data: nonsense\n\n", ["events"]),
        (b"data: []\n\n", ["events"]),
    ],
    ids=["empty", "deep", "odd", "nonsense", "list"],
)
def test_another_service_is_not_taken_for_an_orchestrator(
    cli: Cli, foreign: Callable[[int, bytes], str], body: bytes, commands: list[str]
) -> None:
    for command in commands:
        done = cli(*command.split(), "--url", foreign(200, body))
        assert done.returncode == 1
        assert "does not speak this API" in done.stderr
        assert done.stderr.count("\n") <= 3, "no traceback"


def test_an_idle_model_is_unloaded_unless_pinned(cli: Cli, serving: str, tiny_model: str) -> None:
    """Its own load decides, whatever the default of the orchestrator."""
    at = ("--url", serving, "--json")
    loaded = json.loads(cli("load", tiny_model, *at, "--pinned", "--idle-ttl", "0.2").stdout)
    assert json.loads(cli("status", *at).stdout)["loaded"]["pid"] == loaded["pid"]
    cli("load", tiny_model, *at, "--idle-ttl", "0.05", "--force-reload", "--prefetch")
    wait_until_state(cli, serving, "Idle")
