"""Downloads over HTTP: progress, events, and failures as problem documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.demo import tiny_model
from orchestrator.http import create_app
from tests.kit.fake_hub import Hub, Repo
from tests.kit.http import PREFIX, problem, serving, until
from tests.kit.process.support import Background

pytestmark = pytest.mark.external

NAME = "org/Tiny-GGUF"


@pytest.fixture
def client(llama_server: str, state_dir: Path) -> Iterator[httpx.Client]:
    with serving(create_app(llama_server=llama_server, state_dir=state_dir)) as client:
        yield client


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Repo:
    big = tiny_model.write_tiny_model(tmp_path / "big.gguf", padding_bytes=6 << 20)
    return hub.add(Repo(NAME, {"tiny-Q8_0.gguf": big}))


def events_of(client: httpx.Client, until_dest: str) -> Iterator[dict[str, Any]]:
    """Yield every event from the first on, as members with `id` and `event`."""
    headers = {"Last-Event-ID": "0"}
    with client.stream("GET", PREFIX + "/events", headers=headers) as stream:
        event: dict[str, Any] = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "data":
                event |= json.loads(value)
            elif name:
                event[name] = value
            elif event.get("event"):
                yield event
                if event.get("dest") == until_dest:
                    return
                event = {}


def test_events_have_every_transition_and_progress_step(
    client: httpx.Client, repo: Repo, hub: Hub
) -> None:
    """A step has the id of the transition before it, so that ids can be resumed from."""
    slow = hub.fail(bytes_per_s=4 << 20, path="/cdn/")
    followed = Background(lambda: list(events_of(client, "Healthy")))
    loading = Background(client.post, PREFIX + "/load", json={"model_path": NAME})
    until(client, lambda status: status["state"] == "Downloading")
    shown = client.get(PREFIX + "/load-progress").json()
    assert shown["phase"] == "downloading"
    assert loading.result().status_code == 200
    slow.remove()
    events = followed.result()
    steps = [event for event in events if event["event"] == "progress"]
    assert steps, "the download took more than a second"
    done = [step["bytes_done"] for step in steps if step["phase"] == "downloading"]
    assert done == sorted(done)
    assert [int(event["id"]) for event in events] == sorted(int(event["id"]) for event in events)
    dests = [event["dest"] for event in events if event["event"] == "transition"]
    assert dests == ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    outcome = client.get(PREFIX + "/status").json()["loaded"]
    assert outcome["revision"] == repo.commit


@pytest.mark.parametrize(
    ("settings", "wanted", "status", "category"),
    [
        ({}, {"model_path": "org/none"}, 404, "model_not_found"),
        ({}, {"model_path": NAME, "gguf_variant": "Q2_K"}, 404, "model_not_found"),
        ({"gated": True}, {"model_path": "org/Closed"}, 403, "hub_gated"),
        ({}, {"model_path": NAME, "prefetch": True, "gguf_variant": "F16"}, 404, "model_not_found"),
    ],
)
def test_failed_download_is_a_problem_document(
    client: httpx.Client,
    repo: Repo,
    hub: Hub,
    settings: dict[str, Any],
    wanted: dict[str, Any],
    status: int,
    category: str,
) -> None:
    if settings:
        hub.add(Repo("org/Closed", {"a.gguf": b"x"}, **settings))
    answer = client.post(PREFIX + "/load", json=wanted)
    assert problem(answer) == (status, category)
    assert answer.json()["field"] in {"model_path", "gguf_variant", "hf_token"}


def test_load_with_prefetch_is_accepted_at_once_and_can_be_polled(
    client: httpx.Client, repo: Repo, hub: Hub
) -> None:
    hold = hub.fail(hang=True, path="/cdn/")
    wanted = {"model_path": NAME, "prefetch": True}
    accepted = client.post(PREFIX + "/load?wait=false", json=wanted)
    assert accepted.status_code == 202
    hub.wait_for(lambda: hold.held)
    status = client.get(PREFIX + "/status").json()
    assert (status["state"], status["loading"]["phase"]) == ("Idle", "downloading")
    assert "outcome" not in client.get(accepted.headers["Location"]).json()
    hold.remove()
    ended = client.get(accepted.headers["Location"], params={"wait_s": 30}).json()
    assert ended["outcome"]["status"] == "loaded"
