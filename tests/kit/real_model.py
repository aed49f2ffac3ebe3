"""Questions to the real model. As a program: put the model into the cache, with a progress bar."""

from __future__ import annotations

import http.client
import json
import sys
from typing import Any
from urllib.parse import urlsplit

from orchestrator import Orchestrator
from orchestrator.demo.real_model import Unavailable, fetch_with_bar

CAPITAL = "What is the capital of France, and what is it famous for?"
RIGHT = "The capital of France is Paris"
ONE_THREAD = ("--threads", "1")
"""Tests run two at a time, and threads that wait for a processor in turns are slow."""


def post(orch: Orchestrator, path: str, body: object) -> tuple[int, Any]:
    """Post JSON to the server, under a lease; return the status and the JSON of its answer."""
    with orch.lease() as server:
        address = urlsplit(server.base_url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def chat(orch: Orchestrator, question: str, *, max_tokens: int = 24, **more: Any) -> Any:
    """Return the JSON of an answer at temperature 0, computed from the first token on."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "cache_prompt": False,
    }
    status, answer = post(orch, "/v1/chat/completions", body | more)
    assert status == 200, answer
    return answer


def text_of(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def main() -> int:
    try:
        print(f"real model: {fetch_with_bar()}")
    except Unavailable as error:
        print(f"no real model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
