"""A front over replicas that are plain apps: what is passed on, tried again, and merged."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import fastapi
import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from orchestrator.cluster.app import Ingress
from orchestrator.cluster.door import Door
from orchestrator.cluster.routing import ModelReport, ReplicaReport
from tests.kit.http import problem, serving
from tests.kit.process.support import until

CHAT = "/v1/chat/completions"
LISTING = ("GET", "/api/models")
REPLICAS = "/api/replicas"
Answers = dict[tuple[str, str], tuple[int, Any]]


class Replica:
    """An app that says who it is, or gives a fixed answer; it remembers what it was asked."""

    def __init__(self, name: str, answers: Answers | None = None) -> None:
        self.name = name
        self.answers = answers or {}
        self.asked: list[tuple[str, str]] = []
        self.headers: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        asked = (scope["method"], request.url.path)
        mine: dict[str, Any] = {"replica": self.name, "size": len(body)}
        if asked == LISTING and asked not in self.answers:  # the front's own question
            assert "transfer-encoding" not in request.headers, "the client's body is not for all"
            mine = {"models": [{"name": "m"}]}
        else:
            self.asked.append(asked)
            self.headers = dict(request.headers)
        status, members = self.answers.get(asked, (200, mine))
        await JSONResponse(members, status)(scope, receive, send)


class Handle:
    """The handle of a Serve deployment, as far as fronts use it."""

    def __init__(self) -> None:
        self.reports: list[object] = []

    def broadcast(self, method: str) -> Handle:
        assert method == "report"
        return self

    async def results_async(self, **_: object) -> list[object]:
        return self.reports


def report(name: str, url: object, value: str = "loaded", **more: Any) -> ReplicaReport:
    known = {"is_ready": True, "models": (ModelReport("m", value),), "names": {"m": "m"}, **more}
    return ReplicaReport(name, f"node-{name}", url=str(url).rstrip("/"), key=f"key-{name}", **known)


@pytest.fixture
def handle() -> Handle:
    return Handle()


@pytest.fixture
def client(handle: Handle) -> Iterator[httpx.Client]:
    """A client of a front that asks this handle."""
    ingress = Ingress(handle, 0.5, ("llm.example.org",))
    app = ingress.__serve_build_asgi_app__()
    with serving(cast("fastapi.FastAPI", app)) as found:
        yield found


@contextlib.contextmanager
def replicas(handle: Handle, *some: Replica, **more: Any) -> Iterator[None]:
    """Serve these replicas, each behind its door; the first is the best one."""
    with contextlib.ExitStack() as life:
        for number, one in enumerate(some):
            door = cast("fastapi.FastAPI", Door(one, f"key-{one.name}"))
            url = life.enter_context(serving(door)).base_url
            value = "unloaded" if number else "loaded"
            handle.reports.append(report(one.name, url, value, **more))
        yield


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post(CHAT, json={"model": "m", **more})


def test_the_keys_of_a_user_go_along_and_those_of_fronts_do_not(
    client: httpx.Client, handle: Handle
) -> None:
    one = Replica("1")
    with replicas(handle, one):
        given = {"Authorization": "Bearer ann", "Cookie": "c", "Proxy-Authorization": "Bearer x"}
        answer = client.post(f"{CHAT}?model=m", headers=given)
        assert answer.json()["replica"] == "1"
        assert one.headers["authorization"] == "Bearer ann"
        assert one.headers["proxy-authorization"] == "Bearer key-1"
        assert "cookie" not in one.headers
        [known] = handle.reports
        assert isinstance(known, ReplicaReport)
        direct = httpx.post(
            f"{known.url}{CHAT}", headers={"Authorization": "Bearer key-1"}, trust_env=False
        )
        assert direct.status_code == 401


def test_a_large_body_is_sent_again_in_full(client: httpx.Client, handle: Handle) -> None:
    """It is in a file by then."""
    refusal = {"error": {"message": "", "code": "shutting_down"}}
    first, second = Replica("1", {("POST", CHAT): (503, refusal)}), Replica("2")
    with replicas(handle, first, second):
        body = json.dumps({"model": "m", "text": "x" * (3 << 20)})
        answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.json() == {"replica": "2", "size": len(body)}
    assert len(first.asked) == len(second.asked) == 1


@pytest.mark.parametrize(
    ("status", "code", "is_elsewhere"),
    [
        (503, "shutting_down", True),
        (503, "server_exited", True),
        (429, "too_many_waiting", True),
        (503, "unavailable", False),
        (424, "server_start_failed", False),
        (400, "bad_request", False),
    ],
)
def test_which_refusals_another_replica_may_mend(
    client: httpx.Client, handle: Handle, status: int, code: str, is_elsewhere: bool
) -> None:
    refusal = {"error": {"message": "no", "code": code}}
    with replicas(handle, Replica("1", {("POST", CHAT): (status, refusal)}), Replica("2")):
        answer = ask(client)
    if is_elsewhere:
        assert answer.json()["replica"] == "2"
    else:
        assert (answer.status_code, answer.json()) == (status, refusal)


def test_the_last_refusal_is_the_answer_where_nobody_is_left(
    client: httpx.Client, handle: Handle
) -> None:
    refusal = {"error": {"message": "full", "code": "too_many_waiting"}}
    with replicas(handle, Replica("1", {("POST", CHAT): (429, refusal)})):
        answer = ask(client)
    assert (answer.status_code, answer.json()) == (429, refusal)


@contextlib.contextmanager
def hanging_up(said: bytes = b"") -> Iterator[str]:
    """A listener that reads a request, says this and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connected, _ = listener.accept()
                    connected.recv(1 << 16)
                    connected.sendall(said)
                    connected.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["nothing", "head", "head of a stream"],
)
def test_a_replica_that_is_gone_is_passed_over(
    client: httpx.Client, handle: Handle, said: bytes
) -> None:
    """Nothing listens at the first, the second ends before a byte of the body."""
    with hanging_up(said) as lost, replicas(handle, Replica("3")):
        handle.reports[:0] = [report("1", "http://127.0.0.1:9"), report("2", lost)]
        assert ask(client).json()["replica"] == "3"


