"""A page of another origin looks for llama-server on the ports of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser

from tests.kit.http import PREFIX
from tests.kit.panel import Start

# What a page can send without asking first, and whether it may read the answer. A simple request
# needs no preflight, and llama-server reads JSON whatever its type is said to be.
SCAN = """async (ports) => {
    const found = []
    const body = JSON.stringify({prompt: "hi", messages: [{role: "user", content: "hi"}],
                                 n_predict: 2, max_tokens: 2})
    for (const port of ports) for (const path of
             ["/props", "/slots", "/v1/models", "/completion", "/v1/chat/completions"]) {
        for (const [method, mode] of [["GET", "cors"], ["POST", "cors"], ["POST", "no-cors"]]) {
            const more = method === "GET" ? {} : {body, headers: {"Content-Type": "text/plain"}}
            try {
                const answer = await fetch(`http://127.0.0.1:${port}${path}`,
                                           {method, mode, credentials: "include", ...more})
                found.push([path, method, mode, answer.status])
            } catch { found.push([path, method, mode, "unreadable"]) }
        }
    }
    return found
}"""


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def foreign_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://evil.localhost:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("protect_server", [True, False])
@pytest.mark.parametrize("kind", ["embedded", pytest.param("external", marks=pytest.mark.external)])
def test_page_of_another_origin_finds_nothing_it_can_use(
    start: Start,
    chromium: Browser,
    foreign_url: str,
    tiny_model: str,
    kind: str,
    protect_server: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Without protection it cannot read either, but it can make the model work."""
    binary = kind if kind == "embedded" else request.getfixturevalue("llama_server")
    client = start(llama_server=binary, protect_server=protect_server)
    body = {"model_path": tiny_model, "llama_extra_args": ["-v"]}
    loaded = client.post(PREFIX + "/load", json=body).json()
    ports = [urlsplit(loaded["base_url"]).port, client.base_url.port]
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(foreign_url)
        found = page.evaluate(SCAN, ports)
    assert len(found) == 30
    assert [one for one in found if one[3] not in (0, "unreadable")] == []  # 0: an opaque answer
    log = "\n".join(client.get(PREFIX + "/logs", params={"lines": 2000}).json()["lines"])
    assert ("launch_slot_" in log) is not protect_server
