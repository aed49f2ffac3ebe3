"""`/v1` of a pool: each request goes to the model that it names."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from orchestrator.http.pool import upload
from tests.kit.http import problem
from tests.kit.pools import (
    MODELS,
    catalogue_of,
    model,
    serving_pool,
    until_model,
    write_echo_server,
)
from tests.kit.process.support import until
from tests.kit.sentences import assert_sentence

Members = dict[str, Any]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_echo_server(tmp_path_factory.mktemp("echo"))


@pytest.fixture
def options(echo: str, state_dir: Path) -> Members:
    return {"llama_server": echo, "state_dir": state_dir, "kill_grace_s": 0.2}


@pytest.fixture
def files(tiny_model: str, other_model: str) -> dict[str, str]:
    return {"chat": tiny_model, "other": other_model, "third": tiny_model}


@pytest.fixture
def entries() -> dict[str, Members]:
    presets = {"creative": {"temperature": 1.2, "stop": ["x"]}, "cold": {"temperature": 0}}
    return {
        "chat": {"aliases": ["gpt-4o-mini", "org/chat:Q4"], "presets": presets},
        "other": {"kind": "embedding"},
    }


@pytest.fixture
def client(
    files: dict[str, str], options: Members, entries: dict[str, Members]
) -> Iterator[httpx.Client]:
    """A pool of three models, with room for two."""
    catalogue = catalogue_of(files, {"memory": "250 MiB", "max_wait_s": 5}, **entries)
    with serving_pool(catalogue, **options) as client:
        yield client


def asked(client: httpx.Client, path: str = CHAT, **body: Any) -> Members:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    members: Members = answer.json()
    return members


def test_request_loads_the_model_that_it_names(client: httpx.Client) -> None:
    first = asked(client, model="chat", messages=[{"role": "user", "content": "hi"}])
    assert (first["alias"], first["model"]) == ("chat", "chat")
    assert first["sent"] == {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    other = asked(client, "/v1/embeddings", model="other", input="x")
    assert (other["alias"], other["path"]) == ("other", "/v1/embeddings")
    assert first["pid"] != other["pid"]
    assert asked(client, model="chat")["pid"] == first["pid"]
    assert model(client, "chat")["pid"] == first["pid"]
    third = asked(client, model="third")  # there is room for two: the older one goes
    assert third["alias"] == "third"
    states = {one["name"]: one["state"] for one in client.get(MODELS).json()["models"]}
    assert states == {"chat": "Healthy", "other": "Idle", "third": "Healthy"}


@pytest.mark.parametrize(
    "name", ["gpt-4o-mini", "org/chat:Q4", "chat:creative", "gpt-4o-mini:cold"]
)
def test_whatever_name_was_asked_the_server_hears_its_own(client: httpx.Client, name: str) -> None:
    answer = asked(client, model=name, top_k=1)
    assert (answer["alias"], answer["model"]) == ("chat", "chat")
    with client.stream("POST", CHAT, json={"model": name, "stream": 2}) as stream:
        data = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    assert [json.loads(one)["model"] for one in data] == ["chat", "chat"]


def test_preset_fills_what_a_request_leaves_out(client: httpx.Client) -> None:
    sent = asked(client, model="chat:creative", top_k=1)["sent"]
    assert sent == {"model": "chat", "top_k": 1, "temperature": 1.2, "stop": ["x"]}
    sent = asked(client, model="chat:creative", temperature=0.1)["sent"]
    assert sent == {"model": "chat", "temperature": 0.1, "stop": ["x"]}


def test_model_of_a_form_and_of_the_query(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/audio/transcriptions",
        data={"model": "gpt-4o-mini:cold", "language": "en"},
        files={"file": ("a.wav", b"RIFF\r\n--x")},
    ).json()
    assert (answer["alias"], answer["path"]) == ("chat", "/v1/audio/transcriptions")
    assert 'name="model"\r\n\r\nchat\r\n' in answer["sent"]
    assert 'name="temperature"\r\n\r\n0\r\n--' in answer["sent"]
    assert "gpt-4o-mini" not in answer["sent"]
    by_query = client.get("/v1/health", params={"model": "gpt-4o-mini", "x": "1"}).json()
    assert (by_query["alias"], by_query["path"]) == ("chat", "/v1/health?model=chat&x=1")
    posted = client.post("/v1/infill", params={"model": "third"}, json={"a": 1}).json()
    assert (posted["alias"], posted["sent"]) == ("third", {"a": 1, "model": "third"})


def test_without_a_name_and_a_default_it_is_400(client: httpx.Client) -> None:
    bodies: list[Members] = [{}, {"model": ""}, {"model": None}, {"messages": []}]
    for body in bodies:
        refused = client.post(CHAT, json=body)
        assert problem(refused) == (400, "invalid_request")
        assert refused.json()["error"]["param"] == "model"
        assert refused.headers["x-should-retry"] == "false"
    assert problem(client.get("/v1/health")) == (400, "invalid_request")


def test_default_or_only_entry(files: dict[str, str], options: Members) -> None:
    with serving_pool(catalogue_of(files, {"default": "other"}), **options) as client:
        assert asked(client)["alias"] == "other"
        assert client.get("/v1/health").json()["alias"] == "other"
        assert client.post("/v1/x", content=b"\x1f\x8bzip").json()["alias"] == "other"
    with serving_pool(catalogue_of({"chat": files["chat"]}), **options) as client:
        assert asked(client)["sent"] == {"model": "chat"}


def test_unknown_model_is_404_that_lists_what_there_is(client: httpx.Client) -> None:
    for name in ("no", "chat:no", "no:creative", "chat:creative:cold", "chat " * 200):
        answer = client.post(CHAT, json={"model": name})
        assert problem(answer) == (404, "model_not_found")
        assert answer.headers["x-should-retry"] == "false"
    message = client.post(CHAT, json={"model": "no"}).json()["error"]["message"]
    assert_sentence("pool.no_model_in_v1", message)
    assert problem(client.post(CHAT, json={"model": 7})) == (422, "malformed")
    assert model(client, "chat")["state"] == "Idle"


def test_route_of_another_kind_loads_nothing(client: httpx.Client) -> None:
    answer = client.post(CHAT, json={"model": "other"})
    assert problem(answer) == (400, "wrong_kind")
    assert problem(client.post("/v1/embeddings", json={"model": "chat"})) == (400, "wrong_kind")
    assert problem(client.post("/v1/rerank", json={"model": "other"})) == (400, "wrong_kind")
    assert model(client, "other")["generation"] == 0


def test_models_are_listed_by_all_their_names(client: httpx.Client) -> None:
    def values() -> dict[str, str]:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        return {one["id"]: one["status"]["value"] for one in listed["data"]}

    names = ["chat", "gpt-4o-mini", "org/chat:Q4", "chat:creative", "chat:cold", "other", "third"]
    assert values() == dict.fromkeys(names, "unloaded")
    asked(client, model="chat")
    assert values() == dict.fromkeys(names, "unloaded") | dict.fromkeys(names[:5], "loaded")
    assert client.get("/v1/models").json() == client.get("/models").json()
    assert client.get("/v1/models/chat:cold").json()["id"] == "chat:cold"
    assert problem(client.get("/v1/models/no")) == (404, "model_not_found")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x") as api:
        assert [one.id for one in api.models.list()] == names


def test_router_of_llama_server_is_answered(client: httpx.Client) -> None:
    assert client.post("/models/load", json={"model": "gpt-4o-mini"}).json() == {"success": True}
    until_model(client, "chat", lambda one: one["state"] == "Healthy")
    assert client.post("/models/unload", json={"model": "chat"}).json() == {"success": True}
    until_model(client, "chat", lambda one: one["state"] == "Idle")
    assert problem(client.post("/models/load", json={"model": "no"})) == (404, "model_not_found")
    assert problem(client.post("/models/load", json={})) == (422, "malformed")


@pytest.mark.parametrize("size", [100, 9 << 20])
@pytest.mark.parametrize("is_first", [True, False])
def test_large_body_passes_unchanged(client: httpx.Client, size: int, is_first: bool) -> None:
    """Also where `model` comes last, behind more than is kept in memory."""
    name, text = b'"model": "chat"', b'"text": "%b"' % (b"x" * size)
    body = b"{%b}" % b", ".join((name, text) if is_first else (text, name))
    answer = client.post(CHAT, content=body).json()
    assert (answer["size"], answer["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert answer["alias"] == "chat"


def test_body_that_cannot_be_kept_is_413(
    files: dict[str, str], options: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `model` first nothing is kept, and what was kept is given back."""
    monkeypatch.setattr(upload, "SPOOLED_BYTES", 4 << 20)
    text = b"x" * (5 << 20)
    with serving_pool(catalogue_of({"chat": files["chat"]}), **options) as client:
        for _ in range(2):
            refused = client.post(CHAT, content=b'{"text": "%b", "model": "chat"}' % text)
            assert problem(refused) == (413, "body_too_large")
            assert_sentence("pool.no_room_for_body", refused.json()["error"]["message"])
            for _ in range(2):
                short = b'{"text": "%b", "model": "chat"}' % text[: 3 << 20]
                assert client.post(CHAT, content=short).status_code == 200
        first = b'{"model": "chat", "text": "%b"}' % text
        assert client.post(CHAT, content=first).json()["size"] == len(first)


