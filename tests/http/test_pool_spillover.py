"""Requests that another server takes while the pool has no room for their model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.http import problem
from tests.kit.pools import catalogue_of, model, serving_pool, until_model, write_echo_server

CHAT = "/v1/chat/completions"


@pytest.fixture
def options(tmp_path: Path, state_dir: Path) -> dict[str, Any]:
    return {"llama_server": write_echo_server(tmp_path), "state_dir": state_dir}


@pytest.fixture
def remote(tiny_model: str, options: dict[str, Any]) -> Iterator[httpx.Client]:
    """The neighbour: a pool of its own with one model."""
    with serving_pool(catalogue_of({"theirs": tiny_model}), slot="there", **options) as client:
        yield client


def catalogue(tiny_model: str, other_model: str, remote: httpx.Client) -> dict[str, Any]:
    """Room for one of two models; requests for the second may go elsewhere."""
    files = {"first": tiny_model, "second": other_model}
    made = catalogue_of(
        files,
        {"memory": "150 MiB", "max_wait_s": 60},
        second={"spillover": ["near"], "presets": {"cold": {"temperature": 0}}},
    )
    made["models"]["near"] = {"base_url": f"{remote.base_url}/v1", "upstream_model": "theirs"}
    return made


@contextlib.contextmanager
def busy(client: httpx.Client, go: Path) -> Iterator[None]:
    """The first model has a request in this block, so that it cannot go."""
    body = {"model": "first", "stream": 2, "until": str(go)}
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        until_model(client, "first", lambda one: one["leases"] == 1)
        yield
        go.touch()
        assert list(lines)


def test_a_request_goes_elsewhere_only_while_there_is_no_room(
    tiny_model: str,
    other_model: str,
    remote: httpx.Client,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    with serving_pool(catalogue(tiny_model, other_model, remote), **options) as client:
        with busy(client, tmp_path / "go"):
            answer = client.post(CHAT, json={"model": "second:cold"}).json()
            assert (answer["alias"], answer["model"]) == ("theirs", "second")
            assert answer["sent"] == {"model": "theirs", "temperature": 0}
            assert model(client, "second")["waiting"] == 0
        until_model(client, "first", lambda one: one["leases"] == 0)
        answer = client.post(CHAT, json={"model": "second"}).json()
        assert answer["alias"] == "second", "what is idle makes room"


def test_a_server_that_failed_a_request_is_left_out(
    tiny_model: str, other_model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The next request waits for room here: the circuit is open until the server answers again."""
    there = serving_pool(catalogue_of({"theirs": tiny_model}), slot="there", **options)
    with contextlib.ExitStack() as life, ThreadPoolExecutor() as threads:
        made = catalogue(tiny_model, other_model, life.enter_context(there))
        with serving_pool(made, **options) as client:
            body = {"model": "second"}
            with busy(client, tmp_path / "go"):
                assert client.post(CHAT, json=body).json()["alias"] == "theirs"
                life.close()  # between two looks of the watch
                lost = client.post(CHAT, json=body)
                assert problem(lost) == (502, "bad_gateway")
                assert "near" not in lost.text, "the key need not see that model"
                assert client.get("/api/activity").json()[0]["model"] == "second"
                assert model(client, "near")["last_error"]["category"] == "bad_gateway"
                waiting = threads.submit(client.post, CHAT, json=body)
                until_model(client, "second", lambda one: one["waiting"] == 1)
            assert waiting.result().json()["alias"] == "second"
