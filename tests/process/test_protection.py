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
    with Orchestrator(llama_server=binary, state_dir=state_dir) as orch:
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


@pytest.mark.parametrize("given", ["key", ["key"], None, 1])
def test_protection_is_on_or_off(given: Any, state_dir: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Orchestrator(state_dir=state_dir, protect_server=given)
    assert_sentence("option.protect_server", caught.value.message, value=repr(given))
    assert caught.value.field == "protect_server"


@pytest.mark.parametrize("kind", ["embedded", pytest.param("external", marks=pytest.mark.external)])
def test_a_protected_server_has_no_web_ui_and_allows_no_foreign_origin(
    kind: str, tiny_model: str, state_dir: Path, request: pytest.FixtureRequest
) -> None:
    """By default llama-server lets any web page read its answers, with credentials."""
    binary = kind if kind == "embedded" else request.getfixturevalue("llama_server")
    with Orchestrator(llama_server=binary, state_dir=state_dir) as orch:
        orch.load(tiny_model)
        with orch.lease() as server:
            key = server.api_key
            assert ask(server.base_url, "/", key)[0] == 404
            evil = ask(server.base_url, "/props", key, Origin="http://evil.example")
            assert evil == (200, None)


@pytest.mark.parametrize("kind", ["embedded", pytest.param("external", marks=pytest.mark.external)])
def test_an_unprotected_server_needs_no_key_and_is_still_hardened(
    kind: str, tiny_model: str, state_dir: Path, request: pytest.FixtureRequest
) -> None:
    binary = kind if kind == "embedded" else request.getfixturevalue("llama_server")
    with Orchestrator(llama_server=binary, state_dir=state_dir, protect_server=False) as orch:
        outcome = orch.load(tiny_model)
        assert ask(outcome.base_url, "/v1/chat/completions")[0] == 200
        assert ask(outcome.base_url, "/")[0] == 404
        evil = ask(outcome.base_url, "/props", Origin="http://evil.example")
        assert evil == (200, None)
        assert "LLAMA_API_KEY" not in psutil.Process(outcome.pid).environ()
        with orch.lease() as server:
            assert server.api_key is None


def test_a_server_that_ignores_its_key_fails_to_start(make: Make, fake: Fake, model_a: str) -> None:
    """It would serve every program without anyone noticing."""
    orch = make()
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
    orch = make()
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
    orch = make(llama_server=fake.wrapper('env; "$SERVER" "$@"; exit $?'))
    orch.load(model_a)
    with orch.lease() as server:
        key = server.api_key
    lines = [line for line in orch.logs() if "LLAMA_API_KEY" in line]
    assert lines == [f"LLAMA_API_KEY={HIDDEN}"]
    assert str(key) not in "".join(orch.logs())


def test_no_server_inherits_a_key_or_an_open_door(
    make: Make, fake: Fake, model_a: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLAMA_API_KEY", "LLAMA_ARG_CORS_ORIGINS", "LLAMA_ARG_UI"):
        monkeypatch.setenv(name, "of the host")
    make().load(model_a)
    make(protect_server=False, slot="open").load(model_a)
    starts = [entry["env"] for entry in fake.entries() if entry["event"] == "start"]
    ours = [{n: v for n, v in env.items() if n.startswith("LLAMA_A")} for env in starts]
    assert [("LLAMA_API_KEY" in one) for one in ours] == [True, False]
    assert not [one for one in ours if "of the host" in one.values()]
    assert {one["LLAMA_ARG_CORS_ORIGINS"] for one in ours} == {"localhost"}


def test_a_lease_can_be_made_without_a_key() -> None:
    """Test doubles of the orchestrator have none."""
    values: dict[str, Any] = {"base_url": "http://x", "pid": 1, "generation": 1}
    assert LeasedServer(**values).api_key is None
