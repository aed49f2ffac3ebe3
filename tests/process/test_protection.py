"""Servers that are protected by a key: only lease holders can use them, and the key stays secret.

Tests read the key from the environment of the process, which only its owner may read.
"""

from __future__ import annotations

import http.client
import logging
import os
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from orchestrator import Orchestrator
from orchestrator.base.redaction import HIDDEN
from orchestrator.errors import InvalidRequest, ServerStartFailed
from orchestrator.runtime.answers import LeasedServer
from orchestrator.runtime.owner import Owner
from tests.kit.process.support import Fake, Make
from tests.kit.sentences import assert_sentence

CHAT = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'


def key_of(pid: int) -> str:
    return psutil.Process(pid).environ()["LLAMA_API_KEY"]


def ask(base_url: str, path: str, key: str | None = None, **headers: str) -> tuple[int, str | None]:
    """Send a request, and return the status and the allowed origin."""
    connection = http.client.HTTPConnection(base_url.removeprefix("http://"), timeout=20)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    method, body = ("POST", CHAT) if "chat" in path else ("GET", None)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers.get("Access-Control-Allow-Origin")


@pytest.mark.parametrize("kind", ["embedded", pytest.param("external", marks=pytest.mark.external)])
def test_a_protected_server_answers_only_lease_holders(
    kind: str, tiny_model: str, state_dir: Path, request: pytest.FixtureRequest
) -> None:
    """Other programs and pages in a browser can reach the port."""
    binary = kind if kind == "embedded" else request.getfixturevalue("llama_server")
    with Orchestrator(llama_server=binary, state_dir=state_dir, protect_server=True) as orch:
        outcome = orch.load(tiny_model, max_seq_length=512)
        assert outcome.context_length == 512  # read with the key
        url = outcome.base_url
        for path in ("/v1/chat/completions", "/slots", "/props", "/v1/models", "/metrics"):
            assert ask(url, path)[0] == 401
            assert ask(url, path, "x" * 43)[0] == 401
        assert ask(url, "/health")[0] == 200
        with orch.lease() as server:
            assert server.api_key == key_of(server.pid)
            assert ask(url, "/v1/chat/completions", server.api_key)[0] == 200
        first = server.api_key
        orch.load(tiny_model, force_reload=True)
        with orch.lease() as server:
            assert server.api_key != first
            assert ask(server.base_url, "/props", server.api_key)[0] == 200
            assert ask(server.base_url, "/props", first)[0] == 401


@pytest.mark.parametrize("kind", ["embedded", pytest.param("external", marks=pytest.mark.external)])
def test_shared_keys_are_accepted_at_the_servers_own_address(
    kind: str, tiny_model: str, state_dir: Path, request: pytest.FixtureRequest
) -> None:
    """The server's own key still works only for lease holders."""
    binary = kind if kind == "embedded" else request.getfixturevalue("llama_server")
    shared = ["first-key", "second-key"]
    with Orchestrator(llama_server=binary, state_dir=state_dir, protect_server=shared) as orch:
        url = orch.load(tiny_model).base_url
        assert [ask(url, "/v1/models", key)[0] for key in (*shared, "first")] == [200, 200, 401]
        with orch.lease() as server:
            assert server.api_key not in (None, *shared)


