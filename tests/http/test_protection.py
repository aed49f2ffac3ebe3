"""With API keys, the server's own port needs one too, and the pass-through has the server's."""

from __future__ import annotations

import httpx
import psutil

from tests.kit.http import PREFIX, Serve

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_server_port_needs_the_api_key_too(serve: Serve, tiny_model: str) -> None:
    """Any program of this machine can find the port."""
    with serve(api_keys=["s3cret"]) as client:
        client.headers["Authorization"] = "Bearer s3cret"
        loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
        there = loaded["base_url"] + "/v1/chat/completions"
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer s3cre"}, 401),
            ({"Authorization": "Bearer s3cret"}, 200),  # a local client that has the key
        ):
            direct = httpx.post(there, json=CHAT, headers=headers, trust_env=False, timeout=20)
            assert direct.status_code == status
        passed = client.post("/v1/chat/completions", json=CHAT)
        assert passed.json()["usage"]["completion_tokens"] == 2
        key = psutil.Process(loaded["pid"]).environ()["LLAMA_API_KEY"].partition(",")[0]
        assert len(key) == 43, "the server has a key of its own"
        for path in ("/status", "/logs", "/loads/1"):
            assert key not in client.get(PREFIX + path).text
        client.post(PREFIX + "/load", json={"model_path": tiny_model, "force_reload": True})
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_server_port_is_open_without_protection(serve: Serve, tiny_model: str) -> None:
    """With `protect_server=False`, or without API keys."""
    for options in ({"api_keys": ["k"], "protect_server": False}, {}):
        with serve(**options) as client:
            client.headers["Authorization"] = "Bearer k"
            loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
            there = loaded["base_url"] + "/v1/models"
            assert httpx.get(there, trust_env=False, timeout=20).status_code == 200
            client.post(PREFIX + "/unload")
