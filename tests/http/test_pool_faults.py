"""What goes wrong with one model of a pool leaves the others alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from tests.kit.http import problem
from tests.kit.pools import (
    MODELS,
    catalogue_of,
    model,
    serving_pool,
    until_model,
    write_echo_server,
)
from tests.kit.process.support import Fake, is_running, until

Members = dict[str, Any]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_echo_server(tmp_path_factory.mktemp("echo"))


@pytest.fixture
def files(tiny_model: str, other_model: str) -> dict[str, str]:
    return {"bad": tiny_model, "good": other_model}


@pytest.fixture
def options(echo: str, state_dir: Path) -> Members:
    return {"llama_server": echo, "state_dir": state_dir, "kill_grace_s": 0.2}


@pytest.fixture
def client(files: dict[str, str], options: Members) -> Iterator[httpx.Client]:
    with serving_pool(catalogue_of(files), hang_timeout_s=1.0, **options) as client:
        yield client


@pytest.fixture
def good(client: httpx.Client) -> Iterator[Members]:
    """The other model, which must not notice anything."""
    before = asked(client, model="good")
    yield before
    assert asked(client, model="good")["pid"] == before["pid"]
    assert model(client, "good")["generation"] == 1


def asked(client: httpx.Client, **body: Any) -> Members:
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    members: Members = answer.json()
    return members


def test_server_that_crashes_under_a_request(client: httpx.Client, good: Members) -> None:
    pid = asked(client, model="bad")["pid"]
    lost = client.post(CHAT, json={"model": "bad", "crash": True})
    assert problem(lost) == (503, "server_exited")
    assert lost.headers["retry-after"]
    until(lambda: not is_running(pid), "its end")
    again = until(lambda: _answered(client), "the pool to hear of it")
    assert again["pid"] not in (pid, good["pid"])


def _answered(client: httpx.Client) -> Members | None:
    """Try once more, as clients do where they are told when."""
    answer = client.post(CHAT, json={"model": "bad"})
    assert answer.status_code == 200 or problem(answer) == (503, "server_exited")
    return answer.json() if answer.status_code == 200 else None


@pytest.mark.usefixtures("good")
def test_server_that_hangs_is_ended_and_comes_back(client: httpx.Client) -> None:
    pid = asked(client, model="bad")["pid"]
    os.kill(pid, signal.SIGSTOP)
    with contextlib.suppress(httpx.RemoteProtocolError):  # it may have begun its answer
        hung = problem(client.post(CHAT, json={"model": "bad"}))
        assert hung in {(503, "server_exited"), (502, "bad_gateway")}
    until(lambda: not is_running(pid), "the end of the server")
    status = until_model(client, "bad", lambda one: one["state"] == "Idle")
    assert status["pid"] is None
    assert client.get(f"{MODELS}/bad/status").json()["last_exit"]["reason"] == "hung"
    assert until(lambda: _answered(client), "the pool to hear of it")["pid"] != pid


@pytest.mark.usefixtures("good")
def test_server_that_ignores_its_end_is_killed(client: httpx.Client) -> None:
    pid = asked(client, model="bad")["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert client.post(f"{MODELS}/bad/unload").json() == {"status": "unloaded"}
    assert not is_running(pid)


def test_model_that_will_not_start(files: dict[str, str], state_dir: Path, tmp_path: Path) -> None:
    """Its requests fail at once for a while; a load by hand tries again."""
    fake = Fake(tmp_path / "fake")
    bad = Path(files["bad"]).name
    fake.behave(by_model={bad: {"exit_code": 1}})
    catalogue = catalogue_of(files)
    with serving_pool(
        catalogue, llama_server=fake.path, server_env=fake.env, state_dir=state_dir
    ) as client:
        for name in ("good", "bad", "good"):
            client.post(CHAT, json={"model": name})
        pid = model(client, "good")["pid"]
        starts = len(fake.entries("start"))
        answers = [client.post(CHAT, json={"model": "bad"}) for _ in range(3)]
        assert {problem(one) for one in answers} == {(424, "server_start_failed")}
        assert all(int(one.headers["retry-after"]) >= 1 for one in answers)
        assert len({one.text for one in answers}) == 1
        fake.behave()
        assert client.post(f"{MODELS}/bad/load").status_code == 200
        assert len(fake.entries("start")) <= starts + 2
        assert model(client, "good")["pid"] == pid


def test_burst_of_requests_is_answered_to_the_last(files: dict[str, str], options: Members) -> None:
    """Either served or refused at once, and the resident model serves all the while."""
    catalogue = catalogue_of(files, {"max_waiting": 20})
    with (
        serving_pool(catalogue, **options) as client,
        ThreadPoolExecutor(60) as threads,
    ):
        asked(client, model="good")
        bodies = [{"model": "bad"}] * 100 + [{"model": "good"}] * 20
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as many:
            answers = list(threads.map(lambda body: many.post(CHAT, json=body), bodies))
        found = Counter(one.status_code for one in answers[:100])
        assert found.keys() <= {200, 429}
        assert found[200] >= 20
        assert all("retry-after" in one.headers for one in answers if one.status_code == 429)
        assert model(client, "bad")["generation"] == 1
        assert {one.status_code for one in answers[100:]} <= {200, 429}


@pytest.mark.usefixtures("good")
def test_reader_that_does_not_read_holds_up_nobody_else(client: httpx.Client) -> None:
    asked(client, model="bad")
    body = json.dumps({"model": "bad", "stream": 10_000_000}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    address = client.base_url.host, client.base_url.port or 0
    with socket.create_connection(address) as slow:
        slow.sendall(head.encode() + body)
        until_model(client, "bad", lambda one: one["leases"] == 1)
        for _ in range(20):
            asked(client, model="good")
            asked(client, model="bad")
        assert model(client, "bad")["leases"] == 1
    until_model(client, "bad", lambda one: one["leases"] == 0)


@pytest.mark.usefixtures("good")
def test_swap_cuts_a_reader_that_does_not_read(client: httpx.Client) -> None:
    """Bounded by the drain: `cut` waits for nobody."""
    asked(client, model="bad")
    body = {"model": "bad", "stream": 10_000_000}
    with client.stream("POST", CHAT, json=body) as stream:
        assert stream.status_code == 200
        unloaded = httpx.post(f"{client.base_url}{MODELS}/bad/unload", json={"cut": True})
        assert unloaded.json() == {"status": "unloaded"}


@pytest.mark.usefixtures("good")
def test_answer_that_has_begun_ends_with_its_server(client: httpx.Client) -> None:
    """Cut, visibly; its connection is one that would be used again."""
    asked(client, model="bad")
    with ThreadPoolExecutor() as threads:
        half = threads.submit(client.post, CHAT, json={"model": "bad", "half": True})
        until_model(client, "bad", lambda one: one["leases"] == 1)
        unloaded = client.post(f"{MODELS}/bad/unload", json={"cut": True})
        assert unloaded.json() == {"status": "unloaded"}
        with pytest.raises(httpx.RemoteProtocolError):
            half.result(10)


@pytest.mark.external
def test_three_hundred_requests_over_three_models(
    llama_server: str, state_dir: Path, tmp_path: Path
) -> None:
    """None fails, and each is answered by the server of its own model, with room for two."""
    names = ("red", "green", "blue")
    files = {n: str(write_tiny_model(tmp_path / f"{n}.gguf", seed=i)) for i, n in enumerate(names)}
    models = {
        n: {"model_path": path, "cache_ram_mib": 0, "n_parallel": 2} for n, path in files.items()
    }
    pool = {"max_resident": 2, "min_resident_s": 0.5, "max_wait_s": 2}
    catalogue = {"pool": pool, "models": models}
    with (
        serving_pool(catalogue, llama_server=llama_server, state_dir=state_dir) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as api,
        ThreadPoolExecutor(60) as threads,  # so that not every request is a swap
    ):

        def ask(number: int) -> tuple[str, str]:
            name = names[number % 3]
            made = api.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": f"Number {number}"}],
                max_tokens=2,
            )
            return name, made.model

        answers = list(threads.map(ask, range(300)))
        assert all(asked == answered for asked, answered in answers)
        evicted = [client.get(f"{MODELS}/{n}").json()["generation"] for n in names]
        assert sum(evicted) > 3
