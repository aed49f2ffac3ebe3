"""Loads over HTTP, on real servers: what callers are told, and who is affected by whom."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.kit.http import PREFIX, Gate, Serve, is_held, problem, until
from tests.kit.process.support import Background

LOAD = PREFIX + "/load"
LOAD_KEYS = {
    *("status", "generation", "joined", "model_path", "gguf_variant", "pid", "base_url"),
    *("context_length", "requested_context_length", "cache_type_kv", "speculative_type"),
    *("llama_extra_args", "is_vision", "reload_reasons", "timings_s"),
}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_a_load_answers_when_the_model_is_healthy(serve: Serve, tiny_model: str) -> None:
    """The main job: load, ask the server, see the same in the status, unload."""
    with serve() as client:
        assert problem(client.get("/readyz")) == (503, "not_loaded")
        answer = client.post(LOAD, json={"model_path": tiny_model, "max_seq_length": 512})
        loaded = answer.json()
        assert answer.status_code == 200
        assert loaded.keys() == LOAD_KEYS
        assert loaded["timings_s"].keys() == {"kill", "download", "spawn", "health", "total"}
        assert (loaded["status"], loaded["context_length"]) == ("loaded", 512)
        assert client.get("/readyz").status_code == 200
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        chat = httpx.post(
            loaded["base_url"] + "/v1/chat/completions", json=body, trust_env=False, timeout=20
        )
        assert chat.json()["usage"]["completion_tokens"] == 4

        status = client.get(PREFIX + "/status").json()
        assert status["state"] == "Healthy"
        assert status["loaded"] == loaded
        assert client.get(PREFIX + "/load-progress").json()["phase"] == "ready"
        assert client.get(PREFIX + "/logs?lines=2").json()["lines"][-1]

        assert client.post(PREFIX + "/unload").json() == {"status": "unloaded"}
        assert not psutil.pid_exists(loaded["pid"])
        assert client.get(PREFIX + "/status").json()["loaded"] is None


def test_the_same_load_again_is_answered_at_once(serve: Serve, tiny_model: str) -> None:
    with serve() as client:
        first = client.post(LOAD, json={"model_path": tiny_model}).json()
        again = client.post(LOAD, json={"model_path": tiny_model}).json()
        assert again["status"] == "already_loaded"
        assert again["pid"] == first["pid"]


def test_the_extra_args_of_the_status_may_be_posted_back(serve: Serve, tiny_model: str) -> None:
    """The round trip of the contract: what is shown means the same when it is sent."""
    flags = ["--top-k", "7", "--seed", "42"]
    with serve() as client:
        client.post(LOAD, json={"model_path": tiny_model, "llama_extra_args": flags})
        shown = client.get(PREFIX + "/status").json()["loaded"]["llama_extra_args"]
        assert shown == flags
        again = {"model_path": tiny_model, "llama_extra_args": shown}
        assert client.post(LOAD, json=again).json()["status"] == "already_loaded"


def test_a_load_need_not_be_waited_for(serve: Serve, gate: Gate, tiny_model: str) -> None:
    """202 with a place to ask; its outcome is what the load would have answered."""
    with serve(gate.binary) as client:
        accepted = client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        assert accepted.status_code == 202
        assert accepted.json() == {"generation": 1}
        where = accepted.headers["location"]
        assert where == PREFIX + "/loads/1"
        until(client, is_held)
        assert client.get(where).json() == {"generation": 1, "state": "WaitingHealth"}
        queued = {"model_path": tiny_model, "max_seq_length": 256, "on_busy": "queue"}
        assert client.post(LOAD + "?wait=false", json=queued).json() == {"generation": 2}
        assert client.get(PREFIX + "/loads/2").json() == {"generation": 2, "state": "Idle"}
        assert client.post(PREFIX + "/cancel", json={"generation": 2}).json()["cancelled"]
        gate.open()
        until(client, lambda status: status["state"] == "Healthy")
        settled = client.get(where).json()
        assert settled["state"] == "Healthy"
        assert settled["outcome"].keys() == LOAD_KEYS
        ended = client.get(PREFIX + "/loads/2").json()
        assert (ended["state"], ended["outcome"]["category"]) == ("Idle", "cancelled")
        assert problem(client.get(PREFIX + "/loads/3")) == (404, "not_found")
        assert problem(client.get(PREFIX + "/loads/first")) == (422, "malformed")


def test_a_long_load_is_followed_through_a_proxy_that_cuts_silent_requests(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    """B64: each answer comes in the time that was asked for, the last when the load is settled."""
    with serve(gate.binary) as client:
        accepted = client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        where = accepted.headers["location"]
        still = client.get(where, params={"wait_s": 0.05}).json()
        assert "outcome" not in still
        waiting = Background(client.get, where, params={"wait_s": 60})
        gate.open()
        told = waiting.result().json()
        assert (told["state"], told["outcome"]["status"]) == ("Healthy", "loaded")
        assert client.get(where, params={"wait_s": 60}).json() == told
        assert problem(client.get(PREFIX + "/loads/99?wait_s=60")) == (404, "not_found")
        assert problem(client.get(where + "?wait_s=nan")) == (422, "malformed")


def test_who_waits_for_a_load_hears_also_when_it_fails_or_never_begins(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str
) -> None:
    """A queued load that times out makes no transition; who waits for it is woken all the same."""
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        until(client, is_held)
        queued = {"model_path": other_model, "on_busy": "queue", "deadline_s": 0.2}
        where = client.post(LOAD + "?wait=false", json=queued).headers["location"]
        told = client.get(where, params={"wait_s": 60}).json()
        assert (told["state"], told["outcome"]["category"]) == ("Idle", "deadline")
        gate.open()


def test_everything_that_reads_answers_while_a_load_runs(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    """Status, progress, logs and plan wait for nobody; an unload ends the load and its caller."""
    body = {"model_path": tiny_model}
    with serve(gate.binary) as client:
        waiting = pool.submit(client.post, LOAD, json=body)
        loading = until(client, is_held)["loading"]
        assert loading["model_path"] == tiny_model
        assert loading["phase"] == client.get(PREFIX + "/load-progress").json()["phase"]
        assert client.get(PREFIX + "/logs").json() == {"lines": []}
        assert client.post(PREFIX + "/plan", json=body).json()["action"] == "none"
        assert not waiting.done()
        named = client.post(PREFIX + "/unload", json={"model_path": "another"})
        assert named.json() == {"status": "not_loaded"}
        assert is_held(client.get(PREFIX + "/status").json())
        assert client.post(PREFIX + "/unload", json={}).json() == {"status": "unloaded"}
        assert problem(waiting.result()) == (409, "cancelled")
        assert client.get(PREFIX + "/status").json()["state"] == "Idle"


def test_a_newer_load_supersedes_and_a_rejecting_one_is_refused(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str, pool: ThreadPoolExecutor
) -> None:
    with serve(gate.binary) as client:
        older = pool.submit(client.post, LOAD, json={"model_path": tiny_model})
        until(client, is_held)
        polite = {"model_path": other_model, "on_busy": "reject"}
        assert problem(client.post(LOAD, json=polite)) == (409, "busy")
        assert not older.done()
        newer = pool.submit(client.post, LOAD, json={"model_path": other_model})
        assert problem(older.result()) == (409, "superseded")
        gate.open()
        assert newer.result().json()["model_path"] == other_model


def test_a_cancel_ends_the_load_it_names_and_no_model(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    cancel = PREFIX + "/cancel"
    with serve(gate.binary) as client:
        body = {"model_path": tiny_model, "load_request_id": "mine"}
        waiting = pool.submit(client.post, LOAD, json=body)
        until(client, is_held)
        assert client.post(cancel, json={"load_request_id": "yours"}).json() == {"cancelled": False}
        assert client.post(cancel, json={"load_request_id": "mine"}).json() == {"cancelled": True}
        assert problem(waiting.result()) == (409, "cancelled")
        # one that overtakes its load still wins
        assert problem(client.post(LOAD, json=body | {"load_request_id": "yours"}))[0] == 409
        gate.open()
        loaded = client.post(LOAD, json={"model_path": tiny_model}).json()
        resident = {"generation": loaded["generation"]}
        assert client.post(cancel, json=resident).json() == {"cancelled": False}
        assert client.get("/readyz").status_code == 200


def test_a_client_that_goes_away_withdraws_only_itself(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    """B23: one client's disconnect must not end the load of those who joined it."""
    with serve(gate.binary) as client:
        leaving = _post_and_keep_open(client, {"model_path": tiny_model})
        until(client, is_held)
        staying = pool.submit(client.post, LOAD, json={"model_path": tiny_model})
        until(client, lambda status: status["loading"]["callers"] == 2)
        leaving.close()
        until(client, lambda status: status["loading"]["callers"] == 1)
        gate.open()
        answer = staying.result().json()
        assert (answer["status"], answer["joined"]) == ("loaded", True)


