"""Loads over HTTP, on real servers: what callers get, and how they affect each other."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.kit.http import PREFIX, Gate, Serve, is_at_gate, problem, until
from tests.kit.process.support import Background, key_of

LOAD = PREFIX + "/load"
LOAD_KEYS = {
    *("status", "generation", "joined", "model_path", "gguf_variant", "pid", "base_url"),
    *("context_length", "requested_context_length", "cache_type_kv", "speculative_type"),
    *("llama_extra_args", "is_vision", "reload_reasons", "timings_s", "memory"),
}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_load_answers_when_the_model_is_healthy(serve: Serve, tiny_model: str) -> None:
    """The main job: load, query the server, compare the status, unload."""
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
        url, key = loaded["base_url"] + "/v1/chat/completions", key_of(loaded["pid"])
        chat = httpx.post(url, json=body, headers=key, trust_env=False, timeout=20)
        assert chat.json()["usage"]["completion_tokens"] == 4

        status = client.get(PREFIX + "/status").json()
        assert status["state"] == "Healthy"
        assert status["loaded"] == loaded
        assert client.get(PREFIX + "/load-progress").json()["phase"] == "ready"
        assert client.get(PREFIX + "/logs?lines=2").json()["lines"][-1]

        assert client.post(PREFIX + "/unload").json() == {"status": "unloaded"}
        assert not psutil.pid_exists(loaded["pid"])
        assert client.get(PREFIX + "/status").json()["loaded"] is None


def test_same_load_again_is_already_loaded(serve: Serve, tiny_model: str) -> None:
    with serve() as client:
        first = client.post(LOAD, json={"model_path": tiny_model}).json()
        again = client.post(LOAD, json={"model_path": tiny_model}).json()
        assert again["status"] == "already_loaded"
        assert again["pid"] == first["pid"]


def test_extra_args_of_the_status_can_be_posted_back(serve: Serve, tiny_model: str) -> None:
    """They mean the same when they are sent."""
    flags = ["--top-k", "7", "--seed", "42"]
    with serve() as client:
        client.post(LOAD, json={"model_path": tiny_model, "llama_extra_args": flags})
        shown = client.get(PREFIX + "/status").json()["loaded"]["llama_extra_args"]
        assert shown == flags
        again = {"model_path": tiny_model, "llama_extra_args": shown}
        assert client.post(LOAD, json=again).json()["status"] == "already_loaded"


def test_load_without_wait_is_accepted_and_can_be_polled(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    """202 with a `Location`, where the outcome is what the load would have answered."""
    with serve(gate.binary) as client:
        accepted = client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        assert accepted.status_code == 202
        assert accepted.json() == {"generation": 1}
        where = accepted.headers["location"]
        assert where == PREFIX + "/loads/1"
        until(client, is_at_gate)
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
        assert problem(client.get(PREFIX + "/loads/3")) == (404, "unknown_generation")
        assert problem(client.get(PREFIX + "/loads/first")) == (422, "malformed")


def test_poll_with_wait_s_answers_in_time_and_with_the_outcome(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    """B64: a proxy that cuts silent requests must not end a long load."""
    with serve(gate.binary) as client:
        accepted = client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        where = accepted.headers["location"]
        still = client.get(where, params={"wait_s": 0.05}).json()
        assert "outcome" not in still
        waiting = Background(client.get, where, params={"wait_s": 60})
        gate.open()
        settled = waiting.result().json()
        assert (settled["state"], settled["outcome"]["status"]) == ("Healthy", "loaded")
        assert client.get(where, params={"wait_s": 60}).json() == settled
        assert problem(client.get(PREFIX + "/loads/99?wait_s=60")) == (404, "unknown_generation")
        assert problem(client.get(where + "?wait_s=nan")) == (422, "malformed")


def test_poll_answers_when_a_queued_load_times_out(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str
) -> None:
    """It makes no transition, and still wakes the poll."""
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        until(client, is_at_gate)
        queued = {"model_path": other_model, "on_busy": "queue", "deadline_s": 0.2}
        where = client.post(LOAD + "?wait=false", json=queued).headers["location"]
        settled = client.get(where, params={"wait_s": 60}).json()
        assert (settled["state"], settled["outcome"]["category"]) == ("Idle", "deadline")
        gate.open()


def test_queries_answer_while_a_load_is_in_flight(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    """Status, progress, logs and plan do not wait; an unload ends the load."""
    body = {"model_path": tiny_model}
    with serve(gate.binary) as client:
        waiting = pool.submit(client.post, LOAD, json=body)
        loading = until(client, is_at_gate)["loading"]
        assert loading["model_path"] == tiny_model
        assert loading["phase"] == client.get(PREFIX + "/load-progress").json()["phase"]
        assert client.get(PREFIX + "/logs").json() == {"lines": []}
        assert client.post(PREFIX + "/plan", json=body).json()["action"] == "none"
        assert not waiting.done()
        named = client.post(PREFIX + "/unload", json={"model_path": "another"})
        assert named.json() == {"status": "not_loaded"}
        assert is_at_gate(client.get(PREFIX + "/status").json())
        assert client.post(PREFIX + "/unload", json={}).json() == {"status": "unloaded"}
        assert problem(waiting.result()) == (409, "cancelled")
        assert client.get(PREFIX + "/status").json()["state"] == "Idle"


def test_newer_load_supersedes_and_rejecting_load_is_busy(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str, pool: ThreadPoolExecutor
) -> None:
    with serve(gate.binary) as client:
        older = pool.submit(client.post, LOAD, json={"model_path": tiny_model})
        until(client, is_at_gate)
        polite = {"model_path": other_model, "on_busy": "reject"}
        assert problem(client.post(LOAD, json=polite)) == (409, "busy")
        assert not older.done()
        newer = pool.submit(client.post, LOAD, json={"model_path": other_model})
        assert problem(older.result()) == (409, "superseded")
        gate.open()
        assert newer.result().json()["model_path"] == other_model


def test_cancel_ends_the_named_load_but_no_loaded_model(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    cancel = PREFIX + "/cancel"
    with serve(gate.binary) as client:
        body = {"model_path": tiny_model, "load_request_id": "mine"}
        waiting = pool.submit(client.post, LOAD, json=body)
        until(client, is_at_gate)
        assert client.post(cancel, json={"load_request_id": "yours"}).json() == {"cancelled": False}
        assert client.post(cancel, json={"load_request_id": "mine"}).json() == {"cancelled": True}
        assert problem(waiting.result()) == (409, "cancelled")
        # the cancel of "yours" came before its load, and wins
        assert problem(client.post(LOAD, json=body | {"load_request_id": "yours"}))[0] == 409
        gate.open()
        loaded = client.post(LOAD, json={"model_path": tiny_model}).json()
        resident = {"generation": loaded["generation"]}
        assert client.post(cancel, json=resident).json() == {"cancelled": False}
        assert client.get("/readyz").status_code == 200


def test_client_that_disconnects_withdraws_only_itself(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    """B23: the disconnect must not end the load of clients that joined it."""
    with serve(gate.binary) as client:
        leaving = _post_and_keep_open(client, {"model_path": tiny_model})
        until(client, is_at_gate)
        staying = pool.submit(client.post, LOAD, json={"model_path": tiny_model})
        until(client, lambda status: status["loading"]["callers"] == 2)
        leaving.close()
        until(client, lambda status: status["loading"]["callers"] == 1)
        gate.open()
        answer = staying.result().json()
        assert (answer["status"], answer["joined"]) == ("loaded", True)


def test_load_whose_last_client_disconnects_is_cancelled(
    serve: Serve, gate: Gate, tiny_model: str
) -> None:
    with serve(gate.binary) as client:
        leaving = _post_and_keep_open(client, {"model_path": tiny_model})
        until(client, is_at_gate)
        leaving.close()
        status = until(client, lambda status: status["state"] == "Idle")
        assert status["loading"] is None


def test_plan_predicts_the_load(serve: Serve, tiny_model: str) -> None:
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


def test_failed_start_reports_the_last_lines_of_output(serve: Serve, tiny_model: str) -> None:
    with serve() as client:
        body = {"model_path": tiny_model, "llama_extra_args": ["--seed", "bogus"]}
        answer = client.post(LOAD, json=body)
        assert problem(answer) == (424, "server_start_failed")
        members = answer.json()
        assert any("--seed" in line for line in members["log_tail"])
        last_error = client.get(PREFIX + "/status").json()["last_error"]
        assert _without_story(last_error) == _without_story(members)
        settled = client.get(f"{PREFIX}/loads/{members['generation']}").json()
        assert settled["state"] == "Idle"
        assert _without_story(settled["outcome"]) == _without_story(members)


def test_app_that_ends_during_a_load_leaves_no_server(
    serve: Serve, gate: Gate, tiny_model: str, pool: ThreadPoolExecutor
) -> None:
    """`state_dir` fails the test if a server is left."""
    with serve(gate.binary) as client:
        body = {"model_path": tiny_model}
        assert client.post(LOAD + "?wait=false", json=body).status_code == 202
        until(client, is_at_gate)


def _without_story(problem: dict[str, object]) -> dict[str, object]:
    """Each answer has the story up to its own time."""
    return {name: value for name, value in problem.items() if name != "story"}


def _post_and_keep_open(
    client: httpx.Client, body: dict[str, object]
) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", LOAD, json.dumps(body), headers)
    return connection


def test_unload_of_a_queued_model_leaves_the_load_in_flight(
    serve: Serve, gate: Gate, tiny_model: str, other_model: str
) -> None:
    """It is answered at once, although the slot is not empty."""
    with serve(gate.binary) as client:
        client.post(LOAD + "?wait=false", json={"model_path": tiny_model})
        until(client, is_at_gate)
        queued = {"model_path": other_model, "on_busy": "queue"}
        waiting = Background(client.post, LOAD, json=queued)
        until(client, lambda status: status["loading"]["queued"] == 1)
        unloaded = client.post(PREFIX + "/unload", json={"model_path": other_model})
        assert unloaded.json() == {"status": "unloaded"}
        assert is_at_gate(client.get(PREFIX + "/status").json())
        assert problem(waiting.result()) == (409, "cancelled")
        gate.open()
        status = until(client, lambda status: status["state"] == "Healthy")
        assert status["loaded"]["model_path"] == tiny_model
