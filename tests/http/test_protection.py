"""Behind a key, the server's own port is no way round it, and the pass-through needs no help."""

from __future__ import annotations

import httpx
import psutil

from tests.kit.http import PREFIX, Serve

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_with_a_key_nobody_gets_round_it_by_the_servers_port(serve: Serve, tiny_model: str) -> None:
    """`base_url` is in every status: any program of this machine can read it off a port scan."""
    with serve(api_keys=["s3cret"]) as client:
        client.headers["Authorization"] = "Bearer s3cret"
        loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
        there = loaded["base_url"] + "/v1/chat/completions"
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer s3cre"}, 401),
            ({"Authorization": "Bearer s3cret"}, 200),  # a local client that was given the key
        ):
            direct = httpx.post(there, json=CHAT, headers=headers, trust_env=False, timeout=20)
            assert direct.status_code == status
        passed = client.post("/v1/chat/completions", json=CHAT)
        assert passed.json()["usage"]["completion_tokens"] == 2
        key = psutil.Process(loaded["pid"]).environ()["LLAMA_API_KEY"].partition(",")[0]
        assert len(key) == 43, "a key of its own beside those of the API"
        for path in ("/status", "/logs", "/loads/1"):
            assert key not in client.get(PREFIX + path).text
        client.post(PREFIX + "/load", json={"model_path": tiny_model, "force_reload": True})
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_who_says_so_keeps_the_port_open_behind_a_key(serve: Serve, tiny_model: str) -> None:
    """And without a key it is open, as the contract has it for local clients."""
    for options in ({"api_keys": ["k"], "protect_server": False}, {}):
        with serve(**options) as client:
            client.headers["Authorization"] = "Bearer k"
            loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
            there = loaded["base_url"] + "/v1/models"
            assert httpx.get(there, trust_env=False, timeout=20).status_code == 200
            client.post(PREFIX + "/unload")
