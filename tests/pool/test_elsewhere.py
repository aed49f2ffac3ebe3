"""Models of other servers: they are asked whether they answer, and what that says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator import ModelPool, Problem, State
from orchestrator.pool.catalogue import catalogue_of
from orchestrator.pool.elsewhere import Watch, ask
from orchestrator.pool.entries import Entry
from tests.kit.process.support import until
from tests.kit.sentences import assert_sentence


class Server(HTTPServer):
    """Answers every request with `status`, and keeps what was asked."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def entry_at(url: str, **fields: str) -> Entry:
    made = catalogue_of({"models": {"there": {"base_url": url, **fields}}})
    return made.models["there"]


@pytest.mark.parametrize(("path", "asked"), [("", "/v1/models"), ("/api/v3", "/api/v3/models")])
def test_server_that_answers_is_of_use(server: Server, path: str, asked: str) -> None:
    assert ask(entry_at(server.url + path)) is None
    assert server.asked == [(asked, None)]


def test_server_is_asked_with_its_key(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    assert ask(entry_at(server.url, api_key_file=str(key))) is None
    assert server.asked == [("/v1/models", "Bearer s3cret")]
    server.status = 401
    assert_problem(ask(entry_at(server.url, api_key_file=str(key))), "elsewhere.key")
    key.unlink()
    problem = ask(entry_at(server.url, api_key_file=str(key)))
    assert problem is not None
    assert problem.field == "api_key_file"


def test_server_that_fails_or_is_gone_is_of_no_use(server: Server) -> None:
    entry = entry_at(server.url)
    server.status = 503
    assert_problem(ask(entry), "elsewhere.fails")
    server.shutdown()
    server.server_close()
    problem = ask(entry)
    assert problem is not None
    assert problem.category == "bad_gateway"


def assert_problem(problem: Problem | None, sentence: str) -> None:
    assert problem is not None
    assert problem.category == "bad_gateway"
    assert_sentence(sentence, problem.message)


def test_servers_are_asked_again_and_again_as_long_as_there_are_any() -> None:
    answers = iter([None, Problem("bad_gateway", "gone"), Problem("bad_gateway", "gone"), None])
    is_over = threading.Event()
    asked: list[str] = []

    def answer(entry: Entry) -> Problem | None:
        asked.append(entry.name)
        found = next(answers, None)
        if len(asked) == 4:
            is_over.set()
        return found

    entry = entry_at("http://127.0.0.1:1")
    watch = Watch(answer, interval_s=0.001)
    watch.of([entry, replace(entry, name="ours", base_url=None)])
    until(lambda: watch.problem(entry), "the second answer")
    until(is_over.is_set, "the fourth answer")
    until(lambda: watch.problem(entry) is None, "it to be back")
    watch.of(())
    until(lambda: watch._thread is None, "the end of its thread")
    assert set(asked) == {"there"}


def test_nothing_is_watched_where_every_server_is_ours() -> None:
    watch = Watch()
    watch.of([replace(entry_at("http://127.0.0.1:1"), base_url=None)])
    assert watch._thread is None


def test_status_of_a_pool_tells_whether_they_answer(server: Server, state_dir: Path) -> None:
    catalogue = {"models": {"there": {"base_url": server.url}}}
    server.status = 503
    with ModelPool(catalogue, state_dir=state_dir) as pool:
        until(lambda: pool.model_status("there").last_error, "its first answer")
        assert pool.model_status("there").state is State.IDLE
        server.status = 200
        pool.add("other", base_url=server.url)  # a change of the catalogue asks at once
        until(lambda: pool.model_status("there").state is State.HEALTHY, "its second answer")
        assert pool.model_status("there").last_error is None
        pool.remove("there")
        pool.remove("other")
        until(lambda: pool._watch._thread is None, "the end of the watch")