def test_burst_is_refused_at_once_and_nobody_else(
    files: dict[str, str], options: Members, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    pool = {"max_resident": 1, "max_waiting": 2, "max_wait_s": 60}
    with (
        serving_pool(catalogue_of(files, pool), **options) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        held = threads.submit(asked, client, model="chat", until=str(go))
        until_model(client, "chat", lambda one: one["leases"])
        waiting = [threads.submit(asked, client, "/v1/x", model="other") for _ in range(2)]
        until_model(client, "other", lambda one: one["waiting"] == 2)
        refused = client.post("/v1/x", json={"model": "third"})
        assert problem(refused) == (429, "too_many_waiting")
        assert int(refused.headers["retry-after"]) >= 1
        assert "x-should-retry" not in refused.headers
        assert asked(client, model="chat")["alias"] == "chat"
        go.touch()
        assert held.result()["alias"] == "chat"
        assert {one.result()["alias"] for one in waiting} == {"other"}


def test_client_that_leaves_withdraws_only_itself(
    files: dict[str, str], options: Members, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    pool = {"max_resident": 1, "max_wait_s": 60}
    with (
        serving_pool(catalogue_of(files, pool), **options) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        held = threads.submit(asked, client, model="chat", until=str(go))
        until_model(client, "chat", lambda one: one["leases"])
        stays = threads.submit(asked, client, "/v1/x", model="other")
        until_model(client, "other", lambda one: one["waiting"] == 1)
        whole, half = leaving(client, b'{"model": "other"}'), leaving(client, b'{"model": "other",')
        until_model(client, "other", lambda one: one["waiting"] == 3)
        whole.close()
        half.close()
        until_model(client, "other", lambda one: one["waiting"] == 1)
        go.touch()
        assert stays.result()["alias"] == "other"
        assert held.result()["alias"] == "chat"


def leaving(client: httpx.Client, body: bytes) -> socket.socket:
    """Begin a request that says that its body is 100 bytes longer, unless that is complete."""
    length = len(body) + (0 if body.endswith(b"}") else 100)
    one = socket.create_connection((client.base_url.host, client.base_url.port or 0))
    head = f"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n"
    one.sendall(head.encode() + body)
    return one


def test_failed_start_answers_the_same_for_a_while(
    files: dict[str, str], options: Members, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    catalogue = catalogue_of(files, third={"model_path": str(broken)})
    with serving_pool(catalogue, **options) as client:
        first, second = (client.post(CHAT, json={"model": "third"}) for _ in range(2))
        assert first.status_code == second.status_code
        assert first.json() == second.json()
        assert int(second.headers["retry-after"]) >= 1
        [value] = [
            one["status"]["value"]
            for one in client.get("/v1/models").json()["data"]
            if one["id"] == "third"
        ]
        assert value == "failed"
        assert model(client, "third")["last_error"]["category"]
        assert asked(client, model="chat")["alias"] == "chat"


def test_lease_lasts_as_long_as_the_answer(client: httpx.Client, tmp_path: Path) -> None:
    go, left = tmp_path / "go", tmp_path / "left"
    body = {"model": "chat", "stream": 1000, "until": str(go), "left": str(left)}
    with client.stream("POST", CHAT, json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        until_model(client, "chat", lambda one: one["leases"] == 1)
    until_model(client, "chat", lambda one: one["leases"] == 0)
    go.touch()
    until(left.exists, "the server to hear that its client has left")


def test_streamed_body_reaches_the_server_before_it_ends(client: httpx.Client) -> None:
    asked(client, model="chat")
    host = str(client.base_url).rpartition("/")[2]
    with contextlib.closing(http.client.HTTPConnection(host)) as uploading:
        uploading.putrequest("POST", "/v1/completions")
        uploading.putheader("Transfer-Encoding", "chunked")
        uploading.endheaders(b'12\r\n{"model": "chat", \r\n')
        until_model(client, "chat", lambda one: one["leases"] == 1)
        uploading.send(b'7\r\n"a": 1}\r\n0\r\n\r\n')
        assert json.loads(uploading.getresponse().read())["sent"] == {"model": "chat", "a": 1}


def test_server_elsewhere_is_asked_by_its_own_name_and_key(
    files: dict[str, str], options: Members, tmp_path: Path, state_dir: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    theirs = catalogue_of({"name-there": files["chat"]})
    there = serving_pool(
        theirs,
        app={"api_keys": ["s3cret"]},
        llama_server=options["llama_server"],
        slot="there",
        state_dir=state_dir,
    )
    with there as remote:
        elsewhere = {
            "base_url": f"{remote.base_url}/v1",
            "api_key_file": str(key),
            "upstream_model": "name-there",
            "presets": {"cold": {"temperature": 0}},
        }
        catalogue = catalogue_of({"chat": files["chat"]})
        catalogue["models"]["far"] = elsewhere
        with serving_pool(catalogue, **options) as client:
            answer = asked(client, model="far:cold")
            assert (answer["alias"], answer["model"]) == ("name-there", "far")
            assert answer["sent"] == {"model": "name-there", "temperature": 0}
            with client.stream("POST", CHAT, json={"model": "far", "stream": 2}) as stream:
                lines = [line for line in stream.iter_lines() if line]
            assert [json.loads(line[6:])["model"] for line in lines[:-1]] == ["far", "far"]
            assert lines[-1] == "data: [DONE]"
            shown = model(client, "far")
            assert (shown["state"], shown["pid"]) == ("Healthy", None)
            for what in ("load", "unload"):
                refused = client.post(f"{MODELS}/far/{what}")
                assert problem(refused) == (400, "invalid_request")
    with serving_pool(catalogue, **options) as client:
        gone = client.post(CHAT, json={"model": "far"})
        assert problem(gone) == (502, "bad_gateway")
        assert asked(client, model="chat")["alias"] == "chat"
