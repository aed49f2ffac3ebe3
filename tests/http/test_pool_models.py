"""`/api/models`: what a pool has, what is added and removed, and each model by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from orchestrator import AsyncModelPool, ModelPool
from orchestrator.http import create_app
from tests.kit.http import Serve, problem
from tests.kit.pools import MODELS, catalogue_of, model, serving_pool, until_model
from tests.kit.process.support import Fake, is_running
from tests.kit.sentences import assert_sentence

Members = dict[str, Any]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(tmp_path / "fake")
    yield server
    assert not server.running()


@pytest.fixture
def files(tiny_model: str, other_model: str) -> dict[str, str]:
    return {"chat": tiny_model, "other": other_model}


@pytest.fixture
def options(fake: Fake, state_dir: Path) -> Members:
    return {"llama_server": fake.path, "server_env": fake.env, "state_dir": state_dir}


@pytest.fixture
def client(files: dict[str, str], options: Members) -> Iterator[httpx.Client]:
    """A pool of two models with room for both, of which `chat` is the default."""
    presets = {"presets": {"short": {"max_tokens": 3}}, "aliases": ["gpt-4o-mini"]}
    with serving_pool(catalogue_of(files, {"default": "chat"}, chat=presets), **options) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return client.post(MODELS + path, json=body)


def test_a_slash_of_a_name_is_sent_encoded(files: dict[str, str], options: Members) -> None:
    named = {"aliases": ["org/chat:Q4"]}
    with serving_pool(catalogue_of(files, chat=named), **options) as client:
        for path in ("/org%2Fchat:Q4", "/org%2fchat%3AQ4", "/chat"):
            assert client.get(MODELS + path).json()["name"] == "chat"
        assert client.get(f"{MODELS}/org/chat:Q4").status_code == 404
        assert problem(client.get(f"{MODELS}/org%2Fnone")) == (404, "model_not_found")
        taken = client.post(MODELS, json={"name": "org/new", "model_path": files["chat"]})
        assert problem(taken) == (400, "invalid_request")


def test_pool_lists_its_models_and_its_budget(client: httpx.Client) -> None:
    found = client.get(MODELS).json()
    [host] = [one for one in found["budget"] if one["device"] == "Host"]
    assert host == {"device": "Host", "total_mib": 1024, "reserved_mib": 0}
    assert found["waiting"] == []
    assert [one["name"] for one in found["models"]] == ["chat", "other"]
    chat = found["models"][0]
    assert chat == model(client, "chat") == model(client, "gpt-4o-mini")
    assert chat == {
        "name": "chat",
        "kind": "chat",
        "aliases": ["gpt-4o-mini"],
        "presets": ["short"],
        "state": "Idle",
        "pinned": False,
        "group": None,
        "memory": {"mib": 100, "source": "declared", "devices": {"Host": 100}},
        "leases": 0,
        "waiting": 0,
        "generation": 0,
        "pid": None,
        "last_used_at": None,
        "last_error": None,
    }


def test_model_is_loaded_and_unloaded_by_hand(client: httpx.Client) -> None:
    loaded = client.post(f"{MODELS}/chat/load")
    assert loaded.status_code == 200, loaded.text
    members = loaded.json()
    assert (members["status"], members["generation"], members["evicted"]) == ("loaded", 1, [])
    assert is_running(members["pid"])
    again = post(client, "/chat/load", on_busy="queue", stall_timeout_s=5, deadline_s=30).json()
    assert (again["status"], again["pid"]) == ("already_loaded", members["pid"])
    shown = model(client, "chat")
    assert (shown["state"], shown["pid"], shown["generation"]) == ("Healthy", members["pid"], 1)
    status = client.get(f"{MODELS}/chat/status").json()
    assert (status["state"], status["loaded"]["pid"]) == ("Healthy", members["pid"])
    assert client.get(f"{MODELS}/chat/load-progress").json()["phase"] == "ready"
    [load] = client.get(f"{MODELS}/chat/loads").json()["loads"]
    assert (load["generation"], load["state"]) == (1, "Healthy")
    assert "listening on" in "\n".join(client.get(f"{MODELS}/chat/logs").json()["lines"])
    assert "<svg" in client.get(f"{MODELS}/chat/diagram.svg").text
    other = post(client, "/chat/load", force_reload=True).json()
    assert (other["generation"], other["pid"] == members["pid"]) == (2, False)
    assert client.post(f"{MODELS}/chat/unload").json() == {"status": "unloaded"}
    assert model(client, "chat")["state"] == "Idle"
    assert not is_running(other["pid"])
    assert post(client, "/chat/unload", cut=True).json() == {"status": "unloaded"}


def test_plan_says_what_would_be_evicted(files: dict[str, str], options: Members) -> None:
    with serving_pool(catalogue_of(files, {"max_resident": 1}), **options) as client:
        client.post(f"{MODELS}/chat/load")
        plan = client.post(f"{MODELS}/other/plan").json()
        assert (plan["action"], plan["fits"], plan["evict"]) == ("load", True, ["chat"])
        assert plan["memory"]["mib"] == 100
        assert client.post(f"{MODELS}/chat/plan").json()["action"] == "none"
        assert client.post(f"{MODELS}/other/load").json()["evicted"] == ["chat"]
        assert model(client, "chat")["state"] == "Idle"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/chat/load", {"model_path": "x"}, "model_path"),
        ("/chat/load", {"max_seq_length": 1}, "max_seq_length"),
        ("/chat/load", {"force_reload": "yes"}, "force_reload"),
        ("/chat/load", {"cut": True}, "cut"),
        ("/chat/plan", {"idle_ttl_s": 1}, "idle_ttl_s"),
        ("/chat/unload", {"model_path": "x"}, "model_path"),
        ("/chat/cancel", {"name": "x"}, "name"),
    ],
)
def test_bodies_have_only_what_the_catalogue_does_not_decide(
    client: httpx.Client, path: str, body: Members, field: str
) -> None:
    answer = client.post(MODELS + path, json=body)
    assert problem(answer) == (422, "malformed")
    assert answer.json()["field"] == field
    assert model(client, "chat")["state"] == "Idle"


def test_unknown_model_is_404_that_lists_what_there_is(client: httpx.Client) -> None:
    asks = [client.get(f"{MODELS}/no"), client.delete(f"{MODELS}/no")]
    asks += [client.post(f"{MODELS}/no/{what}") for what in ("load", "unload", "plan", "cancel")]
    paths = ("status", "load-progress", "loads", "loads/1", "logs", "events", "diagram.svg")
    asks += [client.get(f"{MODELS}/no/{what}") for what in paths]
    for answer in asks:
        assert problem(answer) == (404, "model_not_found")
    assert_sentence("pool.not_found", asks[0].json()["detail"])


def test_inference_means_the_default_model(client: httpx.Client) -> None:
    loaded = client.post("/api/inference/load").json()
    assert loaded["status"] == "loaded"
    assert model(client, "chat")["pid"] == loaded["pid"]
    assert client.get("/api/inference/status").json()["state"] == "Healthy"
    assert client.get("/api/inference/load-progress").json()["phase"] == "ready"
    assert client.post("/api/inference/unload").json() == {"status": "unloaded"}
    assert model(client, "chat")["state"] == "Idle"


def test_without_a_default_inference_is_400_that_names_the_way(
    files: dict[str, str], options: Members
) -> None:
    with serving_pool(catalogue_of(files), **options) as client:
        answer = client.get("/api/inference/status")
        assert problem(answer) == (400, "invalid_request")
        assert_sentence("pool.no_default", answer.json()["detail"])
        assert client.post("/api/inference/load").status_code == 400
    with serving_pool(catalogue_of({"chat": files["chat"]}), **options) as client:
        assert client.get("/api/inference/status").json()["state"] == "Idle"


def test_load_that_nobody_waits_for_is_polled(client: httpx.Client) -> None:
    answer = client.post(f"{MODELS}/chat/load?wait=false")
    assert (answer.status_code, answer.json()) == (202, {"generation": 1})
    where = answer.headers["location"]
    assert where == f"{MODELS}/chat/loads/1"
    state = client.get(where, params={"wait_s": 20}).json()
    assert (state["state"], state["outcome"]["status"]) == ("Healthy", "loaded")
    assert state["outcome"]["pid"] == model(client, "chat")["pid"]
    again = client.post(f"{MODELS}/chat/load?wait=false")
    assert again.json() == {"generation": 1}
    assert problem(client.get(f"{MODELS}/chat/loads/2")) == (404, "unknown_generation")


def test_load_that_is_refused_before_its_start_has_its_outcome(
    files: dict[str, str], options: Members
) -> None:
    large = {"memory": "2 GiB"}
    with serving_pool(catalogue_of(files, other=large), **options) as client:
        where = client.post(f"{MODELS}/other/load?wait=false").headers["location"]
        state = client.get(where, params={"wait_s": 20}).json()
        assert (state["state"], state["outcome"]["category"]) == ("Idle", "too_large")
        assert problem(client.post(f"{MODELS}/other/load")) == (507, "too_large")


def test_deadline_of_a_load_ends_its_wait(client: httpx.Client, fake: Fake) -> None:
    fake.behave(bind_after_s=60)
    answer = post(client, "/chat/load", deadline_s=0.2)
    assert problem(answer) == (504, "deadline")
    assert_sentence("pool.deadline", answer.json()["detail"])
    until_model(client, "chat", lambda one: one["state"] == "Idle")
    assert not fake.running()


def test_stall_timeout_of_a_load_is_that_of_its_server(client: httpx.Client, fake: Fake) -> None:
    fake.behave(loading_s=-1)
    answer = post(client, "/chat/load", stall_timeout_s=0.3)
    assert problem(answer) == (504, "stalled")
    fake.behave()
    assert post(client, "/chat/load", stall_timeout_s=20).status_code == 200


def test_cancel_ends_the_load_in_flight_and_nothing_else(client: httpx.Client, fake: Fake) -> None:
    assert client.post(f"{MODELS}/chat/cancel").json() == {"cancelled": False}
    fake.behave(loading_s=-1)
    with ThreadPoolExecutor() as threads:
        loading = threads.submit(client.post, f"{MODELS}/chat/load")
        until_model(client, "chat", lambda one: one["state"] == "WaitingHealth")
        assert client.post(f"{MODELS}/chat/cancel").json() == {"cancelled": True}
        assert problem(loading.result()) == (409, "cancelled")
    fake.behave()
    pid = client.post(f"{MODELS}/chat/load").json()["pid"]
    assert client.post(f"{MODELS}/chat/cancel").json() == {"cancelled": False}
    assert model(client, "chat")["pid"] == pid


def test_cancel_by_id_ends_its_own_load_only(client: httpx.Client, fake: Fake) -> None:
    fake.behave(loading_s=-1)
    with ThreadPoolExecutor() as threads:
        mine = threads.submit(post, client, "/chat/load", load_request_id="mine")
        other = threads.submit(post, client, "/chat/load", load_request_id="other")
        until_model(client, "chat", lambda one: one["waiting"] == 2)
        assert post(client, "/chat/cancel", load_request_id="no").json() == {"cancelled": False}
        assert post(client, "/other/cancel", load_request_id="mine").json() == {"cancelled": False}
        assert post(client, "/chat/cancel", load_request_id="mine").json() == {"cancelled": True}
        assert problem(mine.result()) == (409, "cancelled")
        until_model(client, "chat", lambda one: one["waiting"] == 1)
        assert not other.done()
        assert post(client, "/chat/cancel", load_request_id="other").json() == {"cancelled": True}
        assert problem(other.result()) == (409, "cancelled")
    until_model(client, "chat", lambda one: one["state"] == "Idle")


def test_cancel_that_overtakes_its_load_wins(client: httpx.Client, fake: Fake) -> None:
    assert post(client, "/chat/cancel", load_request_id="late").json() == {"cancelled": False}
    refused = post(client, "/chat/load", load_request_id="late")
    assert problem(refused) == (409, "cancelled")
    assert_sentence("pool.load_cancelled", refused.json()["detail"])
    assert fake.entries("start") == []
    assert post(client, "/chat/load", load_request_id="another").status_code == 200
    assert post(client, "/chat/cancel", load_request_id="another").json() == {"cancelled": False}
    again = post(client, "/chat/load", load_request_id="another")
    assert again.json()["status"] == "already_loaded"  # that cancel came after its load


def test_model_is_added_and_removed(client: httpx.Client, tiny_model: str) -> None:
    fields = {"model_path": tiny_model, "memory": "50 MiB", "aliases": ["extra"]}
    added = client.post(MODELS, json={"name": "more", **fields})
    assert added.status_code == 201, added.text
    assert added.headers["location"] == f"{MODELS}/more"
    assert added.json() == model(client, "extra")
    assert added.json()["memory"]["mib"] == 50
    pid = client.post(f"{MODELS}/more/load").json()["pid"]
    taken = client.post(MODELS, json={"name": "more", **fields})
    assert problem(taken) == (409, "name_taken")
    assert taken.json()["field"] == "name"
    assert client.delete(f"{MODELS}/more").status_code == 204
    assert not is_running(pid)
    assert problem(client.get(f"{MODELS}/more")) == (404, "model_not_found")
    assert client.post(MODELS, json={"name": "more", **fields}).status_code == 201


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({}, 422, "name"),
        ({"name": 1}, 422, "name"),
        ({"name": "a b", "model_path": "x"}, 400, "name"),
        ({"name": "more"}, 422, "model_path"),
        ({"name": "more", "base_url": "http://127.0.0.1:1/v1"}, 400, "base_url"),
        ({"name": "more", "model_path": "x", "api_key_file": "key"}, 400, "api_key_file"),
        ({"name": "more", "model_path": "x", "wieght": 2}, 422, "wieght"),
        ({"name": "more", "model_path": "x", "on_busy": "reject"}, 400, "on_busy"),
        ({"name": "more", "model_path": "x", "aliases": ["chat"]}, 409, "aliases"),
        (
            {"name": "more", "model_path": "x", "llama_extra_args": ["--port", "1"]},
            400,
            "llama_extra_args",
        ),
    ],
)
def test_model_with_a_mistake_is_not_added(
    client: httpx.Client, fields: Members, status: int, field: str
) -> None:
    answer = client.post(MODELS, json=fields)
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
    assert [one["name"] for one in client.get(MODELS).json()["models"]] == ["chat", "other"]


def test_files_in_extra_args_are_refused_where_the_api_has_keys(
    files: dict[str, str], options: Members, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    entry: Members = {"name": "more", "model_path": files["chat"], "memory": "1 MiB"}
    entry["llama_extra_args"] = ["--grammar-file", str(secret)]
    app = {"api_keys": ["k"]}
    with serving_pool(catalogue_of(files), app=app, **options) as client:
        client.headers["Authorization"] = "Bearer k"
        answer = client.post(MODELS, json=entry)
        assert problem(answer) == (400, "refused_argument")
        assert client.get(f"{MODELS}/more").status_code == 404


def test_events_of_all_models_have_one_sequence_of_ids(client: httpx.Client) -> None:
    with client.stream("GET", "/api/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        client.post(f"{MODELS}/chat/load")
        client.post(f"{MODELS}/other/load")
        client.post(f"{MODELS}/chat/unload")
        seen = _events(stream, 12)
    assert [number for number, _ in seen] == sorted(number for number, _ in seen)
    by_model = {
        name: [e["dest"] for _, e in seen if e["model"] == name] for name in ["chat", "other"]
    }
    start = ["Killing", "Downloading", "Spawning", "WaitingHealth", "Healthy"]
    assert by_model == {"chat": [*start, "Killing", "Idle"], "other": start}
    number, _ = seen[4]
    with client.stream("GET", "/api/events", headers={"Last-Event-ID": str(number)}) as stream:
        assert _events(stream, 7) == seen[5:]
    headers = {"Last-Event-ID": "0"}
    with client.stream("GET", f"{MODELS}/other/events", headers=headers) as stream:
        assert _events(stream, 5) == [one for one in seen if one[1]["model"] == "other"]


def _events(stream: httpx.Response, count: int) -> list[tuple[int, Members]]:
    """Return the next transitions of a stream."""
    found: list[tuple[int, Members]] = []
    event: dict[str, str] = {}
    for line in stream.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
            continue
        if event.get("event") == "transition":
            found.append((int(event["id"]), json.loads(event["data"])))
            if len(found) == count:
                break
        event = {}
    return found


def test_reading_wakes_no_slot(client: httpx.Client, fake: Fake, state_dir: Path) -> None:
    """An entry at rest has neither process nor thread, whoever looks at it."""
    with (
        client.stream("GET", f"{MODELS}/chat/events") as events,
        client.stream("GET", f"{MODELS}/chat/logs?follow=true") as logs,
    ):
        assert (events.status_code, logs.status_code) == (200, 200)
        client.get(f"{MODELS}/chat/status")
        client.get(MODELS)
        slots = [path.name for path in state_dir.iterdir() if path.name.startswith("default.")]
        assert slots == []
    assert fake.entries("start") == []


def test_followed_log_goes_on_over_a_restart(client: httpx.Client) -> None:
    with client.stream("GET", f"{MODELS}/chat/logs?follow=true") as stream:
        lines = (line for line in stream.iter_lines() if "listening on" in line)
        client.post(f"{MODELS}/chat/load")
        first = next(lines)
        client.post(f"{MODELS}/chat/unload")
        client.post(f"{MODELS}/chat/load")
        assert next(lines) != first


def test_single_slot_has_no_models(serve: Serve) -> None:
    with serve() as client:
        assert problem(client.get(MODELS)) == (404, "not_found")
        assert problem(client.get("/api/events")) == (404, "not_found")


def test_app_has_one_owner(files: dict[str, str], options: Members) -> None:
    catalogue = catalogue_of(files)
    with pytest.raises(TypeError, match="AsyncModelPool, not ModelPool"):
        create_app(pool=cast("AsyncModelPool", ModelPool(catalogue, **options)))
    with pytest.raises(TypeError, match="give a pool, an orchestrator, or the options"):
        create_app(pool=AsyncModelPool(catalogue, **options), slot="x")


# ------------------------------------------------------------------------------ pins, and finding


def test_model_is_pinned_until_the_file_is_read_again(
    files: dict[str, str], options: Members, tmp_path: Path
) -> None:
    """At once, without a reload; what is added at run time stays pinned."""
    catalogue = tmp_path / "models.toml"
    text = '[pool]\nmemory = "1 GiB"\n[models.chat]\nmemory = "100 MiB"\n'
    catalogue.write_text(f'{text}model_path = "{files["chat"]}"\n')
    with serving_pool(str(catalogue), **options) as client:
        post(client, "", name="more", model_path=files["other"], memory="100 MiB")
        pid = client.post(f"{MODELS}/chat/load").json()["pid"]
        for name in ("chat", "more"):
            assert client.post(f"{MODELS}/{name}/pin").json()["pinned"]
        assert model(client, "chat")["pinned"]
        assert model(client, "chat")["pid"] == pid
        assert post(client, "/more/pin", pinned=False).json()["pinned"] is False
        post(client, "/more/pin", pinned=True)
        assert client.post("/api/catalogue").json()["changed"] == ["chat"]
        assert not model(client, "chat")["pinned"]
        assert model(client, "more")["pinned"]
        assert model(client, "chat")["pid"] == pid


def test_pins_that_exceed_the_budget_or_a_group_are_refused(
    files: dict[str, str], options: Members
) -> None:
    catalogue = catalogue_of(
        files, chat={"memory": "700 MiB", "pinned": True}, other={"memory": "700 MiB"}
    )
    with serving_pool(catalogue, **options) as client:
        assert problem(client.post(f"{MODELS}/other/pin"))[0] == 400
        assert "1400 MiB" in client.post(f"{MODELS}/other/pin").json()["detail"]
        assert not model(client, "other")["pinned"]
        assert problem(client.post(f"{MODELS}/no/pin")) == (404, "model_not_found")
        assert problem(post(client, "/other/pin", pin=True)) == (422, "malformed")
    catalogue = catalogue_of(files, chat={"group": "g", "pinned": True}, other={"group": "g"})
    with serving_pool(catalogue, **options) as client:
        assert problem(client.post(f"{MODELS}/other/pin")) == (400, "invalid_request")
        assert not model(client, "other")["pinned"]


def test_models_on_disk_and_variants_are_for_those_who_may_add(
    files: dict[str, str], options: Members, tmp_path: Path
) -> None:
    catalogue = catalogue_of(files)
    for name, more in (("boss", {"admin": True}), ("ann", {}), ("bob", {"models": ["chat"]})):
        (tmp_path / name).write_text(f"key-of-{name}")
        key = {"key_file": str(tmp_path / name), **more}
        catalogue.setdefault("keys", {})[name] = key
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(files["chat"], folder / "mine.gguf")
    with serving_pool(catalogue, models_dir=folder, **options) as client:
        for name, status in (("boss", 200), ("ann", 403), ("bob", 403)):
            headers = {"X-Api-Key": f"key-of-{name}"}
            found = client.get("/api/on-disk", headers=headers)
            assert found.status_code == status, found.text
            body = {"model_path": "mine.gguf"}
            listed = client.post("/api/variants", json=body, headers=headers)
            assert listed.status_code == status, listed.text
            if status == 200:
                [one] = [m for m in found.json()["models"] if m["where"] == "folder"]
                assert one["model_path"] == "mine.gguf"
                assert found.json()["free_bytes"] > 0
                assert len(listed.json()["variants"]) == 1