@pytest.mark.parametrize("given", [["a,b"], [""], [None], 7, ["\n"], ["é"]])
def test_an_invalid_shared_key_is_refused(given: Any, state_dir: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Orchestrator(state_dir=state_dir, protect_server=given)
    assert caught.value.field == "protect_server"


@pytest.mark.parametrize("kind", ["embedded", pytest.param("external", marks=pytest.mark.external)])
def test_a_protected_server_has_no_web_ui_and_allows_no_foreign_origin(
    kind: str, tiny_model: str, state_dir: Path, request: pytest.FixtureRequest
) -> None:
    """By default llama-server lets any web page read its answers, with credentials."""
    binary = kind if kind == "embedded" else request.getfixturevalue("llama_server")
    with Orchestrator(llama_server=binary, state_dir=state_dir, protect_server=True) as orch:
        orch.load(tiny_model)
        with orch.lease() as server:
            key = server.api_key
            assert ask(server.base_url, "/", key)[0] == 404
            evil = ask(server.base_url, "/props", key, Origin="http://evil.example")
            assert evil == (200, None)


def test_an_unprotected_server_needs_no_key(tiny_model: str, state_dir: Path) -> None:
    """For local use any client works with `base_url` alone."""
    with Orchestrator(llama_server="embedded", state_dir=state_dir) as orch:
        outcome = orch.load(tiny_model)
        assert ask(outcome.base_url, "/v1/chat/completions")[0] == 200
        assert "LLAMA_API_KEY" not in psutil.Process(outcome.pid).environ()
        with orch.lease() as server:
            assert server.api_key is None


def test_a_server_that_ignores_its_key_fails_to_start(make: Make, fake: Fake, model_a: str) -> None:
    """It would serve every program without anyone noticing."""
    orch = make(protect_server=True)
    fake.behave(knows_keys=False)
    with pytest.raises(ServerStartFailed) as refused:
        orch.load(model_a)
    assert_sentence("start.unprotected", refused.value.message)
    assert (refused.value.reason, refused.value.field) == ("unprotected", "llama_server")
    assert fake.running() == set()
    fake.behave()
    assert orch.load(model_a).status == "loaded"


def test_the_key_is_never_shown_or_written(
    make: Make,
    fake: Fake,
    model_a: str,
    state_dir: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in argv, status, events, plan, logs, errors, files or output."""
    caplog.set_level(logging.DEBUG)
    orch = make(protect_server=True)
    outcome = orch.load(model_a)
    with orch.lease() as server:
        key = server.api_key
        shown = [repr(server), str(server), repr(cast("Owner", orch._owner).snapshot)]
    assert key is not None
    assert len(key) >= 32
    assert fake.wait_for("start")["env"]["LLAMA_API_KEY"] == key
    shown += [str(psutil.Process(outcome.pid).cmdline()), repr(outcome), str(outcome.as_dict())]
    shown += [str(orch.plan(model_a, n_parallel=2).as_dict()), str(orch.status().as_dict())]
    os.kill(outcome.pid, 9)
    for event in orch.events(after=0):
        shown.append(repr(event))
        if event.kind == "transition" and event.data["trigger"] == "exited":
            break
    shown += [str(orch.status().as_dict()), *orch.logs(), caplog.text, *capfd.readouterr()]
    shown += [path.read_text("latin-1") for path in state_dir.rglob("*") if path.is_file()]
    assert not [text for text in shown if key in text]


def test_a_key_printed_by_the_server_is_redacted(make: Make, fake: Fake, model_a: str) -> None:
    orch = make(protect_server=True, llama_server=fake.wrapper('env; "$SERVER" "$@"; exit $?'))
    orch.load(model_a)
    with orch.lease() as server:
        key = server.api_key
    lines = [line for line in orch.logs() if "LLAMA_API_KEY" in line]
    assert lines == [f"LLAMA_API_KEY={HIDDEN}"]
    assert str(key) not in "".join(orch.logs())


def test_only_a_protected_server_is_given_a_key(
    make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a server inherit one from the host's environment."""
    for name in ("LLAMA_API_KEY", "LLAMA_ARG_CORS_ORIGINS", "LLAMA_ARG_UI"):
        monkeypatch.setenv(name, "of the host")
    make().load(model_a)
    env = fake.wait_for("start")["env"]
    assert not [name for name in env if name.startswith("LLAMA_A")]
    make(protect_server=True, slot="protected").load(model_a)
    (_, second) = [entry for entry in fake.entries() if entry["event"] == "start"]
    ours = {name: value for name, value in second["env"].items() if name.startswith("LLAMA_A")}
    assert "of the host" not in ours.values()
    assert ours["LLAMA_ARG_CORS_ORIGINS"] == "localhost"


def test_a_lease_can_be_made_without_a_key() -> None:
    """Test doubles of the orchestrator have none."""
    values: dict[str, Any] = {"base_url": "http://x", "pid": 1, "generation": 1}
    assert LeasedServer(**values).api_key is None
