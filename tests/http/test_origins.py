"""Checks of Host and Origin: over real sockets, byte by byte, and from within the process."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest
from orchestrator.http import create_app
from orchestrator.http.guards import guard, origins
from tests.kit.http import DEADLINE_S, PREFIX, category_of, problem, serving

STATUS = PREFIX + "/status"
LOAD = PREFIX + "/load"
Headers = list[tuple[str, str]]
Ask = Callable[..., tuple[int, str, http.client.HTTPMessage]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    app = create_app(
        llama_server="embedded",
        state_dir=tmp_path_factory.mktemp("origins"),
        allowed_hosts=["Box.Example", "2001:db8::1"],
    )
    with serving(app) as client:
        yield client


@pytest.fixture
def ask(served: httpx.Client) -> Ask:
    """Send exactly these headers; return status, category and headers."""

    def send(
        headers: Headers, method: str = "GET", path: str = STATUS, body: bytes = b""
    ) -> tuple[int, str, http.client.HTTPMessage]:
        address = served.base_url.host, served.base_url.port
        connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = "json" in answer.headers.get("Content-Type", "")  # not where h11 is first
        return answer.status, category_of(data) if is_json else "", answer.headers

    return send


def authority_of(client: httpx.Client) -> str:
    return f"{client.base_url.host}:{client.base_url.port}"


# ------------------------------------------------------------------------------------------- Host


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:1", "localhost.", "localhost.:80", "localhost:"),
        *("127.0.0.1", "127.0.0.1:65535", "127.8.7.6", "[::1]", "[::1]:8642"),
        *("[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"),
        *("box.example", "BOX.example:9", "box.example.", "[2001:DB8:0::1]"),
    ],
)
def test_local_and_allowed_hosts_are_answered(ask: Ask, host: str) -> None:
    assert ask([("Host", host)])[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8642", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("notlocalhost", "sub.box.example", "box.example.evil", "testserver", "test", "127.1"),
        *("10.0.0.1", "[2001:db8::2]", "0.0.0.0", "169.254.169.254", "2130706433"),
    ],
)
def test_foreign_host_is_refused_on_every_route(ask: Ask, host: str) -> None:
    """DNS rebinding (CVE-2024-28224 in a peer): a page's own name, resolved to this machine."""
    for path in (STATUS, "/v1/models", "/openapi.json", "/healthz", "/nowhere"):
        assert ask([("Host", host)], path=path)[:2] == (403, "forbidden_host")
    sent = [("Host", host), ("Origin", f"http://{host}"), ("Content-Type", "application/json")]
    body = b'{"model_path": "x"}'
    sent.append(("Content-Length", str(len(body))))
    assert ask(sent, "POST", LOAD, body)[:2] == (403, "forbidden_host")
    assert ask([("Host", "localhost")])[0] == 200


def test_refusal_of_a_host_names_the_option_that_allows_it(served: httpx.Client) -> None:
    answer = served.get(STATUS, headers={"Host": "evil.example:1"})
    assert problem(answer) == (403, "forbidden_host")
    assert "--allowed-host evil.example" in answer.json()["detail"]


@pytest.mark.parametrize(
    "hosts",
    [
        *([], ["localhost", "localhost"], ["localhost", "evil.example"], [""], [":80"]),
        *(["local host"], ["a/b"], ["a,b"], ["a@localhost"], ["[::1"], ["::1"], ["[1:2]"]),
        *(["localhost:0"], ["localhost:65536"], ["localhost:-1"], ["localhost:1:2"], ["."]),
        *(["localhost:\N{SUPERSCRIPT TWO}"], ["b\xfccher.example"], ["-"], ["a..b/"]),
    ],
)
def test_missing_repeated_or_malformed_host_is_400(ask: Ask, hosts: list[str]) -> None:
    """RFC 9112 section 3.2; a second one smuggles a name past a proxy."""
    assert ask([("Host", host) for host in hosts])[0] == 400


@pytest.mark.parametrize("forged", ["testclient", "testserver", "127.0.0.1"])
def test_forwarded_headers_do_not_allow_a_host(ask: Ask, forged: str) -> None:
    """A page can send them, and uvicorn takes the client's address from them."""
    headers = [("X-Forwarded-For", forged), ("X-Forwarded-Host", "localhost")]
    headers.append(("Forwarded", f"for={forged};host=localhost"))
    assert ask([("Host", "testserver"), *headers])[:2] == (403, "forbidden_host")