def test_an_answer_that_has_begun_is_not_sent_for_again(
    client: httpx.Client, handle: Handle
) -> None:
    other = Replica("2")
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"
    with hanging_up(said) as lost, replicas(handle, Replica("0"), other):
        handle.reports[0] = report("1", lost)
        with pytest.raises(httpx.RemoteProtocolError):
            ask(client)
        assert other.asked == []


def test_head_of_a_stream_of_events_is_passed_on_before_there_is_one(
    client: httpx.Client, handle: Handle
) -> None:
    """There may be none for a long time, and its client waits for the head."""
    said = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Who: 1\r\n\r\n"
    with hanging_up(said) as lost, replicas(handle, Replica("0"), Replica("2")):
        handle.reports[0] = report("1", lost)
        with client.stream("GET", "/api/models/m/events") as answer:
            assert answer.headers["X-Who"] == "1"
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()


def test_what_may_have_been_executed_is_not_sent_again(
    client: httpx.Client, handle: Handle
) -> None:
    other = Replica("2")
    with hanging_up() as lost, replicas(handle, Replica("0"), other):
        handle.reports[0] = report("1", lost)
        answer = client.post("/api/models/m/load")
        assert problem(answer) == (502, "bad_gateway")
        assert other.asked == []
        handle.reports[0] = report("1", "http://127.0.0.1:9")  # it has not seen the request
        until(lambda: client.post("/api/models/m/load").status_code == 200, "sent to the other")


def test_a_request_waits_for_a_replica_but_not_for_ever(
    client: httpx.Client, handle: Handle
) -> None:
    answer = ask(client)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"]["code"] == "unavailable"


def test_a_front_answers_for_itself(client: httpx.Client, handle: Handle) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert problem(client.get("/readyz")) == (503, "not_loaded")
    assert client.get("/elsewhere").status_code == 404
    assert client.get("/v1/%2e%2e/api").status_code == 404
    with replicas(handle, Replica("1")):
        until(lambda: client.get("/readyz").status_code == 200, "ready")
        [one] = client.get(REPLICAS).json()["replicas"]
        assert (one["replica"], one["node"], one["names"]) == ("1", "node-1", ["m"])
        assert "key-1" not in json.dumps(one)


