"""Keys of a catalogue: what each sees, uses and changes, and no trace of the rest."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import AsyncModelPool, InvalidRequest, ModelPool
from orchestrator.http import create_app
from tests.kit.http import problem, serving
from tests.kit.pools import MODELS, write_echo_server
from tests.kit.process.support import until
from tests.kit.sentences import assert_sentence

HIDDEN, ALIAS, PRESET = "hidden-model", "hidden-alias", "hidden-preset"
NOWHERE = "nowhere-model"
CHAT = "/v1/chat/completions"
KEYS = {
    "ann": "models = ['chat']",
    "boss": "models = ['chat']\nadmin = true",
    "root": "admin = true",
    "eve": "",
}


def written(folder: Path, files: dict[str, str], keys: dict[str, str], pool: str = "") -> Path:
    """Write a catalogue of two models, the second of them hidden from some keys."""
    lines = ["[pool]", 'memory = "150 MiB"', "min_resident_s = 0", "max_wait_s = 0.2", pool]
    for name, path in files.items():
        lines += [f"[models.{name}]", f"model_path = {path!r}", 'memory = "100 MiB"']
        if name == HIDDEN:
            lines += [f"aliases = ['{ALIAS}']", f"presets.{PRESET}.top_k = 1"]
    for name, table in keys.items():
        (folder / f"{name}.key").write_text(f"key-of-{name}\n")
        lines += [f"[keys.{name}]", f"key_file = '{name}.key'", table]
    file = folder / "models.toml"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def files(tiny_model: str, other_model: str) -> dict[str, str]:
    return {"chat": tiny_model, HIDDEN: other_model}


@pytest.fixture
def pool(files: dict[str, str], tmp_path: Path, state_dir: Path) -> AsyncModelPool:
    file = written(tmp_path, files, KEYS)
    server = write_echo_server(tmp_path)
    return AsyncModelPool(file, llama_server=server, state_dir=state_dir, kill_grace_s=0.2)


@pytest.fixture
def client(pool: AsyncModelPool) -> Iterator[httpx.Client]:
    """The pool with a key of the service itself; requests have none unless a test gives one."""
    with serving(create_app(pool=pool, api_keys=["key-of-service"])) as client:
        yield client


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


def ask(client: httpx.Client, name: str, model: str | None, **members: Any) -> httpx.Response:
    body = members if model is None else {"model": model, **members}
    return client.post(CHAT, json=body, headers=as_(name))


def test_every_request_needs_a_key(client: httpx.Client) -> None:
    for headers in ({}, as_("nobody"), {"X-Api-Key": "key-of-an"}):
        for path in ("/v1/models", MODELS, "/metrics", "/openapi.json", f"{MODELS}/{NOWHERE}"):
            assert client.get(path, headers=headers).status_code == 401
    for path in ("/healthz", "/readyz", "/"):
        assert client.get(path).status_code == 200
    for name in ("service", "root", "ann"):
        assert client.get(MODELS, headers={"X-Api-Key": f"key-of-{name}"}).status_code == 200


def routes() -> list[tuple[str, str]]:
    """Every method and path of the document of a pool."""
    catalogue = {"models": {"chat": {"model_path": "a.gguf"}}}
    document = create_app(pool=AsyncModelPool(catalogue, llama_server="embedded")).openapi()
    return [(m.upper(), path) for path, methods in document["paths"].items() for m in methods]


def test_no_route_tells_a_key_of_what_it_does_not_see(client: httpx.Client) -> None:
    """In every place where a request can name a model: the hidden one is answered like none."""
    assert ask(client, "root", HIDDEN).status_code == 200
    secret = re.compile(f"{HIDDEN}|{ALIAS}|{PRESET}")
    for who in ("ann", "boss"):
        for method, route in routes():
            if route.endswith("/events") and "{name}" not in route:
                continue  # endless: below
            answers = []
            for name in (HIDDEN, NOWHERE, ALIAS):
                path = route.replace("{name}", name).replace("{generation}", "1")
                path = path.replace("{path}", "chat/completions")
                body = None if method in ("GET", "HEAD", "DELETE") else {"model": name}
                answer = client.request(method, path, json=body, headers=as_(who))
                said = answer.text.replace(name, "NAME")
                assert not secret.search(said), (who, method, route, said)
                answers.append((answer.status_code, re.sub(r"\d\.\d+", "", said)))
            if "{name}" in route or "{path}" in route or route == "/models/load":
                assert answers[0] == answers[1] == answers[2], (who, method, route)
    assert model_as(client, "root", HIDDEN)["generation"] == 1


def test_what_a_key_does_not_see_is_not_found(client: httpx.Client) -> None:
    answer = ask(client, "ann", HIDDEN)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.headers["x-should-retry"] == "false"
    message = f"there is no model '{HIDDEN}'; the models are: chat"
    assert answer.json()["error"]["message"] == message
    assert problem(client.get(f"{MODELS}/{HIDDEN}", headers=as_("ann"))) == (404, "model_not_found")


def test_listings_have_what_a_key_sees(client: httpx.Client) -> None:
    assert ask(client, "root", HIDDEN).status_code == 200
    for path in ("/v1/models", "/models"):
        listed = client.get(path, headers=as_("ann")).json()["data"]
        assert [one["id"] for one in listed] == ["chat"]
        listed = client.get(path, headers=as_("eve")).json()["data"]
        assert [one["id"] for one in listed] == ["chat", HIDDEN, ALIAS, f"{HIDDEN}:{PRESET}"]
    found = client.get(MODELS, headers=as_("ann")).json()
    assert [one["name"] for one in found["models"]] == ["chat"]
    [host] = [one for one in found["budget"] if one["device"] == "Host"]
    assert (host["total_mib"], host["reserved_mib"]) == (150, 0)
    found = client.get(MODELS, headers=as_("root")).json()
    [host] = [one for one in found["budget"] if one["device"] == "Host"]
    assert host["reserved_mib"] == 100


def test_key_of_one_model_need_not_name_it(client: httpx.Client) -> None:
    assert ask(client, "ann", None).status_code == 200
    assert ask(client, "eve", None).status_code == 400
    status = client.get("/api/inference/status", headers=as_("ann"))
    assert status.json()["state"] == "Healthy"


def test_without_admin_a_key_uses_and_reads_and_changes_nothing(client: httpx.Client) -> None:
    assert ask(client, "eve", "chat").status_code == 200
    for method, route in routes():
        path = route.replace("{name}", "chat").replace("{generation}", "1")
        if method in ("GET", "HEAD") or route.startswith("/v1/"):
            continue
        default = path.startswith("/api/inference")
        answer = client.request(method, path, headers=as_("ann" if default else "eve"))
        assert problem(answer) == (403, "forbidden"), (method, route)
    assert_sentence("key.no_admin", answer.json()["detail"])
    assert problem(client.get("/metrics", headers=as_("eve"))) == (403, "forbidden")
    assert model_as(client, "eve", "chat")["generation"] == 1


def model_as(client: httpx.Client, who: str, name: str) -> dict[str, Any]:
    members: dict[str, Any] = client.get(f"{MODELS}/{name}", headers=as_(who)).json()
    return members


def test_admin_of_some_models_controls_those_only(
    client: httpx.Client, files: dict[str, str], tmp_path: Path
) -> None:
    assert ask(client, "root", HIDDEN).status_code == 200
    plan = client.post(f"{MODELS}/chat/plan", headers=as_("boss")).json()
    assert (plan["fits"], plan["evict"]) == (True, [])
    plan = client.post(f"{MODELS}/chat/plan", headers=as_("root")).json()
    assert plan["evict"] == [HIDDEN]
    loaded = client.post(f"{MODELS}/chat/load", headers=as_("boss")).json()
    assert (loaded["status"], loaded["evicted"]) == ("loaded", [])
    assert client.post("/models/unload", json={"model": "chat"}, headers=as_("boss")).is_success
    added = {"name": "third", "model_path": files["chat"]}
    answer = client.post(MODELS, json=added, headers=as_("boss"))
    assert problem(answer) == (403, "forbidden")
    assert_sentence("key.some_models", answer.json()["detail"])
    metrics = client.get("/metrics", headers=as_("boss")).text
    assert 'model="chat"' in metrics
    assert HIDDEN not in metrics
    assert 'device="' not in metrics
    answer = client.post("/api/catalogue", headers=as_("boss"))
    assert answer.json() == {"added": [], "changed": [], "removed": [], "unchanged": ["chat"]}
    with (tmp_path / "models.toml").open("a") as file:
        file.write(f"\n[models.{HIDDEN}x]\nmodel = 1")
    answer = client.post("/api/catalogue", headers=as_("boss"))
    assert problem(answer) == (400, "invalid_catalogue")
    assert_sentence("key.mistake", answer.json()["detail"])
    assert HIDDEN in client.post("/api/catalogue", headers=as_("root")).text


def events(client: httpx.Client, who: str, path: str = "/api/events") -> Iterator[dict[str, Any]]:
    with client.stream("GET", path, headers=as_(who) | {"Last-Event-ID": "0"}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_events_are_of_models_that_a_key_sees(client: httpx.Client) -> None:
    for name in (HIDDEN, "chat"):
        assert ask(client, "root", name).status_code == 200
    for event in events(client, "ann"):
        assert event["model"] == "chat"
        if event.get("dest") == "Healthy":
            break
    assert next(events(client, "root"))["model"] == HIDDEN


def reread(client: httpx.Client) -> httpx.Response:
    return client.post("/api/catalogue", headers=as_("service"))


def test_withdrawn_key_is_refused_and_its_streams_of_events_end(
    client: httpx.Client, files: dict[str, str], tmp_path: Path
) -> None:
    """What it has begun at a model goes on."""
    go_on = tmp_path / "go on"
    members = {"stream": 2, "until": str(go_on)}
    body = {"model": "chat", **members}
    log = f"{MODELS}/chat/logs?follow=true"
    with (
        client.stream("POST", CHAT, json=body, headers=as_("ann")) as answer,
        client.stream("GET", "/api/events", headers=as_("ann")) as stream,
        client.stream("GET", log, headers=as_("ann")) as output,
    ):
        lines = answer.iter_lines()
        next(lines)
        written(tmp_path, files, {k: v for k, v in KEYS.items() if k != "ann"})
        assert reread(client).status_code == 200
        assert client.get("/v1/models", headers=as_("ann")).status_code == 401
        stream.read()
        output.read()
        go_on.touch()
        assert list(lines)[-2] == "data: [DONE]"


def test_stream_ends_when_its_key_gets_other_models(
    client: httpx.Client, files: dict[str, str], tmp_path: Path
) -> None:
    with client.stream("GET", "/api/events", headers=as_("eve")) as stream:
        written(tmp_path, files, KEYS | {"eve": "models = ['chat']"})
        assert reread(client).status_code == 200
        stream.read()
    assert ask(client, "eve", HIDDEN).status_code == 404


def test_key_may_be_changed_and_there_may_be_several_of_one_name(
    client: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "ann.key").write_text("\nkey-of-bob\n  key-of-cat  \n")
    assert client.get("/v1/models", headers=as_("ann")).status_code == 200  # until it is read
    assert reread(client).status_code == 200
    for name, status in (("ann", 401), ("bob", 200), ("cat", 200)):
        assert client.get("/v1/models", headers=as_(name)).status_code == status


@pytest.mark.parametrize(
    ("text", "key"),
    [(None, "key.absent"), ("\n", "key.empty"), ("ä\n", "key.not_ascii"), ("key-of-eve", "")],
    ids=["absent", "empty", "not ASCII", "of another"],
)
def test_file_of_a_key_that_cannot_be_used_changes_nothing(
    client: httpx.Client, tmp_path: Path, text: str | None, key: str
) -> None:
    file = tmp_path / "ann.key"
    file.unlink()
    if text is not None:
        file.write_text(text)
    answer = reread(client)
    assert problem(answer) == (400, "invalid_catalogue")
    assert client.get("/v1/models", headers=as_("ann")).status_code == 200
    detail = answer.json()["detail"]
    place, _, what = detail.partition(": ")
    assert re.fullmatch(r"models\.toml:\d+", place)
    if key == "key.absent":
        assert_sentence("key.absent", what)
    elif key == "key.empty":
        assert_sentence("key.empty", what)
    elif key == "key.not_ascii":
        assert_sentence("key.not_ascii", what)
    else:
        assert_sentence("key.taken", what)
    assert "key-of" not in detail


def test_file_of_a_key_is_read_before_anything_starts(tmp_path: Path, tiny_model: str) -> None:
    file = written(tmp_path, {"chat": tiny_model}, {"ann": ""})
    (tmp_path / "ann.key").unlink()
    with pytest.raises(InvalidRequest, match="key_file cannot be read") as caught:
        ModelPool(file, llama_server="embedded")
    assert caught.value.field == "keys.ann.key_file"


def test_service_that_has_had_keys_is_never_open(
    files: dict[str, str], tmp_path: Path, state_dir: Path
) -> None:
    """Neither does it stay open when keys come."""
    file = written(tmp_path, files, {})
    pool = AsyncModelPool(file, llama_server="embedded", state_dir=state_dir)
    with serving(create_app(pool=pool)) as client:
        assert client.get(MODELS).status_code == 200
        with client.stream("GET", "/api/events") as stream:
            written(tmp_path, files, {"root": "admin = true"})
            assert client.post("/api/catalogue").status_code == 200
            stream.read()
        assert client.get(MODELS).status_code == 401
        written(tmp_path, files, {})
        assert client.post("/api/catalogue", headers=as_("root")).status_code == 200
        assert client.get(MODELS).status_code == 401
        assert client.get(MODELS, headers=as_("root")).status_code == 401


def test_keys_share_a_model_by_weight(tiny_model: str, tmp_path: Path, state_dir: Path) -> None:
    """10:1: of the first 33 answers 30."""
    keys = {"much": "weight = 10", "little": ""}
    file = written(tmp_path, {"chat": tiny_model}, keys)
    file.write_text(file.read_text().replace("[models.chat]", "[models.chat]\nn_parallel = 1"))
    go_on = tmp_path / "go on"
    server = write_echo_server(tmp_path)
    pool = AsyncModelPool(file, llama_server=server, state_dir=state_dir, kill_grace_s=0.2)
    with (
        serving(create_app(pool=pool, api_keys=["key-of-service"])) as client,
        ThreadPoolExecutor(61) as threads,
    ):
        first = threads.submit(ask, client, "service", "chat", until=str(go_on))
        root = partial(model_as, client, "service", "chat")
        until(lambda: root()["leases"] == 1, "the first request at the server")
        asked = [(w, threads.submit(ask, client, w, "chat")) for w in ["little", "much"] * 30]
        until(lambda: root()["waiting"] == 60, "all waiting")
        go_on.touch()
        assert first.result().status_code == 200
        order = sorted((answer.result().json()["number"], who) for who, answer in asked)
    shares = Counter(who for _, who in order[:33])
    assert 27 <= shares["much"] <= 33
    assert abs(shares["much"] - 10 * shares["little"]) <= 3
