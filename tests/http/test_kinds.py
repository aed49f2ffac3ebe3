"""Servers for chats, embeddings and reranking: what they answer, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.kit.http import PREFIX, Serve, problem

LOAD = PREFIX + "/load"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat/completions": ("chat", CHAT),
    "completions": ("chat", {"prompt": "hi", "max_tokens": 2}),
    "responses": ("chat", {"input": "hi", "max_output_tokens": 2}),
    "messages": ("chat", CHAT),
    "embeddings": ("embedding", {"input": ["one", "another"]}),
    "rerank": ("rerank", {"query": "one", "documents": ["another", "one"]}),
    "reranking": ("rerank", {"query": "one", "documents": ["another", "one"]}),
}


@pytest.fixture(params=["embedded", pytest.param("llama_server", marks=pytest.mark.external)])
def client(request: pytest.FixtureRequest, serve: Serve) -> Iterator[httpx.Client]:
    binary = request.param
    with serve(binary if binary == "embedded" else request.getfixturevalue(binary)) as client:
        yield client


def test_server_answers_only_routes_of_its_kind(client: httpx.Client, tiny_model: str) -> None:
    """Each change of kind is a reload with that reason."""
    running = None
    for kind in ("embedding", "rerank", "chat"):
        body = {"model_path": tiny_model, "kind": kind}
        if kind == "embedding":
            body["pooling"] = "mean"
        loaded = client.post(LOAD, json=body).json()
        reasons = {one["field"]: one for one in loaded["reload_reasons"]}
        if running is not None:
            assert reasons["kind"] == {"field": "kind", "running": running, "requested": kind}
        running = kind
        assert loaded.get("kind", "chat") == kind
        assert loaded.get("pooling") == body.get("pooling")
        assert loaded.get("cache_ram_mib") == (None if kind == "chat" else 0)
        assert client.post(LOAD, json=body).json()["status"] == "already_loaded"
        for route, (wanted, question) in BODIES.items():
            answer = client.post(f"/v1/{route}", json=question)
            if wanted == kind:
                assert answer.status_code == 200, (route, answer.text)
                continue
            assert problem(answer) == (400, "wrong_kind")
            assert f"/v1/{route}" in answer.json()["error"]["message"]
            assert kind in answer.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 200


def test_embeddings_and_rankings_depend_on_their_input(
    client: httpx.Client, tiny_model: str
) -> None:
    """So the model has really computed them."""
    wanted = {"model_path": tiny_model, "kind": "embedding"}
    client.post(LOAD, json={**wanted, "pooling": "last"})
    answer = client.post("/v1/embeddings", json=BODIES["embeddings"][1]).json()
    one, another = (each["embedding"] for each in answer["data"])
    assert len(one) == len(another)
    assert one != another
    assert any(one)

    client.post(LOAD, json={"model_path": tiny_model, "kind": "rerank"})
    ranked = client.post("/v1/rerank", json=BODIES["rerank"][1]).json()["results"]
    assert {each["index"] for each in ranked} == {0, 1}
    assert ranked[0]["relevance_score"] != ranked[1]["relevance_score"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kind": "embeddings"}, "kind"),
        ({"pooling": "mean"}, "pooling"),
        ({"kind": "rerank", "pooling": "max"}, "pooling"),
        ({"cache_ram_mib": -1}, "cache_ram_mib"),
        ({"llama_extra_args": ["--embedding"]}, "llama_extra_args"),
        ({"llama_extra_args": ["--pooling=cls"], "kind": "embedding"}, "llama_extra_args"),
    ],
)
def test_unusable_kind_settings_name_their_field(
    serve: Serve, tiny_model: str, body: dict[str, Any], field: str
) -> None:
    with serve() as client:
        answer = client.post(PREFIX + "/plan", json={"model_path": tiny_model, **body})
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    if field == "llama_extra_args":
        assert "use the field" in answer.json()["detail"]


def test_extra_args_are_not_inherited_across_kinds(serve: Serve, tiny_model: str) -> None:
    """Extra args are inherited by model, variant and kind."""
    with serve() as client:
        client.post(LOAD, json={"model_path": tiny_model, "llama_extra_args": ["--top-k", "7"]})
        vectors = client.post(LOAD, json={"model_path": tiny_model, "kind": "embedding"}).json()
        assert vectors["llama_extra_args"] == []
        again = client.post(LOAD, json={"model_path": tiny_model}).json()
        assert again["llama_extra_args"] == ["--top-k", "7"]