def test_a_load_that_nobody_waits_for_any_more_is_ended(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    with serve(gate.binary) as client:
        leaving = _post_and_keep_open(client, {"model_path": tiny_model})
        until(client, is_held)
        leaving.close()
        status = until(client, lambda status: status["state"] == "Idle")
        assert status["loading"] is None


def test_a_plan_says_what_a_load_would_do(serve: Serve, tiny_model: str) -> None:
    plan = PREFIX + "/plan"
    with serve() as client:
        first = client.post(plan, json={"model_path": tiny_model}).json()
        assert (first["action"], first["reload_reasons"]) == ("load", [])
        client.post(LOAD, json={"model_path": tiny_model})
        assert client.post(plan, json={"model_path": tiny_model}).json()["action"] == "none"
        other = client.post(plan, json={"model_path": tiny_model, "n_parallel": 2}).json()
        assert other["action"] == "reload"
        reason = {"field": "n_parallel", "running": None, "requested": 2}
        assert other["reload_reasons"] == [reason]
        assert other["argv"][-2:] == ["--parallel", "2"]
        assert problem(client.post(plan, json={"model_path": "gone.gguf"}))[0] == 404


def test_a_start_that_fails_shows_the_servers_last_lines(serve: Serve, tiny_model: str) -> None:
    with serve() as client:
        body = {"model_path": tiny_model, "llama_extra_args": ["--bogus"]}
        answer = client.post(LOAD, json=body)
        assert problem(answer) == (424, "server_start_failed")
        members = answer.json()
        assert any("--bogus" in line for line in members["log_tail"])
        last_error = client.get(PREFIX + "/status").json()["last_error"]
        assert _but_for_the_story(last_error) == _but_for_the_story(members)
        settled = client.get(f"{PREFIX}/loads/{members['generation']}").json()
        assert settled["state"] == "Idle"
        assert _but_for_the_story(settled["outcome"]) == _but_for_the_story(members)


def test_closing_answers_whoever_waits(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    """An app that ends with a load in flight leaves no server (the fixture looks)."""
    with serve(gate.binary) as client:
        body = {"model_path": tiny_model}
        assert client.post(LOAD + "?wait=false", json=body).status_code == 202
        until(client, is_held)


def _but_for_the_story(problem: dict[str, object]) -> dict[str, object]:
    """It is told up to the moment: each of them shows another one."""
    return {name: value for name, value in problem.items() if name != "story"}


def _post_and_keep_open(
    client: httpx.Client, body: dict[str, object]
) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", LOAD, json.dumps(body), headers)
    return connection


def test_an_unload_of_a_model_that_waits_its_turn_leaves_the_one_that_loads(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str
) -> None:
    """It is answered now, although the slot will not be empty; the other load is not touched."""
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        until(client, is_held)
        queued = {"model_path": other_model, "on_busy": "queue"}
        waiting = Background(client.post, LOAD, json=queued)
        until(client, lambda status: status["loading"]["queued"] == 1)
        unloaded = client.post(PREFIX + "/unload", json={"model_path": other_model})
        assert unloaded.json() == {"status": "unloaded"}
        assert is_held(client.get(PREFIX + "/status").json())
        assert problem(waiting.result()) == (409, "cancelled")
        gate.open()
        status = until(client, lambda status: status["state"] == "Healthy")
        assert status["loaded"]["model_path"] == tiny_model