@pytest.mark.parametrize(
    ("arrived", "host", "is_local"),
    [
        (("192.168.1.5", 80), "192.168.1.5", True),
        (("172.17.0.2", 80), "192.168.1.5:8642", True),  # forwarded to a container
        (("172.17.0.2", 80), "localhost", True),
        (("172.17.0.2", 80), "box", False),
        (("::1", 80), "192.168.1.5", False),
        (None, "192.168.1.5", True),  # a UNIX socket: no page can reach it
        (None, "box", False),
        (("testserver", 80), "testserver", True),
        (("TestServer", 80), "testserver", True),
        (("testserver", 80), "test", False),
        (("evil.example", 80), "evil.example", False),  # a server that copies the Host header
    ],
)
def test_host_is_local_depending_on_where_the_request_arrived(
    arrived: tuple[str, int] | None, host: str, is_local: bool
) -> None:
    found = origins.authority(host)
    assert found is not None
    assert origins.is_local(found, arrived) is is_local


# ----------------------------------------------------------------------------------------- Origin


def test_page_of_the_same_origin_is_answered(served: httpx.Client, ask: Ask) -> None:
    host = ("Host", authority_of(served))
    own = [host, ("Origin", f"http://{authority_of(served)}"), ("Sec-Fetch-Site", "same-origin")]
    assert ask(own)[0] == 200
    body = b'{"generation": 9}'
    posted = [*own, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    assert ask(posted, "POST", PREFIX + "/cancel", body)[0] == 200
    usual = [("Host", "box.example"), ("Origin", "https://box.example")]  # behind TLS
    assert ask(usual)[0] == 200
    assert ask([("Host", "box.example:443"), ("Origin", "https://BOX.example")])[0] == 200


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "", "http://evil.example", "https://evil.example", "http://localhost:{port}"),
        *("http://127.0.0.1", "http://127.0.0.1:1", "https://127.0.0.1", "ftp://127.0.0.1:{port}"),
        *("http://127.0.0.1:{port}.evil.example", "http://x@127.0.0.1:{port}", "127.0.0.1:{port}"),
        *("chrome-extension://abc", "file://", "http://127.0.0.1:{port}/", "http://[::1]:{port}"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_page_of_another_origin_is_refused(
    served: httpx.Client, ask: Ask, origin: str, method: str
) -> None:
    """CSRF: whatever it sends, with or without a preflight."""
    given = origin.format(port=served.base_url.port)
    for path in (LOAD, "/v1/chat/completions", "/healthz"):
        status, category, headers = ask(
            [("Host", authority_of(served)), ("Origin", given)], method, path
        )
        assert (status, category) == (403, "forbidden_origin")
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_two_origin_headers_are_refused(served: httpx.Client, ask: Ask) -> None:
    own = ("Origin", f"http://{authority_of(served)}")
    assert ask([("Host", authority_of(served)), own, own])[:2] == (403, "forbidden_origin")


def test_preflight_is_refused_and_no_answer_has_cors_headers(
    served: httpx.Client, ask: Ask
) -> None:
    asked = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "x")]
    foreign = [("Host", authority_of(served)), ("Origin", "http://localhost:5173"), *asked]
    assert ask(foreign, "OPTIONS", LOAD)[0] == 403
    own = [("Host", authority_of(served)), ("Origin", f"http://{authority_of(served)}"), *asked]
    for method, path in (("OPTIONS", LOAD), ("GET", STATUS), ("GET", "/healthz")):
        headers = ask(own, method, path)[2]
        assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("site", "mode", "dest", "method", "is_answered"),
    [
        ("same-origin", "cors", "empty", "POST", True),
        ("none", "navigate", "document", "GET", True),
        ("cross-site", "navigate", "document", "GET", True),  # a link to the panel
        ("same-site", "navigate", "document", "GET", True),
        ("cross-site", "navigate", "document", "POST", False),
        ("cross-site", "navigate", "iframe", "GET", False),
        ("cross-site", "no-cors", "image", "GET", False),
        ("same-site", "no-cors", "script", "GET", False),  # another port of this machine
        ("cross-site", "cors", "empty", "GET", False),
        ("nonsense", "", "", "GET", False),
    ],
)
def test_fetch_metadata_of_another_site_is_refused(
    served: httpx.Client, ask: Ask, site: str, mode: str, dest: str, method: str, is_answered: bool
) -> None:
    """Some cross-site requests carry no Origin; following a link to the panel is allowed."""
    said = [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", dest)]
    status, category, _ = ask([("Host", authority_of(served)), *said], method)
    assert (category != "forbidden_origin") == is_answered
    assert (status == 403) == (not is_answered)


def test_program_without_browser_headers_is_answered(served: httpx.Client) -> None:
    """curl and the SDKs send neither Origin nor Sec-Fetch headers."""
    assert served.get(STATUS).status_code == 200
    assert problem(served.post("/v1/completions")) == (503, "not_loaded")


def test_foreign_websocket_is_refused(served: httpx.Client, ask: Ask) -> None:
    """A browser opens one without a preflight."""
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
    upgrade.append(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="))
    foreign = [("Host", authority_of(served)), ("Origin", "http://evil.example"), *upgrade]
    assert ask(foreign, "GET", "/v1/realtime")[0] == 403
    rebound = [("Host", "evil.example"), ("Origin", "http://evil.example"), *upgrade]
    assert ask(rebound, "GET", "/v1/realtime")[0] == 403


async def _unreachable(*_: object) -> None:
    raise AssertionError("the request reached the app")


def _refused(kind: str, headers: list[tuple[bytes, bytes]]) -> Any:
    """Return the first message of the guard itself."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "path": "/", "headers": headers, "server": ("127.0.0.1", 80)}
    guarded = guard(_unreachable, [origins.refuse_foreign()], ())
    asyncio.run(guarded(scope, _unreachable, send))  # type: ignore[arg-type]
    return sent[0]


def test_host_and_origin_are_checked_whatever_the_http_server_checks() -> None:
    """uvicorn refuses some of these itself, and has no WebSockets without a library."""
    for headers in ([], [(b"host", b"localhost")] * 2):
        assert _refused("http", headers)["status"] == 400
    foreign = [(b"host", b"localhost"), (b"origin", b"http://evil.example")]
    assert _refused("http", foreign)["status"] == 403
    assert _refused("websocket", foreign) == {"type": "websocket.close", "code": 1008}


# ----------------------------------------------------------------------------- within the process


def test_test_client_is_answered(state_dir: Path) -> None:
    """It has no socket, and gives the name by which it calls the app."""
    with TestClient(create_app(llama_server="embedded", state_dir=state_dir)) as client:
        assert client.get(STATUS).json()["state"] == "Idle"
        assert client.post(PREFIX + "/cancel", json={"generation": 1}).status_code == 200
        for host in ("evil.example", "test"):
            answer = client.get(STATUS, headers={"Host": host})
            assert answer.json()["category"] == "forbidden_host"
        assert client.get(STATUS, headers={"Origin": "http://testserver"}).status_code == 200
        foreign = client.get(STATUS, headers={"Origin": "http://evil.example"})
        assert foreign.json()["category"] == "forbidden_origin"


@pytest.mark.parametrize("base_url", ["http://test", "http://testserver", "http://127.0.0.1:1"])
def test_asgi_transport_is_answered(state_dir: Path, base_url: str) -> None:
    async def main() -> None:
        app = create_app(llama_server="embedded", state_dir=state_dir)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            assert (await client.get("/healthz")).status_code == 200
            rebound = await client.get("/healthz", headers={"Host": "evil.example"})
            assert problem(rebound) == (403, "forbidden_host")

    asyncio.run(main())


# ------------------------------------------------------------------------------------ the setting


@pytest.mark.parametrize(
    "host",
    [
        *("", " ", "*", "*.example", "http://box", "box:80", "box:", "a b", "a/b", "[::1", "a,b"),
        *("x@box", "box\n", "b\xfccher", None, 3, ".", ":80"),
    ],
)
def test_allowed_host_must_be_a_bare_name_or_address(host: object) -> None:
    """A pattern would protect from nothing, or allow nothing."""
    hosts: Any = [host]
    if host == "box\n":
        assert create_app(allowed_hosts=hosts)  # white space is stripped
        return
    with pytest.raises(InvalidRequest) as refused:
        create_app(allowed_hosts=hosts)
    assert refused.value.field == "allowed_hosts"


def test_allowed_hosts_are_normalised() -> None:
    given = ("Box.Example.", "::1", "[2001:DB8::0:1]", "10.0.0.1")
    assert origins.checked_hosts(given) == {"box.example", "::1", "2001:db8::1", "10.0.0.1"}
    assert origins.checked_hosts("box") == {"box"}


@given(
    st.text(max_size=40) | st.from_regex(r"\[?[0-9a-z:.%]{0,20}\]?(:[0-9]{0,6})?", fullmatch=True)
)
@settings(deadline=None)
def test_authority_of_any_text_is_safe_or_none(text: str) -> None:
    """A parsed name has no character that a URL reserves, and parses to itself."""
    found = origins.authority(text)
    if found is None:
        return
    assert not set(found.name) & set("/@?#\\ \t\r\n,;")
    again = f"[{found.name}]" if ":" in found.name else found.name
    assert origins.authority(again) == found._replace(port=None)
    assert found.port is None or 0 < found.port < 65536


def test_http_1_0_request_without_host_is_400(served: httpx.Client) -> None:
    """HTTP/1.0 has no Host; no page can send such a request."""
    address = str(served.base_url.host), int(served.base_url.port or 0)
    with socket.create_connection(address, timeout=DEADLINE_S) as raw:
        raw.sendall(f"GET {STATUS} HTTP/1.0\r\n\r\n".encode())
        assert raw.recv(65536).split(b"\r\n")[0].split()[1] == b"400"
