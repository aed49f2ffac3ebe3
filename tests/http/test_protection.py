"""The server's own port needs a key that only lease holders and the pass-through have."""

from __future__ import annotations

from typing import Any

import httpx
import psutil
import pytest

from tests.kit.http import PREFIX, Serve
from tests.kit.process.support import key_of

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.mark.parametrize("api_keys", [(), ("s3cret",)])
def test_server_port_is_of_no_use_to_other_programs(
    serve: Serve, tiny_model: str, api_keys: tuple[str, ...]
) -> None:
    """Any program and any web page of this machine can find the port, which judges no origin."""
    with serve(api_keys=api_keys) as client:
        client.headers["Authorization"] = "Bearer s3cret"
        loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
        there = loaded["base_url"] + "/v1/chat/completions"
        key = key_of(loaded["pid"])
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer s3cret"}, 401),  # nor does the API's key open it
            (key, 200),
        ):
            direct = httpx.post(there, json=CHAT, headers=headers, trust_env=False, timeout=20)
            assert direct.status_code == status
        passed = client.post("/v1/chat/completions", json=CHAT)
        assert passed.json()["usage"]["completion_tokens"] == 2
        secret = key["Authorization"].removeprefix("Bearer ")
        assert len(secret) == 43
        for path in ("/status", "/logs", "/loads/1"):
            assert secret not in client.get(PREFIX + path).text
        client.post(PREFIX + "/load", json={"model_path": tiny_model, "force_reload": True})
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_server_port_is_open_without_protection(serve: Serve, tiny_model: str) -> None:
    """Also where the API needs a key."""
    options: dict[str, Any]
    for options in ({"api_keys": ["k"]}, {}):
        with serve(protect_server=False, **options) as client:
            client.headers["Authorization"] = "Bearer k"
            loaded = client.post(PREFIX + "/load", json={"model_path": tiny_model}).json()
            there = loaded["base_url"] + "/v1/models"
            assert httpx.get(there, trust_env=False, timeout=20).status_code == 200
            assert "LLAMA_API_KEY" not in psutil.Process(loaded["pid"]).environ()
            client.post(PREFIX + "/unload")