def test_what_a_key_may_not_see_of_a_pool_it_does_not_see_of_the_replicas(
    client: httpx.Client, handle: Handle
) -> None:
    """Their pools judge the key, here by what they list."""
    one, two = Replica("1"), Replica("2")
    two.answers[LISTING] = (200, {"models": [{"name": "other"}]})
    both = {
        "models": (ModelReport("m", "loaded"), ModelReport("other", "loaded")),
        "names": {"m": "m", "o": "other"},
        "free": {"Host": 7},
        "problem": {"message": "models.other: a mistake"},
    }
    with replicas(handle, one, two, **both):
        until(lambda: len(client.get(REPLICAS).json()["replicas"]) == 2, "both are known")
        for found in client.get(REPLICAS).json()["replicas"]:
            assert found["names"] == ["m", "o"]
            assert found["free"] == {"Host": 7}
        two.answers[LISTING] = (200, {"models": [{"name": "m"}]})
        for found in client.get(REPLICAS).json()["replicas"]:
            assert [model["name"] for model in found["models"]] == ["m"]
            hidden = (found["url"], found["free"], found["problem"], found["default"])
            assert (found["names"], hidden) == (["m"], (None, {}, None, None))
        two.answers[LISTING] = (401, {"category": "unauthorized"})
        assert client.get(REPLICAS).status_code == 401


def test_only_names_of_the_service_and_its_own_pages_may_ask(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"Host": "llm.example.org"}).status_code == 200
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/healthz", headers={"Origin": "http://evil.example"}).status_code == 403


def test_lists_of_models_become_one(client: httpx.Client, handle: Handle) -> None:
    def listing(**values: str) -> dict[str, Any]:
        data = [{"id": name, "status": {"value": value}} for name, value in values.items()]
        return {"object": "list", "data": data}

    def pool(mib: int, state: str, waiting: list[Any]) -> dict[str, Any]:
        return {
            "budget": [{"device": "Host", "total_mib": 100, "reserved_mib": mib}],
            "models": [{"name": "m", "state": state, "leases": mib, "waiting": 1}],
            "waiting": waiting,
        }

    one = Replica(
        "1",
        {
            ("GET", "/v1/models"): (200, listing(m="unloaded", a="failed")),
            ("GET", "/api/models"): (
                200,
                pool(0, "Idle", [{"model": "m", "count": 1, "oldest_s": 2.0}]),
            ),
        },
    )
    two = Replica(
        "2",
        {
            ("GET", "/v1/models"): (200, listing(m="loaded", b="loading")),
            ("GET", "/api/models"): (
                200,
                pool(7, "Healthy", [{"model": "m", "count": 2, "oldest_s": 1.0}]),
            ),
        },
    )
    with replicas(handle, one, two):
        until(lambda: len(client.get(REPLICAS).json()["replicas"]) == 2, "both are known")
        assert client.get("/v1/models").json() == listing(m="loaded", a="failed", b="loading")
        assert client.get("/api/models").json() == {
            "budget": [{"device": "Host", "total_mib": 200, "reserved_mib": 7}],
            "models": [{"name": "m", "state": "Healthy", "leases": 7, "waiting": 2}],
            "waiting": [{"model": "m", "count": 3, "oldest_s": 2.0}],
        }


def test_a_change_reaches_every_replica_and_a_refusal_is_the_answer(
    client: httpx.Client, handle: Handle
) -> None:
    refusal = {"category": "invalid_catalogue"}
    one = Replica(
        "1", {("POST", "/api/catalogue"): (400, refusal), ("DELETE", "/api/models/m"): (404, {})}
    )
    two = Replica("2")
    with replicas(handle, one, two):
        until(lambda: len(client.get(REPLICAS).json()["replicas"]) == 2, "both are known")
        answer = client.post("/api/catalogue")
        assert (answer.status_code, answer.json()) == (400, refusal)
        assert client.post("/api/models/m/unload").status_code == 200
        assert client.delete("/api/models/m").status_code == 200, "one does not have it"
    assert one.asked == two.asked
    assert len(two.asked) == 3


def test_what_is_of_one_replica_names_it(client: httpx.Client, handle: Handle) -> None:
    with replicas(handle, Replica("1"), Replica("2")):
        until(lambda: len(client.get(REPLICAS).json()["replicas"]) == 2, "both are known")
        answer = client.get("/api/usage")
        assert (problem(answer), answer.json()["field"]) == ((400, "invalid_request"), "replica")
        assert client.get("/api/usage?replica=2").json()["replica"] == "2"
        assert client.get("/metrics?replica=node-1").json()["replica"] == "1"
